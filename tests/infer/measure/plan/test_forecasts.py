"""A forecast priced with a survey: the draft's own shape, the loop's overhead, and batch sizes in between."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from tiny_folders import tiny_llama

from draftsmith.infer.costs.pass_costs import PassCost
from draftsmith.infer.measure.forecast.drafting import Drafting
from draftsmith.infer.measure.plan.forecasts import (
    batch_sizes,
    check_forecast,
    forecast_shapes,
    priced_forecast,
    with_forecast,
)
from draftsmith.infer.measure.plan.loop_timing import Overhead
from draftsmith.infer.measure.plan.ranking import Wish, report
from draftsmith.infer.measure.plan.shapes import CandidateShape, Size, SurveyRequest
from draftsmith.infer.measure.plan.survey import Survey
from draftsmith.infer.measure.plan.tables import plan_tables
from draftsmith.infer.measure.tables import show

MACHINE = {"device": "cpu", "name": "x", "cores": 1, "threads": 1, "torch": "2", "dtype": "float32"}
SIZE = Size(2, 1000, 1500, 400, 1900, 2000, 8, 950)


def row(draft, length):
    return {"draft": draft, "length": int(draft), "accepted_length": length, "context": 40.0,
            "accepted_length_interval": None}  # fmt: skip


RESULTS = {
    "kind": "forecast", "format": 1, "texts": 3, "tokens": 30, "sampling": {"temperature": 0.8, "top_k": 0, "top_p": 1},
    "drafters": {"a": {"token": [row("1", 1.7), row("3", 2.4)]}, "b": {"token": [row("3", 2.9)]}}, "trees": {},
    "shapes": {"a": {"layers": 1, "width": 32, "heads": 4}, "b": {"layers": 2, "width": 48, "heads": 4}},
}  # fmt: skip


@pytest.fixture
def found():
    shapes = forecast_shapes(RESULTS, tiny_llama().config)
    asked = with_forecast(SurveyRequest((1, 8), (0, 100), (2,), []), RESULTS, shapes, alone=True)
    passes = {
        "target": PassCost([1, 100], [10.0, 20.0], 0.01),
        "1x32": PassCost([1], [1.0]),
        "2x48x4": PassCost([1], [2.0]),
    }
    sizes = dict.fromkeys(passes, SIZE)
    return Survey(asked, passes, sizes, Overhead(0.5, 0.0, 0.1, 0.0), 1e6, MACHINE), shapes


def test_a_draft_is_timed_in_its_own_shape_and_at_its_own_sizes(found):
    survey, shapes = found
    assert shapes == {"a": CandidateShape(1, 32), "b": CandidateShape(2, 48, 4)}  # heads of 8 are the target's
    assert survey.asked.nodes == [1, 2, 3]
    beside = with_forecast(SurveyRequest((1,), (0,), (2,), [CandidateShape(5, 64)]), RESULTS, shapes, alone=False)
    assert beside.shapes == [CandidateShape(5, 64), *shapes.values()]


def test_lengths_are_priced_by_each_draft_s_passes_and_the_loop(found):
    priced = priced_forecast(*found[:1], RESULTS, found[1])
    assert [batch["batch_size"] for batch in priced["by_batch_size"]] == [1, 2, 4, 8]
    token = priced["by_batch_size"][0]["rules"]["token"]
    plain = 10 + 0.01 * 40 + 0.5
    cost = {"a1": 1.0 + 10 / 99 + 0.1, "a3": 3 * 1.0 + 30 / 99 + 0.3, "b3": 3 * 2.0 + 30 / 99 + 0.3}
    speeds = {"a1": 1.7 * plain / (plain + cost["a1"]), "a3": 2.4 * plain / (plain + cost["a3"])}
    speeds["b3"] = 2.9 * plain / (plain + cost["b3"])
    best = max(speeds, key=lambda key: speeds[key])
    assert token["drafter"] + token["draft"] == best == "b3"
    assert token["speedup"] == pytest.approx(speeds[best])
    longer = priced_forecast(*found[:1], RESULTS, found[1], context=4000)["by_batch_size"][0]
    assert longer["plain_tokens_per_s"] == pytest.approx(1 / (10 + 40 + 0.5))


def test_the_table_fits_80_columns(found):
    survey, shapes = found
    ranked = report(survey, Wish([Drafting.chain(2)], 50), 1000) | {
        "forecast": priced_forecast(survey, RESULTS, shapes)
    }
    file = io.StringIO()
    show(plan_tables(ranked), Console(file=file, width=80))
    assert max(map(len, file.getvalue().splitlines())) <= 80
    assert "What would pay, by batch size: forecast from 3 answers, 30 tokens" in file.getvalue()
    assert "a is 1x32, b is 2x48x4" in " ".join(file.getvalue().split())


def test_batch_sizes_lie_within_what_is_measured():
    assert batch_sizes([1, 8]) == [1, 2, 4, 8]
    assert batch_sizes([3, 40]) == [1, 2, 3, 4, 8, 16, 32, 40]


def test_answers_of_another_tokenizer_are_refused():
    check_forecast(RESULTS | {"tokenizer": "a"}, "a", "f.json", "T")
    check_forecast(RESULTS | {"tokenizer": "a"}, "", "f.json", "T")
    with pytest.raises(ValueError, match=r"f.json .* another tokenizer than that of T"):
        check_forecast(RESULTS | {"tokenizer": "a"}, "b", "f.json", "T")


def test_heads_of_a_forecast_are_timed_as_heads_beside_one_shape():
    results = {**RESULTS, "shapes": {"a": {"head": "medusa:4"}, "b": {"head": "eagle:50"}}}
    shapes = forecast_shapes(results, tiny_llama().config)
    assert list(map(str, shapes.values())) == ["medusa:4", "eagle:50"]
    given = SurveyRequest((1,), (0,), (2,), [CandidateShape(1, 32), CandidateShape(2, 32)])
    asked = with_forecast(given, results, shapes, alone=True)
    assert asked.timed == ["1x32", "medusa:4", "eagle:50"]
    passes = {name: PassCost([1], [1.0]) for name in ("target", *asked.timed)}
    survey = Survey(asked, passes, dict.fromkeys(passes, SIZE), Overhead(0, 0, 0, 0), 1e6, MACHINE)
    priced = priced_forecast(survey, results, shapes)
    (medusa, _), (eagle,) = (priced["drafters"][name]["token"][-2:] for name in "ab")
    assert medusa["predicted"][0]["step_s"] == pytest.approx(2.0)
    assert priced["drafters"]["a"]["token"][1]["predicted"][0]["step_s"] == pytest.approx(2.0)  # all heads at once
    assert eagle["predicted"][0]["step_s"] == pytest.approx(4.0)
