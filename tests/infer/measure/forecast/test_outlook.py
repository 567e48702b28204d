"""What would pay at which batch size: chosen from every rule, priced again, and read from files."""

from __future__ import annotations

import json

import pytest

from draftsmith.infer.costs.pass_costs import PassCost
from draftsmith.infer.measure.forecast.drafting import Drafting, step_seconds
from draftsmith.infer.measure.forecast.outlook import (
    TREES,
    Outlook,
    fastest,
    load_forecast,
    outlook,
    priced,
)


def row(draft, length, **more):
    interval = [length - 0.1, length + 0.1]
    return {"draft": draft, "accepted_length": length, "accepted_length_interval": interval, "context": 100.0} | more


def results(**changes):
    """A drawn chain that block verifies better, and a tree that is better and larger."""
    return {
        "format": 1, "kind": "forecast", "texts": 9, "tokens": 90, "costs": None, "modelled": "", "best": None,
        "sampling": {"temperature": 0.8, "top_k": 0, "top_p": 0.9}, "by_batch_size": [],
        "drafters": {"small": {
            "token": [row("2", 1.9), row("8", 2.5)],
            "block": [row("2", 2.0), row("8", 3.1)],
        }},
        "trees": {"small": [row("4-2", 2.4, nodes=12, depth=2, by="ranks", covered=[0.5, 0.3])]},
        "shapes": {"small": {"layers": 2, "width": 64, "heads": 4}},
    } | changes  # fmt: skip


def price(name, drafting, rows, context):
    """A pass of the target takes 10 s and 1 s a token beyond 32, of the draft 1 s."""
    assert (name, context) == ("small", 100.0)
    return 10.0, 10.0 + max(rows * (drafting.nodes + 1) - 32, 0) + len(drafting.passes)


def test_each_rule_has_its_fastest_draft_at_each_batch_size():
    found = priced(results(), [1, 8], price)
    one, eight = found["by_batch_size"]
    assert {rule: cell["draft"] for rule, cell in one["rules"].items()} == {"token": "2", "block": "8", TREES: "4-2"}
    assert one["rules"]["token"]["speedup"] == pytest.approx(1.9 / 1.2)
    assert one["rules"]["block"]["speedup"] == pytest.approx(3.1 / 1.8)
    assert one["rules"][TREES]["speedup"] == pytest.approx(2.4 / 1.2)
    assert one["plain_tokens_per_s"] == pytest.approx(0.1)
    assert one["rules"][TREES]["tokens_per_s"] == pytest.approx(2.4 / 12)
    assert one["rules"][TREES]["speedup_interval"] == pytest.approx([2.3 / 1.2, 2.5 / 1.2])
    # Eight rows: 24 tokens cost no more than one, 72 and 104 do.
    assert {rule: cell["draft"] for rule, cell in eight["rules"].items()} == {"token": "2", "block": "2", TREES: "4-2"}
    assert eight["rules"][TREES]["speedup"] == pytest.approx(24 / (12 + 72))
    assert [(cell["batch_size"], cell["rule"]) for cell in found["best"]] == [(1, TREES), (8, "block")]
    assert found["best"] == fastest(found["by_batch_size"])
    assert outlook(found, [1, 8]) == found["by_batch_size"]


def test_a_step_s_price_is_all_its_passes_behind_what_came_before():
    """A chain of two through both blocks, then a tree whose second pass has four tokens a row, for three rows."""
    target, low = PassCost([1, 100], [1.0, 10.9], per_seen=0.01), PassCost([1, 100], [0.1, 10.0], per_seen=0.001)
    found = step_seconds(target, [low, low], Drafting.chain(2), 1, 50, 0.5)
    assert found["draft_s"] == pytest.approx(2 * (0.1 + 0.05) + 2 * (0.1 + 0.051))
    assert found["verify_s"] == pytest.approx(1.2 + 0.5)
    assert found["step_s"] == pytest.approx(found["draft_s"] + found["verify_s"] + 0.5)
    tree = step_seconds(target, [low], Drafting.parse_tree("4-1"), 3, 50)
    assert tree["draft_s"] == pytest.approx(0.3 + 0.15 + 1.2 + 0.153)
    assert tree["verify_s"] == pytest.approx(3.6 + 1.5)
    assert step_seconds(target, (), None, 1, 0) == {"draft_s": 0, "verify_s": 1.0, "overhead_s": 0.0, "step_s": 1.0}


def test_files_of_forecast_and_plan_are_read(tmp_path):
    path, plan = tmp_path / "forecast.json", tmp_path / "plan.json"
    found = priced(results(costs="bench on a CPU"), [1, 8], price)
    path.write_text(json.dumps(found, indent=1))
    plan.write_text("a line before\n" + json.dumps({"batches": [], "forecast": found}) + "\n")
    assert load_forecast(path)["shapes"] == found["shapes"]
    for one in (path, plan):
        loaded = Outlook.load(one)
        assert loaded.batches == json.loads(json.dumps(found["by_batch_size"]))
        assert loaded.rules == ["token", "block", TREES]
        assert loaded.source == "9 answers, 90 tokens, drawn at temperature 0.8, top_p 0.9; costs: bench on a CPU"


@pytest.mark.parametrize(
    ("text", "problem"),
    [("", "no forecast"), ("[]", "no forecast"), ('{"by_batch_size": []}', "no forecast"), ("{", "no forecast"),
     (json.dumps(results()), "add --latency")],
)  # fmt: skip
def test_other_files_are_refused(tmp_path, text, problem):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=problem):
        Outlook.load(path)
    with pytest.raises(ValueError, match="cannot be read"):
        Outlook.load(tmp_path / "none.json")
    if "latency" not in problem:
        with pytest.raises(ValueError, match=r"not JSON|not a forecast"):
            load_forecast(path)


def test_a_forecast_that_lacks_something_is_refused(tmp_path):
    path = tmp_path / "x.json"
    for changes in (
        {"shapes": {}},
        {"drafters": {"small": {"token": [{"draft": "2"}]}}},
        {"trees": {"s": [row("y", 1)]}},
    ):
        path.write_text(json.dumps(results(**changes)))
        with pytest.raises(ValueError, match="not a whole forecast file"):
            load_forecast(path)
