"""Tables show the JSON's own numbers, whole, and what a reader has to know besides."""

import io
import json

import pytest
from rich.console import Console

from draftsmith.infer.measure.bench import bench
from draftsmith.infer.measure.compare import compare
from draftsmith.infer.measure.figures import summarise
from draftsmith.infer.measure.run_folder import RunFolder
from draftsmith.infer.measure.tables import bench_tables, compare_tables, predicted_notes, show


@pytest.fixture
def run(fake, coders, questions, clock):
    def answer(prompt):
        return [1, 2] * 4 if prompt.key == "0/0" else list(range(8))

    def other(prompt):
        return [9] * 8 if prompt.key == "3/0" else answer(prompt)

    runners = [
        fake("plain", answer=answer),
        fake("small[1]:x", answer=other, per_step=4, step_s=1.25),
        fake("peer", answer=answer, traced=False, fails_on=lambda prompt: prompt.key == "2/0"),
    ]
    measured = bench(runners, questions, *coders, clock=clock)
    return measured, summarise(measured, min_distinct=0.5)


def lines_of(renderables) -> list[str]:
    file = io.StringIO()
    show(renderables, Console(file=file, width=240))
    return file.getvalue().splitlines()


def test_the_bench_table_has_a_line_per_drafter_with_its_numbers(run):
    _, results = run
    lines = lines_of(bench_tables(json.loads(json.dumps(results))))
    line = next(line for line in lines if line.startswith("small[1]:x "))
    assert "3.20 [" not in line, "an interval from five questions"
    for shown in ("2.67", "4.00", "100.0%", "3.0", "5/6"):
        assert shown in line.split()
    assert "Acceptance by depth" not in lines, "these runners tell of no trials"
    assert any(line.startswith("peer ") and "(end to end)" in line for line in lines)


def test_what_was_left_out_failed_and_differed_is_listed(run):
    _, results = run
    text = "\n".join(lines_of(bench_tables(results)))
    assert "1 of 6 questions (16.7%) are left out of the figures" in text
    assert "over all questions, small[1]:x: speedup 3.20" in text
    assert "peer, question 2: RuntimeError: cannot answer 2/0" in text
    assert "small[1]:x, question 3, turn 1: differs from plain at token 0 (0 there, 9 here)" in text


def test_answers_of_drawn_drafts_are_not_compared_with_plain_s_tokens(fake, coders, questions, clock):
    runners = [
        fake("plain", answer=lambda prompt: [9] * 8),
        fake("small", answer=lambda prompt: [7] * 8, drawn=True),
        fake("pld", answer=lambda prompt: [9 - (prompt.key == "3/0")] * 8),
    ]
    results = summarise(bench(runners, questions, *coders, clock=clock))
    small = results["drafters"]["small"]
    assert (small["drawn"], small["equal"], small["total"]) == (True, 0, 6)
    lines = lines_of(bench_tables(json.loads(json.dumps(results))))
    row = next(line for line in lines if line.startswith("small "))
    assert "drawn" in row.split()
    assert "0/6" not in row
    assert "drawn: the answers of small have plain's distribution, not its tokens, so they are not compared." in lines
    assert [line.split(",")[0] for line in lines if "differs from" in line] == ["pld"]
    assert not any("differences shown" in line for line in lines)


def test_nothing_is_cut_off_where_nobody_looks_at_a_terminal(run, capsys):
    _, results = run
    show(bench_tables(results))
    assert "…" not in capsys.readouterr().out


def test_compare_tables_show_both_speedups_and_every_kind_of_difference(run, tmp_path):
    measured, results = run
    folder = RunFolder.create(tmp_path / "run")
    folder.write_measured(measured, results)
    path = folder.answers_path("small[1]:x")
    rows = path.read_text().splitlines()
    path.write_text("\n".join([*rows[1:5], rows[4]]) + "\n")
    text = "\n".join(lines_of(compare_tables(compare(folder.path, []))))
    assert "Spec-Bench's speedup" in text
    assert "mt_bench" in text
    assert "overall" in text
    assert "small[1]:x, question 0 is missing" in text
    assert "small[1]:x, question 4 occurs 1 times in the base, 2 times here" in text
    assert "small[1]:x, question 3, turn 1: token 0 is 0 in the base, 9 here" in text
    assert "peer, question 2 failed in other: RuntimeError: cannot answer 2/0" in text


def notes_on(nodes_per_step: float, off_above: int | None) -> str:
    by_size = [{"batch_size": 1, "speedup": 1.0, "break_even": 2.0}]
    found = {"off_above": off_above, "measured_up_to": 1, "by_batch_size": by_size}
    row = {"nodes_per_step": nodes_per_step, "predicted": found}
    return "\n".join(predicted_notes({"modelled": "", "drafters": {"rest": row}}))


def test_a_large_draft_that_pays_nowhere_is_advised_to_try_fewer_nodes():
    assert "rest: 59 nodes a step do not pay here" in notes_on(58.8, 0)
    assert "[nodes=8]" in notes_on(58.8, 0)


@pytest.mark.parametrize(("nodes", "off_above"), [(7.2, 0), (58.8, 1), (58.8, None)])
def test_small_drafts_and_drafts_that_pay_somewhere_are_not(nodes, off_above):
    assert "nodes=" not in notes_on(nodes, off_above)
