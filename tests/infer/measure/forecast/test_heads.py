"""Heads are forecast as the engine decodes with them: greedy chains and trees step by step, drawn ones in the mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import tiny_heads as tiny
import torch
from tiny_eagle import fitted_eagle, planted, tiny_eagle, tiny_mtp
from tiny_models import tiny_model

from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.costs.pass_costs import Costs, PassCost
from draftsmith.infer.drafters import MTP, Eagle, Hydra, Medusa
from draftsmith.infer.drafters.controls import Empty
from draftsmith.infer.drafters.heads import prefixed_states, state_reader
from draftsmith.infer.drafters.lm_drafter import LMDrafter
from draftsmith.infer.engine.engine import Engine
from draftsmith.infer.engine.logprobs import NotingRule
from draftsmith.infer.measure.bootstrap import difference_interval
from draftsmith.infer.measure.forecast.drafting import Drafting
from draftsmith.infer.measure.forecast.drafts import check_draws, check_target
from draftsmith.infer.measure.forecast.forecast import Forecast
from draftsmith.infer.measure.forecast.texts import DrawnText
from draftsmith.infer.models.hf_target import HFTarget

NEW = 24
GREEDY, DRAWN = Settings(), Settings(temperature=0.9, seed=4)
Made = tuple[HFTarget, Callable[..., LMDrafter]]


def make_rows(settings: Settings, vocab: int, count: int = 8) -> list[Row]:
    return [Row(str(i), [(7 * i + 3 * j) % vocab for j in range(2 + i)], settings, Stops(NEW - i % 3))
            for i in range(count)]  # fmt: skip


def decode(target: HFTarget, drafter: Any, settings: Settings, vocab: int, count: int = 8) -> tuple[Any, Any]:
    """The answers, and the texts with their log-probabilities."""
    drafter.bind(target)
    noting, rows = NotingRule(), make_rows(settings, vocab, count)
    with Engine(target, drafter, batch_size=4, rule=noting) as engine:
        done = engine.run(rows, strict=True)
    texts = []
    for row, one in zip(rows, done):
        prompt = row.ids[: row.prompt_tokens]
        logs = np.zeros(len(one.token_ids))
        if not settings.greedy:
            logs = np.array(noting.take(one.row, len(prompt), len(one.token_ids)))
        texts.append(DrawnText(one.row, prompt, one.token_ids, logs))
    return done, texts


@pytest.fixture(scope="module")
def fitted() -> dict[str, Made]:
    """Heads that are right often and wrong often, and their target."""
    target = HFTarget(tiny_model("llama"))
    _, texts = decode(target, Empty(), GREEDY, 61)
    whole = [[*text.prompt, *text.answer] for text in texts]
    medusa, hydra = (tiny.fitted(kind, target.model, whole[:4], 4) for kind in ("medusa", "hydra"))
    eagle = fitted_eagle(tiny_eagle(ids=range(3, 50)), target.model, whole[:4])
    return {
        "medusa": (target, lambda **given: Medusa(medusa, **given)),
        "hydra": (target, lambda **given: Hydra(hydra, **given)),
        "eagle": (target, lambda **given: Eagle(eagle, **given)),
    }


def planted_ones() -> dict[str, Made]:
    """Heads that are always right; MTP's is wrong where its first pair's embedding is blank."""
    target = HFTarget(tiny.planted_target())
    hydra, mtp = tiny.planted_hydra(4, "state", prefix=True), planted(tiny_mtp())
    return {
        "hydra++": (target, lambda **given: Hydra(hydra, **given)),
        "mtp": (target, lambda **given: MTP(mtp, **given)),
    }


@pytest.mark.parametrize("name", ["medusa", "hydra", "eagle", "hydra++", "mtp"])
def test_greedy_chains_and_trees_are_forecast_step_by_step(
    fitted: dict[str, Made], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_reader, "AHEAD_CHUNK", 5)
    monkeypatch.setattr(prefixed_states, "PREFILL_CHUNK", 7)
    target, make = {**fitted, **planted_ones()}[name]
    shared: dict[str, Any] = {"min_confidence": 0.0, "calibration": "none", "costs": "none"}
    vocab = target.vocab_size
    shapes = {3: {"num_draft_tokens": 3, "top_k": 1}, 2: {"num_draft_tokens": 2, "top_k": 1}}
    _, texts = decode(target, Empty(), GREEDY, vocab)
    run = Forecast(texts, GREEDY, [2, 3], trees=[Drafting.parse_tree("3-3-3")], max_new_tokens=NEW)
    drafter = make(**shared)
    drafter.bind(target)
    found = run.figures(drafter)
    (chains,), (trees,) = ([rows for (_, rule), rows in found.items() if (rule == "tree") == tree] for tree in (0, 1))
    accepted = set()
    wide = {"num_draft_tokens": 3, "top_k": 3, "nodes": 39, **({} if name == "medusa" else {"width": 9})}
    for figures, shape in [(chains[0], shapes[2]), (chains[1], shapes[3]), (trees[0], wide)]:
        # Answers have limits of their own, and the forecast has one: compare those that reach it.
        done, again = decode(target, make(**shared, **shape), GREEDY, vocab)
        assert [text.answer for text in again] == [text.answer for text in texts]
        longest = [i for i, text in enumerate(texts) if len(text.answer) == NEW]
        assert len(longest) >= 2
        for i in longest:
            assert figures.steps[i] == pytest.approx(len(done[i].traces), abs=1e-9)
        accepted |= {trace.accepted for one in done for trace in one.traces}
    assert max(accepted) >= 2
    if name in fitted:
        assert {0, 1, 2, 3} <= accepted
    assert len({token for text in texts for token in text.answer}) >= 8


@pytest.mark.parametrize("name", ["medusa", "hydra"])
def test_drawn_chains_are_forecast_within_the_interval(fitted: dict[str, Made], name: str) -> None:
    target, make = fitted[name]
    _, texts = decode(target, Empty(), DRAWN, 61, count=90)
    drafter = make(num_draft_tokens=3, top_k=1, sample=True, calibration="none", costs="none")
    done, _ = decode(target, drafter, Settings(temperature=0.9, seed=11), 61, count=90)
    longest = [i for i, text in enumerate(texts) if len(text.answer) == NEW]
    run = Forecast([texts[i] for i in longest], DRAWN, [3], ["token"], NEW)
    (figures,) = (rows[0] for rows in run.figures(drafter).values())
    tokens, steps = ([len(getattr(done[i], what)) for i in longest] for what in ("token_ids", "traces"))
    between = difference_interval(figures.tokens, figures.steps, tokens, steps, seed=0)
    assert between is not None
    assert between[0] <= 0 <= between[1]
    traces = [trace for one in done for trace in one.traces]
    assert max(trace.accepted for trace in traces) >= 2
    assert any(trace.accepted < trace.depth for trace in traces)
    assert 1.02 < figures.accepted_length < 3.5


def test_the_states_of_another_position_are_seen_in_the_forecast(
    fitted: dict[str, Made], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, make = fitted["medusa"]
    _, texts = decode(target, Empty(), GREEDY, 61)
    run = Forecast(texts, GREEDY, [3], max_new_tokens=NEW)
    drafter = make()
    drafter.bind(target)
    (right,) = (rows[0].accepted_length for rows in run.figures(drafter).values())
    own = type(drafter.reader.states).along  # type: ignore[attr-defined]
    shifted = lambda self, states_TH: own(self, states_TH).roll(1, 0)  # noqa: E731
    monkeypatch.setattr(type(drafter.reader.states), "along", shifted)  # type: ignore[attr-defined]
    (wrong,) = (rows[0].accepted_length for rows in run.figures(drafter).values())
    assert wrong < right - 0.1


def results(made: Made, lengths: Sequence[int], costs: dict[str, PassCost], **given: Any) -> dict[str, Any]:
    target, make = made
    _, texts = decode(target, Empty(), GREEDY, target.vocab_size)
    drafter = make()
    drafter.bind(target)
    run = Forecast(texts, GREEDY, lengths, costs=Costs(costs), batch_sizes=[1], **given)
    return run.results({"mine": drafter})


def test_a_forecast_is_priced_with_the_passes_that_heads_make(fitted: dict[str, Made]) -> None:
    target = PassCost([1, 64], [1.0, 4.0])
    found = results(fitted["medusa"], [1, 3], {"target": target, "medusa": PassCost([1], [0.2])})
    rows = found["drafters"]["mine"]["token"]
    # All heads are one pass.
    assert [row["predicted"][0]["step_s"] for row in rows] == pytest.approx([1 + 3 / 63 + 0.2, 1 + 9 / 63 + 0.2])
    costs = {"target": target, "hydra": PassCost([1], [0.2]), "hydra prefix": PassCost([1], [0.5])}
    rows = results(planted_ones()["hydra++"], [3], costs)["drafters"]["mine"]["token"]
    # One pass per level, and one of the prefix layer over what was committed.
    assert rows[0]["predicted"][0]["step_s"] == pytest.approx(1 + 9 / 63 + 3 * 0.2 + 0.5)


def test_chains_and_trees_deeper_than_the_heads_are_left_out_or_refused(fitted: dict[str, Made]) -> None:
    costs = {"target": PassCost([1], [1.0]), "medusa": PassCost([1], [0.1])}
    rows = results(fitted["medusa"], [2, 4, 5, 12], costs)["drafters"]["mine"]["token"]
    assert [row["length"] for row in rows] == [2, 4]
    with pytest.raises(ValueError, match=r"mine drafts 4 tokens deep, one with each head, and chains of 6 are deeper"):
        results(fitted["medusa"], [6, 8], costs)
    with pytest.raises(ValueError, match=r"and trees 2-1-1-1-1 are deeper"):
        results(fitted["medusa"], [2], costs, trees=[Drafting.parse_tree("2-1-1-1-1")])


def test_a_head_without_its_target_is_refused_in_one_line(fitted: dict[str, Made]) -> None:
    drafter = check_draws("m", fitted["medusa"][1]())
    with pytest.raises(ValueError, match=r"m reads the target's states, which no text holds: give --target"):
        check_target("m", drafter)


def test_a_row_without_a_state_before_it_is_not_drafted(fitted: dict[str, Made]) -> None:
    target, make = fitted["hydra"]
    drafter = make()
    drafter.bind(target)
    first = next(iter(drafter.reader.ahead([5, 6, 7], 0, 2)))  # type: ignore[attr-defined]
    assert len(first) == 2
    assert torch.isneginf(first[0]).all()
