import pytest
import torch
from head_folders import SIZES, VOCAB, WIDTH, folder_of, randomised, target_config
from transformers import LlamaConfig

from draftsmith.infer.heads.folders import load_hydra, save_hydra
from draftsmith.infer.heads.hydra import HydraHeads
from draftsmith.infer.heads.hydra_folder import hydra_tensors
from draftsmith.infer.models.runner.entries import Entries
from draftsmith.infer.models.runner.masks import MaskPlan
from draftsmith.infer.models.runner.model_runner import ModelRunner

GENERATOR = torch.Generator().manual_seed(3)
STATES = torch.randn((5, WIDTH), generator=GENERATOR)
PATH = torch.randn((3, 5, WIDTH), generator=GENERATOR)


def heads(layers=1, prefix=False):
    config = LlamaConfig(**SIZES, rope_theta=777.0) if prefix else None
    return randomised(HydraHeads(WIDTH, VOCAB, 3, layers, config))


def said(module):
    with torch.no_grad():
        return torch.stack([module.logits(i, STATES, list(PATH[: i + 1])) for i in range(3)])


def states_of(module):
    with torch.no_grad():
        causal = torch.full((5, 5), -1e9).triu(1)[None, None]
        return module.prefix(
            inputs_embeds=STATES[None], position_ids=torch.arange(5)[None], attention_mask=causal
        ).logits[0]


def published(module, dropouts):
    """As the authors' code saves: with dropouts every block has an odd place, and the output comes second."""
    found = {}
    for name, one in hydra_tensors(module).items():
        kind, head, *rest = name.split(".")
        if dropouts and kind == "hydra_mlp":
            rest[0] = str(2 * int(rest[0]) + 1)
        elif dropouts and kind == "hydra_lm_head":
            rest.insert(0, "1")
        found[".".join([kind, head, *rest])] = one
    return found


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("dropouts", [False, True])
def test_published_heads_are_read(tmp_path, layers, dropouts):
    module = heads(layers)
    tensors = published(module, dropouts)
    assert ("hydra_lm_head.0.1.weight" in tensors) == dropouts
    back = load_hydra(folder_of(tmp_path, tensors, {"hydra_num_heads": 4}, "hydra_lm_head.pt"))
    assert torch.equal(said(back), said(module))


def test_later_blocks_that_are_one_module_are_read_as_often_as_they_come(tmp_path):
    module = heads(3)
    tensors = hydra_tensors(module)
    for name in list(tensors):
        if name.startswith("hydra_mlp.1.2."):
            tensors[name] = tensors[name.replace("hydra_mlp.1.2.", "hydra_mlp.1.1.")]
    back = load_hydra(folder_of(tmp_path, tensors, {}, "hydra_lm_head.pt"))
    one, two = back.heads[1].blocks[1], back.heads[1].blocks[2]
    assert torch.equal(one.linear.weight, two.linear.weight)


def test_a_later_block_adds_its_input_unchanged():
    head = heads(2).heads[0]
    given = torch.randn((2, WIDTH))
    block = head.blocks[1]
    expected = given + torch.nn.functional.silu(block.linear(given))
    assert torch.equal(block(given), expected)


@pytest.mark.parametrize("prefix", [False, True])
def test_saved_heads_come_back(tmp_path, prefix):
    module = heads(2, prefix)
    save_hydra(tmp_path, module)
    back = load_hydra(tmp_path, target_config())
    assert torch.equal(said(back), said(module))
    assert (back.prefix is not None) == prefix
    if prefix:
        assert back.prefix.config.rope_parameters == module.prefix.config.rope_parameters
        assert torch.equal(states_of(back), states_of(module))


def test_a_published_prefix_layer_has_the_targets_shape(tmp_path):
    module = heads(1, prefix=True)
    tensors = published(module, True) | {"prefix_embeding_layer.embed_tokens.weight": torch.zeros(VOCAB, WIDTH)}
    folder = folder_of(tmp_path, tensors, {"hydra_head_arch": "prefix-mlp"})
    with pytest.raises(ValueError, match="a prefix layer of the target's shape: load it together with the target"):
        load_hydra(folder)
    assert torch.equal(states_of(load_hydra(folder, target_config())), states_of(module))


def test_a_runner_keeps_the_prefix_layers_keys_and_values():
    module = heads(1, prefix=True)
    runner = ModelRunner(module.prefix, MaskPlan())
    row = object()
    runner.open(row)
    said_so_far = []
    for start, end in ((0, 3), (3, 4), (4, 5)):
        entries = Entries([0] * (end - start), list(range(-1, end - start - 1)), STATES[start:end])
        said_so_far.append(runner.forward([row], [entries]).logits_NV)
        runner.commit([row], [list(range(end - start))])
    assert (torch.cat(said_so_far) - states_of(module)).abs().max() < 1e-5


def test_heads_that_read_no_tokens_are_refused(tmp_path):
    tensors = hydra_tensors(heads())
    tensors["hydra_mlp.0.0.linear.weight"] = torch.zeros(WIDTH, WIDTH)
    with pytest.raises(ValueError, match="grounded_heads false"):
        load_hydra(folder_of(tmp_path, tensors, {}))


def test_missing_tensors_are_refused(tmp_path):
    tensors = hydra_tensors(heads(2))
    blocks = {name: one for name, one in tensors.items() if not name.startswith("hydra_mlp.2.1.")}
    with pytest.raises(ValueError, match="its heads have 1 to 2 blocks: tensors are missing"):
        load_hydra(folder_of(tmp_path / "a", blocks, {}))
    outputs = {name: one for name, one in tensors.items() if not name.startswith("hydra_lm_head.2.")}
    with pytest.raises(ValueError, match="are not of the same heads"):
        load_hydra(folder_of(tmp_path / "b", outputs, {}))
    biases = {name: one for name, one in tensors.items() if name != "hydra_lm_head.1.bias"}
    with pytest.raises(ValueError, match=r"lacks heads.1.lm_head.bias"):
        load_hydra(folder_of(tmp_path / "c", biases, {}))


def test_heads_of_another_target_are_refused(tmp_path):
    save_hydra(tmp_path, heads())
    with pytest.raises(ValueError, match="and the target's are 48 wide"):
        load_hydra(tmp_path, target_config(hidden_size=48))
