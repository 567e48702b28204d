"""Every model is probed: it gets the masks with which its trees come out right, or is refused with the reason."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from draftsmith.infer.models import probe
from draftsmith.infer.models.architectures import prepare, refusal, state_refusal
from draftsmith.infer.models.positions import max_positions
from draftsmith.infer.models.probe import TWIN_TOLERANCE, check_neighbours, probed_plan, tree_errors
from draftsmith.infer.models.runner.masks import MaskPlan
from draftsmith.infer.models.runner.model_runner import ModelRunner
from draftsmith.infer.models.twin import random_model, tiny_config, window_attributes

SMALL = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (hf.T5Config(), "encoder-decoder"),
        (hf.BloomConfig(), "ALiBi"),
        (hf.MptConfig(), "ALiBi"),
        (hf.FalconConfig(alibi=True), "ALiBi"),
    ],
)
def test_what_can_verify_no_drafts_is_refused_with_the_reason(config: Any, reason: str) -> None:
    reason_given = refusal(config)
    assert reason_given is not None
    assert reason in reason_given


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (hf.MambaConfig(), "state-space"),
        (hf.JambaConfig(), "state-space"),
        (hf.RecurrentGemmaConfig(), "state-space"),
    ],
)
def test_what_cannot_take_a_tree_mask_is_refused_with_the_reason(config: Any, reason: str) -> None:
    assert refusal(config) is None, "chains may do"
    reason_given = state_refusal(config)
    assert reason_given is not None
    assert reason in reason_given


BOTH = ["sliding_attention", "full_attention"]


def test_a_family_with_windows_is_probed_beyond_them() -> None:
    config = tiny_config(hf.Olmo3Config(**SMALL, sliding_window=100, layer_types=BOTH))
    model = random_model(config, hf.Olmo3ForCausalLM)
    right = MaskPlan({"sliding_attention": 8, "full_attention": None}, by_kind=True)
    assert max(tree_errors(model, right, (29, 43))) < TWIN_TOLERANCE
    for window in (None, 7, 9):
        wrong = MaskPlan({"sliding_attention": window, "full_attention": None}, by_kind=True)
        assert max(tree_errors(model, wrong, (29, 43))) > 10 * TWIN_TOLERANCE


@pytest.mark.parametrize(
    ("kind", "changes", "plan"),
    [
        ("llama", {}, MaskPlan()),
        ("mistral", {"sliding_window": 21}, MaskPlan({"sliding_attention": 21})),
        ("phi3", {"sliding_window": 21}, MaskPlan({"sliding_attention": 21})),
        ("mixtral", {"sliding_window": 21}, MaskPlan({"sliding_attention": 21})),
        ("qwen2", {"sliding_window": 21}, MaskPlan({"full_attention": None}, by_kind=True)),
        (
            "qwen2",
            {"sliding_window": 21, "layer_types": BOTH},
            MaskPlan({"sliding_attention": 21, "full_attention": None}, by_kind=True),
        ),
        ("gemma2", {}, MaskPlan({"sliding_attention": 16, "full_attention": None}, by_kind=True)),
    ],
)
def test_the_masks_are_those_that_the_family_follows(
    make_model: Any, kind: str, changes: dict[str, Any], plan: MaskPlan
) -> None:
    assert prepare(make_model(kind, **changes)) == plan


@pytest.mark.parametrize(
    ("kind", "changes", "named"),
    [
        ("llama", {"sliding_window": 16}, "sliding_window=16"),
        ("gpt2", {"sliding_window": 16}, "sliding_window=16"),
        ("gpt_neox", {"sliding_window": 16}, "sliding_window=16"),
        ("opt", {"sliding_window": 16}, "sliding_window=16"),
        ("mistral", {"layer_types": BOTH}, "sliding_window=16 and layer_types"),
        ("phi3", {"layer_types": BOTH}, "layer_types"),
        ("mixtral", {"layer_types": BOTH}, "layer_types"),
        ("gemma3", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
    ],
)
def test_a_config_that_transformers_itself_does_not_follow_is_refused_by_name(
    make_model: Any, kind: str, changes: dict[str, Any], named: str
) -> None:
    with pytest.raises(ValueError, match=f"; check {named} in its config.json$"):
        prepare(make_model(kind, **changes))


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (hf.DogeConfig(), "takes no tree mask beyond keep_window_size=2048"),
        (hf.DeepseekV32Config(), "cannot decode trees"),
        (hf.RoFormerConfig(is_decoder=True), "does not honour a tree mask"),
        (hf.OpenAIGPTConfig(), "takes no cache"),
    ],
)
def test_a_family_whose_trees_come_out_wrong_is_refused(config: Any, reason: str) -> None:
    with torch.device("meta"):
        model = hf.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=reason):
        probed_plan(model)


@pytest.mark.filterwarnings("ignore:torch.ao.quantization:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_a_model_whose_rows_depend_on_their_neighbours_is_refused(make_model: Any) -> None:
    model = make_model("llama", torch.float32)
    prepare(model)
    prepare(make_model("llama", torch.bfloat16))
    prepare(make_model("mixtral", torch.bfloat16))
    quantised = torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear})
    with pytest.raises(ValueError, match=r"depend on the other tokens in the same pass.*dynamic quantisation"):
        prepare(quantised)


@pytest.mark.parametrize("vocab", [2, 3, 7, 40])
@pytest.mark.parametrize("positions", [8, 24])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral"])
def test_few_tokens_and_few_positions_are_probed_as_far_as_they_go(
    make_model: Any, kind: str, vocab: int, positions: int
) -> None:
    name = "n_positions" if kind == "gpt2" else "max_position_embeddings"
    special = dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id"))
    prepare(make_model(kind, torch.float32, vocab_size=vocab, **{name: positions}, **special))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_are_left_to_the_step(make_model: Any, value: float) -> None:
    """The step names the row and the position."""
    model = make_model("llama", torch.float32)
    with torch.no_grad():
        model.lm_head.weight[3] = value
    prepare(model)


def test_only_a_tree_whose_logits_are_no_numbers_is_refused(make_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama", torch.float32)
    plan = prepare(model)
    forward = ModelRunner.forward

    def broken(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits_NV = output.logits_NV * float("nan")
        return output

    monkeypatch.setattr(ModelRunner, "forward", broken)
    with pytest.raises(ValueError, match="depend on the other tokens in the same pass"):
        check_neighbours(model, plan)


def test_a_token_that_the_head_bans_is_no_fault(make_model: Any) -> None:
    model = make_model("gpt_neox", torch.float32)
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(head.out_features))
    with torch.no_grad():
        head.bias[3] = -float("inf")
    prepare(model)


def test_a_model_that_ignores_positions_is_refused_by_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault: rotations by cache slot and not by position id."""
    from transformers.models.olmo import modeling_olmo

    true_forward = modeling_olmo.OlmoRotaryEmbedding.forward

    def by_slot(self: Any, x: torch.Tensor, position_ids: torch.Tensor, **kwargs: Any) -> Any:
        first = int(position_ids.min())
        slots = torch.arange(first, first + position_ids.shape[1])[None].expand_as(position_ids)
        return true_forward(self, x, slots, **kwargs)

    monkeypatch.setattr(modeling_olmo.OlmoRotaryEmbedding, "forward", by_slot)
    monkeypatch.setattr(probe, "_found", {})
    model = hf.AutoModelForCausalLM.from_config(hf.OlmoConfig(**SMALL)).eval()
    with pytest.raises(ValueError, match="does not honour a tree mask"):
        prepare(model)


def test_a_config_is_probed_once(monkeypatch: pytest.MonkeyPatch, make_model: Any) -> None:
    prepare(make_model("llama"))
    monkeypatch.setattr(probe, "tiny_twin", lambda model: pytest.fail("probed again"))
    prepare(make_model("llama"))
    with pytest.raises(pytest.fail.Exception, match="probed again"):
        prepare(make_model("llama", rms_norm_eps=1e-4))


def test_the_probe_leaves_the_model_and_the_random_state_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe, "_found", {})
    model = hf.AutoModelForCausalLM.from_config(hf.OlmoConfig(**SMALL)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    probed_plan(model)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_rotation_that_depends_on_the_length_of_the_call_limits_the_context() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    assert max_positions(hf.LlamaConfig(**SMALL, rope_parameters=rope)) == 64
    assert max_positions(hf.LlamaConfig(**SMALL)) == 256
    assert max_positions(hf.GPT2Config(n_positions=77)) == 77
    assert max_positions(hf.XLNetConfig()) == 1 << 20, "its max_position_embeddings is -1: no limit"


def test_windows_and_the_like_are_found_by_name() -> None:
    assert window_attributes(hf.GPTNeoConfig(window_size=99)) == {"window_size": 99}
    assert window_attributes(hf.DogeConfig(keep_window_size=77)) == {"keep_window_size": 77}
    assert window_attributes(hf.Qwen2MoeConfig(num_local_experts=8, sliding_window=None)) == {}
