"""Log-probabilities of committed tokens, noted or by teacher forcing, are those of a plain forward pass."""

from __future__ import annotations

import pytest
import torch
from tiny_folders import tiny_llama

from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.drafters import SmallLM
from draftsmith.infer.engine.engine import Engine
from draftsmith.infer.engine.logprobs import NotingRule, score_texts
from draftsmith.infer.models.hf_target import HFTarget

PROMPTS = [[5, 6, 7], [20, 21, 20, 21, 9], list(range(30, 50))]
DRAWN = Settings(temperature=0.8, top_p=0.9, repetition_penalty=1.1, seed=3)


def plain(model, prompt, answer, settings) -> list[float]:
    """One pass of the bare model; transformers' own processors one token at a time."""
    ids = [*prompt, *answer]
    with torch.no_grad():
        logits_TV = model(torch.tensor([ids])).logits[0].float()
    found = []
    for at in range(len(prompt), len(ids)):
        scores_1V = logits_TV[at - 1][None]
        shaped = [*settings.processors([], len(prompt), torch.device("cpu")), *settings.warpers()]
        for one in shaped:
            scores_1V = one(torch.tensor([ids[:at]]), scores_1V)
        found.append(float(torch.log_softmax(scores_1V[0].double(), -1)[ids[at]]))
    return found


@pytest.mark.parametrize("sample", [False, True])
def test_tokens_are_noted_as_they_were_drawn_with_drafts_and_without_stops_beyond(shake, sample):
    model = tiny_llama()
    target = HFTarget(model)
    drafter = SmallLM(shake(model, 0.1), num_draft_tokens=5, top_k=1, sample=sample)
    drafter.bind(target)
    rule = NotingRule()
    rows = [Row(str(i), prompt, DRAWN, Stops(23)) for i, prompt in enumerate(PROMPTS)]
    with Engine(target, drafter, batch_size=2, rule=rule) as engine:
        done = engine.run(rows, strict=True)
    assert max(trace.accepted for one in done for trace in one.traces) >= (2 if sample else 1)
    assert any(trace.depth > trace.accepted for one in done for trace in one.traces)
    for prompt, one in zip(PROMPTS, done):
        noted = rule.take(one.row, len(prompt), len(one.token_ids))
        assert noted == pytest.approx(plain(model, prompt, one.token_ids, DRAWN), abs=1e-4)
        assert min(noted) < -0.1


def test_known_texts_are_scored_in_several_steps_as_in_one_pass():
    model = tiny_llama()
    texts = {str(i): (prompt, [(7 * i + 3 * at) % 300 for at in range(150)]) for i, prompt in enumerate(PROMPTS)}
    settings = Settings(temperature=0.8, repetition_penalty=1.1)
    found = score_texts(HFTarget(model), texts, settings, batch_size=2)
    for key, (prompt, answer) in texts.items():
        assert found[key] == pytest.approx(plain(model, prompt, answer, settings), abs=1e-3)


def test_a_token_that_truncation_excludes_has_probability_0():
    scored = score_texts(HFTarget(tiny_llama()), {"a": (PROMPTS[0], list(range(40)))}, Settings(1.0, top_k=2))
    assert -float("inf") in scored["a"]
