"""A plain stack gives, bit for bit, what transformers' layers give, and is used for nothing that may differ."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from draftsmith.infer.models.architectures import prepare
from draftsmith.infer.models.runner import model_runner, plain_stack
from draftsmith.infer.models.runner.entries import Entries
from draftsmith.infer.models.runner.model_runner import ModelRunner

LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
BOTH = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 16, "use_sliding_window": True}
MODELS = {
    "llama": ("llama", {}),
    "llama with biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3's rotations": ("llama", {"rope_parameters": LLAMA3}),
    "llama with gelu": ("llama", {"hidden_act": "gelu_pytorch_tanh"}),
    "mistral": ("mistral", {}),
    "qwen2": ("qwen2", {}),
    "qwen2 with two kinds of layers": ("qwen2", BOTH),
    "qwen3": ("qwen3", {}),
    "qwen3 with two kinds of layers": ("qwen3", BOTH),
}
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
TAPS = ("layer:0", "layer:1", "layer:2", "last")


def both_runners(model: Any, monkeypatch: pytest.MonkeyPatch, **given: Any) -> tuple[ModelRunner, ModelRunner]:
    """Over transformers' layers, and over plain ones."""
    plan = prepare(model)
    with monkeypatch.context() as patch:
        patch.setattr(model_runner, "plain_stack", lambda *given: None)
        theirs = ModelRunner(model, plan, **given)
    ours = ModelRunner(model, plan, **given)
    assert None not in ours._stacks
    assert not any(theirs._stacks)
    return theirs, ours


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_logits_and_states_are_transformers_to_the_bit(
    name: str, dtype: torch.dtype, make_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, changes = MODELS[name]
    model = make_model(kind, dtype, **changes)
    runners = both_runners(model, monkeypatch, buckets=(4, 16))
    texts = {"a": [3 + 7 * i % 50 for i in range(37)], "b": [5 + 11 * i % 50 for i in range(3)]}
    trees = [Entries([9, 4, 4, 8, 30], [-1, 0, 0, 1, 3]), Entries([6, 12], [-1, 0])]
    found: list[list[torch.Tensor]] = []
    for runner in runners:
        own: list[torch.Tensor] = []
        for row in texts:
            runner.open(row, 64)
        for states in runner.prefill(list(texts), list(texts.values()), TAPS):
            own += states.values()
        for kept in ([[0, 1, 3], [0]], [[0, 2], [0, 1]]):
            for wanted in (None, [1, 2], [0, 0]):
                runner.drop(list(texts))
                output = runner.forward(list(texts), trees, TAPS, wanted)
                own += [output.logits_NV, *output.taps.values()]
            runner.commit(list(texts), kept)
        table = model.get_input_embeddings().weight.detach()
        embedded = [Entries(tree.tokens, tree.parents, table[torch.tensor(tree.tokens)] * 2) for tree in trees]
        own.append(runner.forward(list(texts), embedded).logits_NV)
        found.append(own)
    assert len(found[0]) == len(found[1]) > 30
    assert any(len(one) for one in found[1])
    for theirs, ours in zip(*found):
        assert ours.dtype == theirs.dtype
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3"])
def test_blocks_of_a_sorted_draft_are_transformers_to_the_bit(
    kind: str, make_model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(kind, torch.float32)
    found = []
    for runner in both_runners(model, monkeypatch, exits=[1, 2]):
        runner.open("a", 40)
        runner.prefill(["a"], [[3 + 7 * i % 50 for i in range(21)]], blocks=2)
        states = runner.enter(["a"], [Entries([9, 4, 8], [-1, 0, 0])])
        deeper = runner.deepen(["a"], 1, [[0, 2]])
        found.append([*states, *deeper, runner.logits(deeper[0])])
    for theirs, ours in zip(*found):
        assert torch.equal(ours, theirs)


def test_a_norm_that_is_off_would_be_seen(make_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = both_runners(make_model("llama", torch.float32), monkeypatch)
    ours._stacks[0].layers[1].between.epsilon *= 1.5
    logits = []
    for runner in (theirs, ours):
        runner.open("a", 8)
        logits.append(runner.forward(["a"], [Entries.chain([5, 6])]).logits_NV)
    assert not torch.equal(*logits)


@pytest.mark.parametrize("where", ["model.layers.1.mlp", "model.layers.0.self_attn.q_proj", "lm_head", "model"])
def test_a_hook_is_called_whenever_it_was_set(where: str, make_model: Any) -> None:
    model = make_model("llama", torch.float32)
    runner = ModelRunner(model, prepare(model))
    runner.open("a", 8)

    def logits() -> torch.Tensor:
        runner.drop(["a"])
        return runner.forward(["a"], [Entries.chain([5, 6, 7])]).logits_NV

    plain, called = logits(), []
    hook = model.get_submodule(where).register_forward_hook(lambda module, given, output: called.append(output))
    assert torch.equal(logits(), plain)
    assert len(called) == 1
    hook.remove()
    assert torch.equal(logits(), plain)
    assert len(called) == 1


def with_another_layer(model: Any) -> None:
    class Scaled(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    old = model.model.layers[0].mlp.down_proj
    model.model.layers[0].mlp.down_proj = Scaled(old.in_features, old.out_features, bias=False).to(old.weight.dtype)


def with_an_adapter(model: Any) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), model)


def with_a_norm_of_its_own(model: Any) -> None:
    norm = model.model.norm
    norm.forward = lambda states: states * norm.weight


def in_training(model: Any) -> None:
    model.train()


@pytest.mark.parametrize("change", [with_another_layer, with_an_adapter, with_a_norm_of_its_own, in_training])
def test_a_model_that_was_changed_runs_as_it_is(change: Any, make_model: Any) -> None:
    model = make_model("llama", torch.float32)
    assert plain_stack.plain_stack(model) is not None
    change(model)
    assert plain_stack.plain_stack(model) is None
    if change is not in_training:
        runner = ModelRunner(model, prepare(make_model("llama", torch.float32)))
        runner.open("a", 8)
        ids = [5, 6, 7]
        with torch.inference_mode():
            wanted = model(torch.tensor([ids]), use_cache=False).logits[0]
        assert (runner.forward(["a"], [Entries.chain(ids)]).logits_NV - wanted).abs().max() < 1e-4


def test_other_families_and_classes_of_ones_own_run_as_they_are(make_model: Any) -> None:
    for kind in ("phi3", "gemma2", "mixtral", "gpt_neox"):
        assert plain_stack.plain_stack(make_model(kind)) is None
    model = copy.copy(make_model("llama"))
    model.__class__ = type("LlamaForCausalLM", (type(model),), {"__module__": "mine"})
    assert plain_stack.plain_stack(model) is None
