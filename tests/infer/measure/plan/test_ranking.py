"""What a plan says, against hand-made costs; and whether its predictions hold in the real loop."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest
import torch

from draftsmith.infer.costs import timing as latency
from draftsmith.infer.costs.identity import TargetIdentity
from draftsmith.infer.costs.pass_costs import Costs, PassCost
from draftsmith.infer.measure.forecast.drafting import Drafting
from draftsmith.infer.measure.plan.loop_timing import Overhead
from draftsmith.infer.measure.plan.ranking import (
    Wish,
    evaluate,
    least_acceptance,
    memory_and_hours,
    pays_up_to,
    predict,
    report,
    seconds,
)
from draftsmith.infer.measure.plan.shapes import CandidateShape, Size, SurveyRequest
from draftsmith.infer.measure.plan.survey import Survey, survey
from draftsmith.infer.measure.plan.tables import draw, plan_tables
from draftsmith.infer.measure.predicted import expected_length
from draftsmith.infer.models.hf_target import HFTarget

CPU = torch.device("cpu")
SIZE = Size(2, 1000, 1500, 400, 1900, 2000, 8, 950)
MACHINE = {"device": "cpu", "name": "x", "cores": 1, "threads": 1, "torch": "2", "dtype": "float32"}


def made(batch_sizes=(1, 8), target=(10.0, 10.0, 90.0), shallow=1.0, deep=3.0):
    """The target takes 10 s up to 8 tokens, then 10 s for every 8 more; a pass of a draft 1 s or 3 s, a step 0.5 s."""
    shapes = [CandidateShape(1, 64), CandidateShape(5, 64)]
    asked = SurveyRequest(batch_sizes, (0, 100), (1, 2, 4, 8, 14), shapes)
    passes = {
        "target": PassCost([1, 8, 72], list(target)),
        "1x64": PassCost([1, 64], [shallow, shallow * 2]),
        "5x64": PassCost([1, 64], [deep, deep * 2]),
    }
    sizes = {"target": SIZE, "1x64": SIZE, "5x64": SIZE}
    return Survey(asked, passes, sizes, Overhead(0.5, 0.0, 0.1, 0.0), 1e6, MACHINE)


CHAINS = [Drafting.chain(n) for n in (1, 2, 4, 8)]


def test_a_step_is_its_passes_its_verification_and_the_loop():
    found = seconds(made(), "1x64", Drafting.chain(4), 1, 0)
    assert found["draft_s"] == pytest.approx(4 * 1.0)
    assert found["verify_s"] == pytest.approx(10.0)
    assert found["overhead_s"] == pytest.approx(0.5 + 4 * 0.1)
    assert found["step_s"] == pytest.approx(14.9)
    assert seconds(made(), "", None, 1, 0)["step_s"] == pytest.approx(10.5)


def test_a_tree_costs_a_pass_a_level_and_all_its_nodes():
    tree = Drafting.parse_tree("14x4")
    assert (tree.nodes, tree.depth, tree.passes) == (14, 4, (1, 2, 2, 2))
    found = seconds(made(), "1x64", tree, 1, 0)
    assert found["draft_s"] == pytest.approx(1 + 3 * (1 + 1 / 63))
    assert found["verify_s"] == pytest.approx(10 + 80 * 7 / 64)


def test_speedup_ceiling_and_needs_are_those_of_the_formula():
    batch = evaluate(made(), Wish(CHAINS, 0, chains=(0.7,)))["batches"][0]
    step = next(s for s in batch["steps"] if (s["shape"], s["draft"]) == ("1x64", "4"))
    assert step["break_even"] == pytest.approx(14.9 / 10.5)
    assert step["ceiling"] == pytest.approx(5 * 10.5 / 14.9)
    assert step["needs"] == pytest.approx({"1": 14.9 / 10.5, "1.5": 1.5 * 14.9 / 10.5, "2": 2 * 14.9 / 10.5})
    assert step["accepted_length"] == pytest.approx(expected_length((0.7,), 4))
    assert step["speedup"] == pytest.approx(expected_length((0.7,), 4) * 10.5 / 14.9)


def test_the_shape_that_comes_first_is_the_fastest_at_its_best_length():
    batch = evaluate(made(), Wish(CHAINS, 0, chains=(0.7,)))["batches"][0]
    first, second = batch["ranking"]
    assert (first["shape"], second["shape"]) == ("1x64", "5x64")
    assert first["best"]["speedup"] == max(s["speedup"] for s in batch["steps"])
    assert first["to_be_first"] == pytest.approx(0.7)
    assert batch["verdict"].startswith(f"1x64 drafting {first['best']['draft']}")


def test_shapes_and_lengths_are_ranked_together():
    for wish, key in ((Wish(CHAINS, 0, chains=(0.7,)), "speedup"), (Wish(CHAINS, 0), "ceiling")):
        values = [step[key] for step in evaluate(made(), wish)["batches"][0]["steps"]]
        assert len(values) == 8
        assert values == sorted(values, reverse=True)


def test_a_slower_draft_has_to_be_better_and_it_is_said_how_much():
    found = made()
    first, second = evaluate(found, Wish(CHAINS, 0, chains=(0.7,)))["batches"][0]["ranking"]
    need = second["to_be_first"]
    assert 0.7 < need < 1
    speeds = [predict(found, "5x64", c, 1, 0, expected_length((need,), c.depth)).speedup for c in CHAINS]
    assert max(speeds) == pytest.approx(first["best"]["speedup"])


def test_where_the_acceptances_are_not_known_shapes_are_ranked_by_what_they_need():
    batch = evaluate(made(), Wish(CHAINS, 0))["batches"][0]
    assert [row["best"] for row in batch["ranking"]] == [None, None]
    needs = [row["needs_acceptance"]["1"] for row in batch["ranking"]]
    assert needs == sorted(needs)
    assert needs[0] < 0.5
    assert "breaks even at the lowest acceptance" in batch["verdict"]


def test_least_acceptance_is_where_the_goal_is_just_reached():
    chains = [{"depth": 2, "break_even": 1.5}, {"depth": 4, "break_even": 2.0}]
    share = least_acceptance(chains, 1.2)
    best = max(expected_length((share,), step["depth"]) / step["break_even"] for step in chains)
    assert best == pytest.approx(1.2, abs=1e-6)
    assert least_acceptance(chains, 2.6) is None


def test_plain_decoding_wins_where_no_ceiling_reaches_it():
    """A draft as dear as its target."""
    batch = evaluate(made(shallow=12.0, deep=30.0), Wish(CHAINS, 0, chains=(0.99,)))["batches"][0]
    assert all(step["ceiling"] < 1 for step in batch["steps"])
    assert batch["verdict"].startswith("plain decoding wins whatever is drafted")


def test_plain_decoding_wins_at_a_poor_acceptance():
    batch = evaluate(made(), Wish(CHAINS, 0, chains=(0.05,)))["batches"][0]
    assert max(step["ceiling"] for step in batch["steps"]) > 1
    assert batch["verdict"].startswith("plain decoding wins at this acceptance")


def test_a_full_machine_turns_the_verdict():
    """At 8 rows a plain pass still takes 10 s, and one of 5 tokens a row 50 s."""
    found = made()
    few, many = evaluate(found, Wish(CHAINS, 0, chains=(0.7,)))["batches"]
    assert few["ranking"][0]["best"]["speedup"] > 1.4
    assert many["ranking"][0]["best"]["speedup"] < 1
    upto = pays_up_to(found, Wish(CHAINS, 0, chains=(0.7,)))
    assert 1 <= upto < 8
    assert pays_up_to(found, Wish(CHAINS, 0)) is None


def test_trees_are_judged_by_their_own_acceptance_alone():
    tree = Drafting.parse_tree("14x4")
    steps = evaluate(made(), Wish([*CHAINS, tree], 0, chains=(0.7,)))["batches"][0]["steps"]
    assert next(s for s in steps if s["draft"] == "14x4")["speedup"] is None
    steps = evaluate(made(), Wish([*CHAINS, tree], 0, chains=(0.7,), trees=(0.9,)))["batches"][0]["steps"]
    assert next(s for s in steps if s["draft"] == "14x4")["accepted_length"] == expected_length((0.9,), 4)


def test_hours_and_memory_follow_their_formulas():
    row = memory_and_hours(made(), 3_600_000)["1x64"]
    assert row["hours"] == pytest.approx(6 * 950 * 3.6e6 / 1e6 / 3600)
    assert row["hours_distilled"] == pytest.approx((6 + 2) * 950 * 3.6e6 / 1e6 / 3600)
    assert row["training_bytes"] == 16 * 1000
    assert row["cache_bytes"] == 8 * 8 * 100


def test_a_report_is_plain_json_and_becomes_tables_and_a_plot(tmp_path, capsys):
    from draftsmith.infer.measure.tables import show

    trees = [Drafting.parse_tree("14x4")]
    for wish in (Wish(CHAINS, 50, chains=(0.7,)), Wish([*CHAINS, *trees], 50)):
        said = json.loads(json.dumps(report(made(), wish, 10**8)))
        show(plan_tables(said))
        told = capsys.readouterr().out
        assert "Verdict: " in told
        for width in widths(said):
            assert width <= 80
        assert "1x64" in told
        draw(said, tmp_path / "plan.svg")
        drawn = ET.parse(tmp_path / "plan.svg").getroot()
        assert drawn.tag == "{http://www.w3.org/2000/svg}svg"
        assert len(list(drawn.iter("{http://www.w3.org/2000/svg}polyline"))) == 2 * 2


def widths(said):
    """Of the tables alone: lines of text are wrapped."""
    from rich.console import Console
    from rich.table import Table

    console = Console(width=400)
    return [console.measure(part).maximum for part in plan_tables(said) if isinstance(part, Table)]


@pytest.mark.parametrize("text", ["14", "x4", "14x", "3x4", "0x0", "14x-1"])
def test_what_is_no_tree_is_refused(text):
    with pytest.raises(ValueError, match="no tree"):
        Drafting.parse_tree(text)


def test_a_survey_leaves_costs_that_other_commands_read(make_model, tmp_path, monkeypatch):
    monkeypatch.setattr(latency, "ROUNDS", (1, 1))
    config = make_model("llama", num_hidden_layers=6).config
    shapes = [CandidateShape(1, 32), CandidateShape(2, 32), CandidateShape(4, 32)]
    asked = SurveyRequest((1, 2), (8, 32), (1, 3), shapes, [CandidateShape(3, 32)])
    found = survey(config, torch.float32, CPU, asked, seconds=120, name="org/model")
    assert found.target is not None
    assert found.target.is_same(TargetIdentity.of("elsewhere", HFTarget(make_model("llama", num_hidden_layers=6))))
    (tmp_path / "costs.json").write_text(json.dumps(found.costs().to_json()))
    costs = Costs.load(tmp_path / "costs.json")
    assert set(costs.passes) == {"target", "small:1x32", "small:2x32", "small:4x32", "small:3x32"}
    assert costs.of("target").even(1, 1, 16) == pytest.approx(found.passes["target"].even(1, 1, 16))
    assert found.training_flops > 0
    assert found.machine["device"] == "cpu"


@pytest.mark.slow
def test_predictions_for_shapes_and_lengths_that_were_not_measured_hold(make_model, tmp_path):
    config = make_model("llama").config
    config.update({"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 10, "num_attention_heads": 8,
                   "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 8192, "max_position_embeddings": 2048,
                   "dtype": "bfloat16"})  # fmt: skip
    config.save_pretrained(tmp_path)
    # In a process of its own, because tests run with one thread beside others.
    command = [sys.executable, "-m", "draftsmith.recipes.studies.plan", "--target", str(tmp_path)]
    command += ["--batch_sizes", "[1]", "--repeats", "3", "--json", "true"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["within"] >= 4
    assert not any(row["shape_measured"] or row["length_measured"] for row in said["pairs"])


@pytest.mark.gpu
@pytest.mark.slow
def test_an_8b_target_on_a_gpu(tmp_path):
    """The table for batch 1, 8 and 32: a wide, shallow draft pays at batch 1, and every pass costs something."""
    from transformers import LlamaConfig

    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("an 8B target and its cache need 40 GiB")
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, max_position_embeddings=8192, dtype="bfloat16",
    )  # fmt: skip
    config.save_pretrained(tmp_path)
    asked = SurveyRequest(
        (1, 8, 32),
        (128, 1024),
        (1, 2, 4, 8, 16),
        [CandidateShape(1, 4096), CandidateShape(3, 4096), CandidateShape(5, 4096)],
    )
    found = survey(config, torch.bfloat16, torch.device("cuda"), asked, seconds=240)
    said = report(found, Wish(CHAINS, 512, chains=(0.7,)), 10**9)
    assert said["batches"][0]["ranking"][0]["best"]["speedup"] > 1.2
    assert [batch["batch_size"] for batch in said["batches"]] == [1, 8, 32]
    assert all(found.passes["5x4096"](b, 1, 512) > found.passes["1x4096"](b, 1, 512) for b in (1, 8, 32))
    print(json.dumps(said["batches"]))
