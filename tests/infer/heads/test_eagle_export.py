import json

import pytest
from head_folders import LAYERS, WIDTH, eagle1, eagle3

from draftsmith.infer.heads.eagle_export import eagle_config, eagle_tensors, speculators_config
from draftsmith.infer.heads.folders import TrainedFor, save_eagle

IDS = "eagle_aux_hidden_state_layer_ids"


def test_default_layers_are_not_written_because_engines_count_differently():
    assert IDS not in eagle_config(eagle3(), LAYERS)


def test_other_layers_are_written_as_states_before_them():
    head = eagle3(features=("layer:1", "layer:4", "layer:6"))
    assert eagle_config(head, LAYERS)[IDS] == [1, 4, 6]
    assert eagle_config(eagle3())[IDS] == [2, 4, 6]


def test_states_that_have_no_layer_id_are_refused():
    with pytest.raises(ValueError, match="last, layer:4 cannot be written as layer ids"):
        eagle_config(eagle3(features=("last", "layer:4")), LAYERS)


def test_the_flat_config_always_says_what_loaders_would_assume(tmp_path):
    save_eagle(tmp_path, eagle3(norm_before_residual=True), TrainedFor("t", num_layers=LAYERS))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLMEagle3"]
    assert config["norm_before_residual"] is True
    assert config["norm_output"] is False
    assert config["rope_theta"] == 10_000
    assert config["tie_word_embeddings"] is False
    assert config["bias"] is False
    assert (config["vocab_size"], config["draft_vocab_size"], config["target_hidden_size"]) == (61, 20, WIDTH)


def test_a_number_of_states_other_than_three_is_written():
    assert eagle_config(eagle3(features=("layer:2", "layer:6")))["num_aux_hidden_states"] == 2


def test_one_layer_has_eagles_name_and_several_have_numbers():
    assert "midlayer.hidden_norm.weight" in eagle_tensors(eagle3())
    assert "layers.1.input_layernorm.weight" in eagle_tensors(eagle3(layers=2))
    assert "layers.0.hidden_norm.weight" in eagle_tensors(eagle3(), "speculators")


def test_maps_are_written_only_for_a_part_of_the_vocabulary():
    assert {"d2t", "t2d"} <= set(eagle_tensors(eagle3()))
    assert not {"d2t", "t2d"} & set(eagle_tensors(eagle3(ids=False)))


def test_speculators_config_names_the_target_and_the_layers():
    config = speculators_config(eagle3(), "owner/target", ["LlamaForCausalLM"], 4)
    assert config[IDS] == [2, 4, 6]
    assert config["speculators_config"]["verifier"] == {
        "name_or_path": "owner/target",
        "architectures": ["LlamaForCausalLM"],
    }
    assert config["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 4
    assert config["transformer_layer_config"]["model_type"] == "llama"


def test_heads_that_speculators_does_not_have_are_refused():
    with pytest.raises(ValueError, match=r"EAGLE-3 heads without fc.bias only"):
        speculators_config(eagle1(), "", [], 4)
    with pytest.raises(ValueError, match="as wide as their target only: 32 is not 48"):
        speculators_config(eagle3(feature_width=48), "", [], 4)
