"""What cannot take a tree mask is refused with the reason; what is on neither list is probed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf

from draftsmith.infer.models import architectures
from draftsmith.infer.models.architectures import mask_plan, max_positions, prepare, probe, refusal, tree_error
from draftsmith.infer.models.masks import MaskPlan

SMALL = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 256}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (hf.T5Config(), "encoder-decoder"),
        (hf.BloomConfig(), "ALiBi"),
        (hf.MptConfig(), "ALiBi"),
        (hf.FalconConfig(alibi=True), "ALiBi"),
        (hf.MambaConfig(), "state-space"),
        (hf.JambaConfig(), "state-space"),
        (hf.RecurrentGemmaConfig(), "state-space"),
    ],
)
def test_what_cannot_take_a_tree_mask_is_refused_with_the_reason(config: Any, reason: str) -> None:
    reason_given = refusal(config)
    assert reason_given is not None
    assert reason in reason_given


def test_an_unknown_family_that_honours_tree_masks_is_probed_and_taken() -> None:
    model = hf.AutoModelForCausalLM.from_config(hf.OlmoConfig(**SMALL)).eval()
    assert model.config.model_type not in architectures.KNOWN
    prepare(model)


def test_an_unknown_family_with_its_own_windows_is_probed_beyond_them() -> None:
    config = hf.Olmo3Config(**SMALL, sliding_window=8, layer_types=["sliding_attention", "full_attention"])
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    assert tree_error(model, mask_plan(config)) < architectures.TOLERANCE
    assert tree_error(model, MaskPlan({"sliding_attention": None, "full_attention": None}, True)) > 0.01


def test_a_model_that_ignores_positions_is_refused_by_the_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planted fault: rotations by cache slot and not by position id."""
    from transformers.models.olmo import modeling_olmo

    true_forward = modeling_olmo.OlmoRotaryEmbedding.forward

    def by_slot(self: Any, x: torch.Tensor, position_ids: torch.Tensor, **kwargs: Any) -> Any:
        first = int(position_ids.min())
        slots = torch.arange(first, first + position_ids.shape[1])[None].expand_as(position_ids)
        return true_forward(self, x, slots, **kwargs)

    monkeypatch.setattr(modeling_olmo.OlmoRotaryEmbedding, "forward", by_slot)
    model = hf.AutoModelForCausalLM.from_config(hf.OlmoConfig(**SMALL)).eval()
    with pytest.raises(ValueError, match="does not honour a tree mask"):
        prepare(model)


def test_a_known_family_is_not_probed(monkeypatch: pytest.MonkeyPatch, make_model: Any) -> None:
    monkeypatch.setattr(architectures, "probe", lambda model: pytest.fail("probed"))
    prepare(make_model("llama"))


def test_the_probe_leaves_the_model_and_the_random_state_alone() -> None:
    model = hf.AutoModelForCausalLM.from_config(hf.OlmoConfig(**SMALL)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.random.get_rng_state()
    probe(model)
    assert torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_rotation_that_depends_on_the_length_of_the_call_limits_the_context() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    assert max_positions(hf.LlamaConfig(**SMALL, rope_parameters=rope)) == 64
    assert max_positions(hf.LlamaConfig(**SMALL)) == 256
    assert max_positions(hf.GPT2Config(n_positions=77)) == 77


def test_windows_reach_the_mask_of_their_own_layers() -> None:
    both = ["sliding_attention", "full_attention"]
    plan = mask_plan(hf.Gemma2Config(sliding_window=9, layer_types=both, num_hidden_layers=2))
    assert plan.windows == {"sliding_attention": 9, "full_attention": None}
    assert plan.by_kind
    assert mask_plan(hf.MistralConfig(sliding_window=5)).windows == {"sliding_attention": 5}
    assert not mask_plan(hf.MistralConfig(sliding_window=5)).by_kind
    assert mask_plan(hf.LlamaConfig()).windows == {"full_attention": None}
