"""The draft's log-probabilities along a text: those of a plain forward pass, at every exit and up to its context."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tiny_folders import tiny_llama

from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.drafters import SD2, SmallLM, draft_reader
from draftsmith.infer.measure.forecast.drafts import check_draws, draft_scores
from draftsmith.retrieval import PromptLookup


def draft_logprobs(drafter, prompt, answer, settings):
    return {source: one.logprobs_TK[:, 0] for source, one in draft_scores(drafter, prompt, answer, settings).items()}


PROMPT, ANSWER = [5, 6, 7, 8], [(11 * i) % 290 for i in range(40)]
DRAWN = Settings(temperature=0.7, top_k=200)


def plain(model, exit: int, settings=DRAWN) -> np.ndarray:
    with torch.no_grad():
        states = model.model(torch.tensor([PROMPT + ANSWER]), output_hidden_states=True).hidden_states
        last = exit == model.config.num_hidden_layers  # transformers has normed it already
        state_TD = states[exit][0] if last else model.model.norm(states[exit][0])
        scores_TV = model.lm_head(state_TD).float()[len(PROMPT) - 1 : -1]
    for warper in settings.warpers():
        scores_TV = warper(None, scores_TV)
    return torch.log_softmax(scores_TV.double(), -1).gather(1, torch.tensor(ANSWER)[:, None])[:, 0].numpy()


@pytest.mark.parametrize("chunk", [7, 128])
def test_a_draft_model_s_are_those_of_one_forward_pass(chunk, monkeypatch):
    monkeypatch.setattr(draft_reader, "CHUNK", chunk)
    model = tiny_llama()
    found = draft_logprobs(SmallLM(model), PROMPT, ANSWER, DRAWN)
    assert list(found) == ["small"]
    assert found["small"] == pytest.approx(plain(model, 2), abs=1e-4)
    assert np.isneginf(found["small"]).any()  # what its top_k excludes
    assert np.isfinite(found["small"]).any()


@pytest.mark.parametrize("chunk", [7, 128])
def test_a_sorted_draft_has_them_at_every_exit(chunk, monkeypatch):
    monkeypatch.setattr(draft_reader, "CHUNK", chunk)
    model = tiny_llama(num_hidden_layers=4)
    found = draft_logprobs(SD2(model, exits=[1, 3, 4]), PROMPT, ANSWER, DRAWN)
    assert list(found) == ["sd2:1", "sd2:3", "sd2:4"]
    for exit in (1, 3, 4):
        assert found[f"sd2:{exit}"] == pytest.approx(plain(model, exit), abs=1e-4)


def test_nothing_is_drawn_beyond_the_draft_s_context_or_vocabulary():
    model = tiny_llama(max_position_embeddings=20)
    found = draft_logprobs(SmallLM(model), PROMPT, ANSWER, Settings(1.0))["small"]
    assert np.isfinite(found[: 20 - len(PROMPT)]).all()
    assert np.isneginf(found[20 - len(PROMPT) :]).all()
    assert len(found) == len(ANSWER)
    long = draft_logprobs(SmallLM(model), list(range(30)), ANSWER, Settings(1.0))["small"]
    assert np.isneginf(long).all()
    drafter = SmallLM(tiny_llama())
    drafter.reader.vocab_size = 200  # of a target that has no more
    small = draft_logprobs(drafter, PROMPT, [5, 250, 6], Settings(1.0))["small"]
    assert np.isneginf(small).tolist() == [False, True, False]


def test_a_retrieval_drafter_is_sent_to_replay():
    with pytest.raises(ValueError, match=r"mine draws nothing .*draftsmith replay"):
        check_draws("mine", PromptLookup())
