import pytest
import torch
from head_folders import LAYERS, VOCAB, WIDTH, folder_of, randomised, target_config

from draftsmith.infer.heads.folders import load_medusa, save_medusa
from draftsmith.infer.heads.medusa import MedusaHeads
from draftsmith.infer.heads.medusa_folder import medusa_tensors

STATES = torch.randn((5, WIDTH), generator=torch.Generator().manual_seed(3))
PUBLISHED = {"medusa_num_heads": 2, "medusa_num_layers": 1, "base_model_name_or_path": "owner/base"}


def heads(layers=1, count=5):
    return randomised(MedusaHeads(WIDTH, VOCAB, count, layers))


@pytest.mark.parametrize("layers", [1, 2])
def test_saved_heads_come_back(tmp_path, layers):
    module = heads(layers)
    save_medusa(tmp_path, module)
    back = load_medusa(tmp_path, target_config())
    assert back.num_layers == layers
    assert torch.equal(back(STATES), module(STATES))


@pytest.mark.parametrize("weights", ["medusa_lm_head.pt", "medusa_lm_head.safetensors"])
def test_heads_are_counted_where_the_config_says_another_number(tmp_path, weights):
    module = heads()
    back = load_medusa(folder_of(tmp_path, medusa_tensors(module), PUBLISHED, weights))
    assert len(back.heads) == 5
    assert torch.equal(back(STATES), module(STATES))


def test_a_folder_without_a_config_is_read(tmp_path):
    assert len(load_medusa(folder_of(tmp_path, medusa_tensors(heads()), None, "medusa_lm_head.pt")).heads) == 5


def test_of_a_whole_model_the_heads_are_read_and_its_base_is_warned_of(tmp_path, caplog):
    module = heads()
    whole = {f"medusa_head.{name}": one for name, one in medusa_tensors(module).items()}
    whole |= {"lm_head.weight": torch.zeros(VOCAB, WIDTH), "model.layers.0.mlp.up_proj.weight": torch.zeros(3, 3)}
    back = load_medusa(folder_of(tmp_path, whole, PUBLISHED))
    assert torch.equal(back(STATES), module(STATES))
    assert "holds a whole model" in caplog.text


@pytest.mark.parametrize("bias", [True, False])
def test_vllms_names_are_read(tmp_path, bias):
    module = heads(layers=2)
    if not bias:
        for name, parameter in module.named_parameters():
            if name.endswith("linear.bias"):
                parameter.data.zero_()
    names = {}
    for name, one in module.state_dict().items():
        _, head, kind, *rest = name.split(".")
        new = f"lm_heads.{head}.weight" if kind == "lm_head" else f"blocks.{head}.layers.{rest[0]}.{rest[2]}"
        names[new] = one
    if not bias:
        names = {name: one for name, one in names.items() if not name.endswith("bias")}
    back = load_medusa(folder_of(tmp_path, names, {"medusa_fc_bias": bias}))
    assert torch.equal(back(STATES), module(STATES))


def test_heads_that_lost_a_tensor_are_refused(tmp_path):
    tensors = medusa_tensors(heads())
    tensors.pop("3.0.linear.bias")
    with pytest.raises(ValueError, match=r"lacks heads.3.blocks.0.linear.bias"):
        load_medusa(folder_of(tmp_path, tensors, PUBLISHED))


def test_heads_of_another_target_are_refused(tmp_path):
    save_medusa(tmp_path, heads())
    with pytest.raises(ValueError, match="reads states of width 32, and the target's are 48 wide"):
        load_medusa(tmp_path, target_config(hidden_size=48))
    with pytest.raises(ValueError, match="drafts 61 tokens, and the target has 50"):
        load_medusa(tmp_path, target_config(vocab_size=50))
    assert target_config().num_hidden_layers == LAYERS
