"""Stepping with a cache says what an unrolled pass says, and a switch that is read wrongly shows."""

from dataclasses import replace

import pytest
import torch
from head_folders import WIDTH, eagle3, randomised
from safetensors.torch import save_file

from draftsmith.recipes.studies.speculators.__main__ import SIZES
from draftsmith.recipes.studies.speculators.speed import OurSteps
from draftsmith.recipes.studies.speculators.stepping import stepped

PAIRS, STEPS = 7, 3
GENERATOR = torch.Generator().manual_seed(1)
FEATURES = torch.randn((PAIRS, 3 * WIDTH), generator=GENERATOR)
TOKENS = torch.randint(61, (PAIRS,), generator=GENERATOR)


def whole(head, upto, drafted):
    """The logits of the last of `drafted` pairs below the true pairs up to `upto`, without a cache."""
    states = head.joined(dict(zip(head.features, FEATURES.chunk(3, -1))))[: upto + 1]
    for step in range(drafted + 1):
        count = upto + 1 + step
        given = head.pairs(TOKENS[:count], states)[None]
        causal = torch.full((count, count), -1e9).triu(1)[None, None]
        places = torch.arange(count)[None]
        output = head(inputs_embeds=given, position_ids=places, attention_mask=causal)
        inner = head.model(given, places, None, causal)[0][0]
        states = torch.cat([states, (inner if head.design.norm_output else unnormed(head, given, places, causal))[-1:]])
    return output.logits[0, -1]


def unnormed(head, given, places, causal):
    norm, head.model.norm = head.model.norm, torch.nn.Identity()
    out = head.model(given, places, None, causal)[0][0]
    head.model.norm = norm
    return out


@pytest.mark.parametrize("switches", [{}, {"norm_output": True}, {"norm_before_residual": True, "fc_norm": True}])
def test_stepping_says_what_a_pass_without_a_cache_says(switches):
    head = randomised(eagle3(own_embedding=True, **switches), 3)
    with torch.no_grad():
        for step, logits in enumerate(stepped(head, FEATURES, TOKENS, STEPS)):
            assert len(logits) == PAIRS - step
            expected = torch.stack([whole(head, i, step) for i in range(PAIRS - step)])
            assert (logits - expected).abs().max() < 1e-4 * expected.std()


@pytest.mark.parametrize("switch", ["norm_before_residual", "norm_output"])
def test_a_switch_that_is_read_wrongly_shows(switch):
    head = randomised(eagle3(own_embedding=True), 3)
    right = stepped(head, FEATURES, TOKENS, STEPS)[-1]
    head.design = replace(head.design, **{switch: True})
    head.model.layers[0].design = head.design
    wrong = stepped(head, FEATURES, TOKENS, STEPS)[-1]
    assert (right - wrong).abs().max() > 0.05 * right.std()


def test_a_training_step_that_is_timed_reaches_every_weight(tmp_path):
    save_file(
        {"features": torch.randn(12, 96), "last": torch.randn(12, 32), "tokens": torch.randint(61, (12,))},
        tmp_path / "inputs.safetensors",
    )
    sizes = SIZES | {"max_position_embeddings": 64}
    case = {"sizes": sizes, "inputs": str(tmp_path / "inputs.safetensors"), "layer_ids": [2, 4, 5],
            "draft_vocab_size": 20, "steps": 3, "seed": 0}  # fmt: skip
    ours = OurSteps(case)
    assert ours.seconds(1) > 0
    ours.objective(ours.draft, ours.batch).total.backward()
    assert all(weight.grad is not None and weight.grad.any() for weight in ours.draft.parameters())
