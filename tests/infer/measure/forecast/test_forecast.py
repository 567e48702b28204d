"""The forecast against the engine: exact where the draft is its target, within the interval where it is not."""

from __future__ import annotations

import numpy as np
import pytest
from tiny_folders import tiny_llama

from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.costs.pass_costs import Costs, PassCost
from draftsmith.infer.drafters import SD2, SmallLM
from draftsmith.infer.drafters.controls import Empty
from draftsmith.infer.engine.engine import Engine
from draftsmith.infer.engine.logprobs import NotingRule
from draftsmith.infer.measure.bootstrap import difference_interval
from draftsmith.infer.measure.forecast.drafts import bind_draft
from draftsmith.infer.measure.forecast.forecast import Forecast
from draftsmith.infer.measure.forecast.texts import DrawnText
from draftsmith.infer.models.hf_target import HFTarget

DRAWN = Settings(temperature=0.8, seed=1)
STOPS = Stops(24, frozenset(range(0, 300, 9)))


def decode(target, drafter, prompts, settings=DRAWN, rule=None):
    drafter.bind(target)
    noting = NotingRule() if rule is None else NotingRule(rule)
    rows = [Row(str(i), prompt, settings, STOPS) for i, prompt in enumerate(prompts)]
    with Engine(target, drafter, batch_size=16, rule=noting) as engine:
        done = engine.run(rows, strict=True)
    texts = [
        DrawnText(one.row, prompt, one.token_ids, np.array(noting.take(one.row, len(prompt), len(one.token_ids))))
        for prompt, one in zip(prompts, done)
    ]
    return done, texts


@pytest.mark.parametrize("context", [512, 14])
def test_a_draft_that_is_its_target_is_forecast_step_by_step(context):
    """Every draft is accepted whole, so steps and drafted tokens must be the engine's: limits, end tokens, contexts."""
    prompts = [[5, 6, 7, 10 + i] for i in range(16)]
    model = tiny_llama(max_position_embeddings=context)
    target = HFTarget(tiny_llama())
    done, texts = decode(target, SmallLM(model, num_draft_tokens=5, top_k=1, sample=True, costs="none"), prompts)
    assert {one.stop for one in done} == {"eos", "max_new_tokens"}
    run = Forecast(texts, DRAWN, [5], max_new_tokens=STOPS.max_new_tokens)
    for found in run.figures(SmallLM(model)).values():
        assert found[0].steps == pytest.approx([len(one.traces) for one in done], abs=1e-3)
        traces = [trace for one in done for trace in one.traces]
        assert found[0].nodes_per_step == pytest.approx(sum(t.nodes for t in traces) / len(traces), abs=1e-3)
        assert found[0].context == pytest.approx(sum(t.context for t in traces) / len(traces), abs=0.02)
    assert max(trace.accepted for trace in traces) == 5


@pytest.mark.parametrize("length", [2, 6])
def test_a_draft_that_is_often_wrong_is_forecast_within_the_interval(shake, length):
    prompts = [[5, 6, 7, 10 + i] for i in range(60)]
    model = tiny_llama()
    target, draft = HFTarget(model), shake(model, 0.3)
    _, texts = decode(target, Empty(), prompts, Settings(temperature=0.8, seed=2))
    drafter = SmallLM(draft, num_draft_tokens=length, top_k=1, sample=True, costs="none")
    done, _ = decode(target, drafter, prompts, rule="token")
    run = Forecast(texts, DRAWN, [length], ["token"], STOPS.max_new_tokens)
    found = run.figures(drafter)["small", "token"][0]
    tokens, steps = [len(one.token_ids) for one in done], [len(one.traces) for one in done]
    between = difference_interval(found.tokens, found.steps, tokens, steps, seed=0)
    assert between is not None
    assert between[0] <= 0 <= between[1]
    traces = [trace for one in done for trace in one.traces]
    assert max(trace.accepted for trace in traces) >= 2
    assert any(trace.accepted < trace.depth for trace in traces)
    assert len({token for one in done for token in one.token_ids}) >= 8
    assert 1.15 < found.accepted_length < length + 0.8


def test_results_have_every_exit_rule_and_length_and_the_best_of_each_batch_size():
    model = tiny_llama(num_hidden_layers=4)
    rng = np.random.default_rng(0)
    texts = [DrawnText(str(i), [1, 2], rng.integers(300, size=12), rng.normal(-3, 1, 12)) for i in range(9)]
    passes = {"target": PassCost([1, 64], [1.0, 4.0]), "sd2:2": PassCost([1], [0.05]), "sd2:4": PassCost([1], [0.5])}
    run = Forecast(texts, Settings(1.0), [1, 3], costs=Costs(passes), batch_sizes=[1, 16])
    drafter = SD2(model, exits=[2, 4])
    bind_draft(drafter, None, None)
    found = run.results({"s": drafter})
    assert list(found["drafters"]) == ["s:2", "s:4"]
    rows = found["drafters"]["s:4"]["block"]
    assert [row["length"] for row in rows] == [1, 3]
    low, high = rows[1]["accepted_length_interval"]
    assert low <= rows[1]["accepted_length"] <= high
    one = rows[1]["predicted"][0]
    # Three passes of both blocks, and the target's over four tokens.
    assert one["step_s"] == pytest.approx(3 * 0.55 + 1 + 3 * 3 / 63)
    assert one["speedup"] == pytest.approx(rows[1]["accepted_length"] / one["step_s"])
    best = found["best"][0]
    everything = [
        cell["predicted"][0]["speedup"]
        for rules in found["drafters"].values()
        for row in rules.values()
        for cell in row
    ]
    assert best["speedup"] == max(everything)
    assert best["rule"] in ("block", "token")


@pytest.mark.parametrize(("lengths", "limit"), [([], None), ([0], None), ([2], 2)])
def test_lengths_and_limits_that_cannot_be_are_refused(lengths, limit):
    text = DrawnText("a", [1], [1, 2, 3], np.zeros(3))
    with pytest.raises(ValueError, match=r"lengths of chains|more than max_new_tokens"):
        Forecast([text], Settings(1.0), lengths, max_new_tokens=limit)
