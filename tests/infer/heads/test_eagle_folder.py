import itertools
import logging

import pytest
import torch
from head_folders import FEATURES, LAYERS, VOCAB, WIDTH, eagle1, eagle3, flat, folder_of, nested, said, target_config
from transformers import LlamaConfig, Qwen3Config

from draftsmith.infer.heads.eagle import EagleDesign
from draftsmith.infer.heads.folders import TrainedFor, load_eagle, save_eagle

SWITCHES = ("norm_before_residual", "norm_output", "norm_before_fc", "fc_norm")


def loaded(path, head, **config):
    """The head as it comes back from a flat folder whose config has these changes; None leaves a key out."""
    tensors, written = flat(head)
    changed = {key: value for key, value in (written | config).items() if value is not None}
    return load_eagle(folder_of(path, tensors, changed), target_config())


@pytest.mark.parametrize("switches", [s for s in itertools.product((0, 1), repeat=4) if not (s[2] and s[3])])
def test_a_saved_head_comes_back_with_its_switches_and_says_the_same(tmp_path, switches):
    head = eagle3(**{name: bool(on) for name, on in zip(SWITCHES, switches)})
    save_eagle(tmp_path / "head", head, TrainedFor(num_layers=LAYERS))
    back = load_eagle(tmp_path / "head")
    assert back.design == head.design
    assert torch.equal(back.ids_V, head.ids_V)
    assert torch.equal(said(back), said(head))


@pytest.mark.parametrize(
    "head",
    [
        eagle1(),
        eagle1(bias=False, own_embedding=True),
        eagle3(ids=False, layers=2),
        eagle3(layers=2, kind=Qwen3Config),
    ],
)
def test_other_heads_come_back_too(tmp_path, head):
    save_eagle(tmp_path / "head", head)
    back = load_eagle(tmp_path / "head", dtype="float64")
    assert back.design == head.design
    assert back.config.model_type == head.config.model_type
    assert torch.equal(said(back), said(head.double()))


def test_names_of_all_projects_are_read(tmp_path):
    head = eagle3(fc_norm=True)
    tensors, config = flat(head)
    assert any(name.startswith("midlayer.") for name in tensors)
    later = {name.replace("midlayer.", "layers.0."): one for name, one in tensors.items()}
    older = {
        name.replace("fc_norm.0", "aux_norm_low")
        .replace("fc_norm.1", "aux_norm_mid")
        .replace("fc_norm.2", "aux_norm_high"): one
        for name, one in tensors.items()
    }
    under = {name if name in ("d2t", "t2d", "lm_head.weight") else f"model.{name}": one for name, one in later.items()}
    for number, names in enumerate((tensors, later, older, under)):
        assert torch.equal(
            said(load_eagle(folder_of(tmp_path / str(number), names, config), target_config())), said(head)
        )


def test_pickled_weights_of_version_1_are_read_with_their_embedding(tmp_path):
    head = eagle1(own_embedding=True)
    tensors, config = flat(head)
    assert "embed_tokens.weight" in tensors
    back = load_eagle(folder_of(tmp_path, tensors, config, "pytorch_model.bin"))
    assert back.embed_tokens is not None
    assert torch.equal(said(back), said(head))


def test_a_nested_config_may_leave_out_defaults(tmp_path):
    head = eagle3(own_embedding=True, norm_before_residual=True)
    tensors, config = nested(head)
    assert "rope_theta" not in config["transformer_layer_config"]
    back = load_eagle(folder_of(tmp_path, tensors, config))
    assert back.design == head.design
    assert torch.equal(said(back), said(head))


# a bias of fc that is missing, or should not be there


def test_a_bias_that_the_config_promises_must_be_there(tmp_path):
    with pytest.raises(ValueError, match=r'"bias": true, and there is no fc.bias'):
        loaded(tmp_path, eagle1(bias=False), bias=True)


def test_a_bias_that_the_config_denies_must_not_be_there(tmp_path):
    with pytest.raises(ValueError, match=r'"bias": false, and there is an fc.bias'):
        loaded(tmp_path, eagle1(bias=True), bias=False)


def test_a_missing_bias_that_no_config_speaks_of_is_warned_of(tmp_path, caplog):
    assert not loaded(tmp_path, eagle1(bias=False), bias=None).design.fc_bias
    assert "no fc.bias" in caplog.text


# draft vocabularies


def test_a_part_of_the_vocabulary_needs_its_map(tmp_path):
    tensors, config = flat(eagle3())
    bare = {name: one for name, one in tensors.items() if name not in ("d2t", "t2d")}
    with pytest.raises(ValueError, match="lm_head has 20 rows of a vocabulary of 61, and there is no d2t"):
        load_eagle(folder_of(tmp_path, bare, config), target_config())


@pytest.mark.parametrize("kept", ["d2t", "t2d"])
def test_either_map_alone_says_the_ids(tmp_path, kept):
    head = eagle3()
    tensors, config = flat(head)
    some = {name: one for name, one in tensors.items() if name == kept or name not in ("d2t", "t2d")}
    assert load_eagle(folder_of(tmp_path, some, config), target_config()).ids_V.tolist() == head.ids_V.tolist()


def test_maps_that_disagree_are_refused(tmp_path):
    tensors, config = flat(eagle3())
    with pytest.raises(ValueError, match="d2t and t2d name different tokens"):
        load_eagle(folder_of(tmp_path, tensors | {"d2t": torch.zeros(20).long()}, config), target_config())


def test_a_map_of_zeros_alone_is_warned_of(tmp_path, caplog):
    tensors, config = flat(eagle3())
    tensors.pop("t2d")
    head = load_eagle(folder_of(tmp_path, tensors | {"d2t": torch.zeros(20).long()}, config), target_config())
    assert head.ids_V.tolist() == list(range(20))
    assert "d2t is all zeros" in caplog.text


@pytest.mark.parametrize(("at", "to"), [(19, 61), (3, -7), (1, 0)])
def test_a_map_to_no_token_or_to_one_twice_is_refused(tmp_path, at, to):
    tensors, config = flat(eagle3())
    tensors.pop("t2d")
    tensors["d2t"][at] = to - at if at != 1 else int(tensors["d2t"][0]) - 1
    with pytest.raises(ValueError, match="does not map its 20 draft ids to as many tokens below 61"):
        load_eagle(folder_of(tmp_path, tensors, config), target_config())


def test_a_map_of_another_length_is_refused(tmp_path):
    tensors, config = flat(eagle3())
    with pytest.raises(ValueError, match="d2t has 19 entries, and lm_head 20 rows"):
        load_eagle(folder_of(tmp_path, tensors | {"d2t": tensors["d2t"][:19].clone()}, config), target_config())


# which states it reads


def test_layers_are_the_default_ones_where_the_folder_names_none(tmp_path):
    assert loaded(tmp_path, eagle3()).features == FEATURES


def test_default_layers_need_the_target(tmp_path):
    with pytest.raises(ValueError, match="load it together with the target"):
        load_eagle(folder_of(tmp_path, *flat(eagle3())))


@pytest.mark.parametrize("where", ["top", "eagle_config"])
@pytest.mark.parametrize(("ids", "features", "warned"), [([2, 5, 6], (2, 5, 6), False), ([1, 4, 5], (2, 5, 6), True)])
def test_layer_ids_count_states_before_or_after_a_layer(tmp_path, caplog, where, ids, features, warned):
    named = {"eagle_aux_hidden_state_layer_ids": ids}
    head = loaded(tmp_path, eagle3(), **(named if where == "top" else {"eagle_config": named}))
    assert head.features == tuple(f"layer:{number}" for number in features)
    assert ("after these layers" in caplog.text) == warned


def test_layer_ids_that_do_not_say_what_they_count_are_not_guessed(tmp_path):
    with pytest.raises(
        ValueError, match=r'before or after .* Write \{"features": \["layer:3", "layer:4", "layer:5"\]\}'
    ) as refused:
        loaded(tmp_path, eagle3(), eagle_aux_hidden_state_layer_ids=[3, 4, 5])
    (tmp_path / "draftsmith.json").write_text('{"features": ["layer:3", "layer:4", "layer:5"]}')
    assert "draftsmith.json" in str(refused.value)
    assert load_eagle(tmp_path).features == ("layer:3", "layer:4", "layer:5")


def test_speculators_count_states_before_layers(tmp_path):
    tensors, config = nested(eagle3(own_embedding=True))
    config["eagle_aux_hidden_state_layer_ids"] = [3, 5, 8]
    assert load_eagle(folder_of(tmp_path, tensors, config)).features == ("layer:3", "layer:5", "layer:8")


# switches


def test_a_residual_that_speculators_folder_does_not_mention_is_warned_of(tmp_path, caplog):
    tensors, config = nested(eagle3(own_embedding=True))
    config.pop("norm_before_residual")
    assert not load_eagle(folder_of(tmp_path, tensors, config)).design.norm_before_residual
    assert "does not say norm_before_residual: taken as false" in caplog.text


def test_a_flat_folder_without_switches_is_eagles_own(tmp_path, caplog):
    head = loaded(tmp_path, eagle3(), **dict.fromkeys(SWITCHES))
    assert head.design == EagleDesign(3, FEATURES, WIDTH)
    assert caplog.text == ""


def test_a_flat_folder_with_norm_output_is_warned_of(tmp_path, caplog):
    assert loaded(tmp_path, eagle3(norm_output=True)).design.norm_output
    assert "SpecForge trains with the raw one" in caplog.text


@pytest.mark.parametrize("switch", ["norm_before_fc", "fc_norm"])
def test_a_switch_without_its_weights_is_refused(tmp_path, switch):
    with pytest.raises(ValueError, match=f"config.json says {switch} True, and the weights are without it"):
        loaded(tmp_path, eagle3(), **{switch: True})


def test_a_norm_that_the_config_denies_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"config.json says fc_norm False, and the weights are with it"):
        loaded(tmp_path, eagle3(fc_norm=True), fc_norm=False)


def test_two_norms_before_fc_are_refused():
    with pytest.raises(ValueError, match="norm_before_fc and fc_norm"):
        EagleDesign(3, FEATURES, WIDTH, norm_before_fc=True, fc_norm=True)


def test_rotations_are_the_folders_own_and_never_the_targets(tmp_path, caplog):
    assert target_config().rope_parameters["rope_theta"] == 777
    assert loaded(tmp_path / "a", eagle3(), rope_theta=None).config.rope_parameters["rope_theta"] == 10_000
    assert "does not say rope_theta: taken as 10000, and not as the target's 777" in caplog.text
    caplog.clear()
    assert loaded(tmp_path / "b", eagle3(), rope_theta=50_000).config.rope_parameters["rope_theta"] == 50_000
    assert "EAGLE's own trainer uses 10000 whatever that says" in caplog.text


def test_scaled_rotations_survive(tmp_path):
    head = eagle3()
    rope = {"rope_type": "linear", "factor": 4.0, "rope_theta": 5000.0}
    head.config = LlamaConfig(**{**head.config.to_dict(), "rope_parameters": rope})
    save_eagle(tmp_path, head)
    assert load_eagle(tmp_path).config.rope_parameters == rope


# heads that are something else, or of another target


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("mask_hidden", "a P-EAGLE head"),
        ("midlayer.mlp.experts.0.weight", "a head with experts"),
    ],
)
def test_designs_that_are_not_built_are_refused_by_name(tmp_path, name, what):
    tensors, config = flat(eagle3())
    with pytest.raises(ValueError, match=what):
        load_eagle(folder_of(tmp_path, tensors | {name: torch.zeros(1)}, config), target_config())


def test_a_sliding_window_is_refused(tmp_path):
    with pytest.raises(ValueError, match="sliding window"):
        loaded(tmp_path, eagle3(), layer_types=["sliding_attention"])


def test_missing_and_extra_and_misshapen_tensors_are_named_in_one_line(tmp_path):
    tensors, config = flat(eagle3())
    lacking = {name: one for name, one in tensors.items() if name != "norm.weight"}
    with pytest.raises(ValueError, match=r"lacks model.norm.weight: copy or download"):
        load_eagle(folder_of(tmp_path / "a", lacking, config), target_config())
    with pytest.raises(ValueError, match=r"does not have: depth.weight"):
        load_eagle(folder_of(tmp_path / "b", tensors | {"depth.weight": torch.zeros(1)}, config), target_config())
    with pytest.raises(ValueError, match=r"k_proj.weight has the shape \(16, 64\), and by .* \(32, 64\)"):
        load_eagle(folder_of(tmp_path / "c", tensors, config | {"num_key_value_heads": 4}), target_config())


def test_a_config_without_heads_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not give num_attention_heads"):
        loaded(tmp_path / "a", eagle3(), num_attention_heads=None)
    with pytest.raises(ValueError, match=r"has no config.json"):
        load_eagle(folder_of(tmp_path / "b", flat(eagle3())[0], None))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"hidden_size": 48}, "reads states of width 32, and the target's are 48 wide"),
        ({"num_hidden_layers": 5}, "reads layer:6, and the target has 5 layers"),
        ({"vocab_size": 40}, "drafts token 58, and the target has 40"),
    ],
)
def test_heads_of_another_target_are_refused(tmp_path, changes, what):
    save_eagle(tmp_path, eagle3())
    with pytest.raises(ValueError, match=what):
        load_eagle(tmp_path, target_config(**changes))


def test_an_embedding_that_was_never_filled_is_refused(tmp_path):
    head = eagle3(own_embedding=True)
    torch.nn.init.constant_(head.embed_tokens.weight, torch.nan)
    save_eagle(tmp_path, head)
    with pytest.raises(ValueError, match=r"embed_tokens.weight is NaN"):
        load_eagle(tmp_path)


def test_a_head_with_biased_queries_only_is_read(tmp_path):
    head = eagle3()
    tensors, config = flat(head)
    biased = {
        f"midlayer.self_attn.{name}_proj.bias": torch.ones(rows) for name, rows in (("q", 32), ("k", 16), ("v", 16))
    }
    back = load_eagle(folder_of(tmp_path, tensors | biased, config), target_config())
    assert back.config.attention_bias
    assert not torch.equal(said(back), said(head))
    assert float(back.model.layers[0].self_attn.o_proj.bias.abs().max()) == 0


def test_weights_of_two_dtypes_become_one(tmp_path):
    head = eagle3()
    tensors, config = flat(head)
    mixed = tensors | {"fc.weight": tensors["fc.weight"].to(torch.bfloat16)}
    back = load_eagle(folder_of(tmp_path, mixed, config), target_config())
    assert {parameter.dtype for parameter in back.parameters()} == {torch.float32}


def test_frequencies_keep_their_precision_in_any_dtype(tmp_path):
    head = eagle3()
    before = head.model.rotary_emb.rotary.inv_freq.clone()
    head.to(torch.bfloat16)
    assert head.fc.weight.dtype == torch.bfloat16
    assert torch.equal(head.model.rotary_emb.rotary.inv_freq, before)


def test_loaded_heads_are_in_eval_mode_and_quiet(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    save_eagle(tmp_path, eagle3(), TrainedFor(num_layers=LAYERS))
    head = load_eagle(tmp_path, target_config())
    assert not head.training
    assert not any(parameter.requires_grad for parameter in head.parameters())
    assert VOCAB == head.config.vocab_size
    assert caplog.text == ""
