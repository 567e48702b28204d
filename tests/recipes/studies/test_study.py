"""Ratios of sums, prompts paired and seeds pooled, against figures worked out by hand."""

import json

import pytest

from draftsmith.recipes.studies.sorted_training import all_pairs
from draftsmith.recipes.studies.study import markdown, read_measured, summarise


def run(losses, committed, steps):
    """The figures of three prompts, four times over."""
    return {exit: {"loss": loss, "committed": committed * 4, "steps": steps[exit] * 4} for exit, loss in losses.items()}


@pytest.fixture
def found():
    """Twelve prompts of eight tokens; every third loops. sft takes twice soft's steps at exit 1, as many at exit 2."""
    tokens = [8, 8, 8]
    return {
        ("soft", 0): run({"1": 2.0, "2": 1.0}, tokens, {"1": [4, 4, 2], "2": [2, 4, 1]}),
        ("soft", 1): run({"1": 4.0, "2": 1.0}, tokens, {"1": [2, 4, 1], "2": [2, 4, 1]}),
        ("sft", 0): run({"1": 5.0, "2": 1.0}, tokens, {"1": [8, 8, 4], "2": [2, 4, 1]}),
        ("sft", 1): run({"1": 5.0, "2": 1.0}, tokens, {"1": [4, 8, 2], "2": [2, 4, 1]}),
        ("sft-1", 1): run({"1": 5.0}, tokens, {"1": [2, 4, 2]}),
    }


DISTINCT = [1.0, 0.5, 0.1] * 4
PAIRS = all_pairs(["soft", "sft", "sft-1"], [1, 2])


def test_accepted_length_is_a_ratio_of_sums_over_prompts_and_seeds(found):
    results = summarise(found, DISTINCT, PAIRS)
    row = results["runs"]["soft"]["1"]
    assert row["loss"] == 3.0
    assert row["all"]["accepted_length"] == pytest.approx(48 / 17)
    assert row["all"]["by_seed"] == pytest.approx([24 / 10, 24 / 7])
    assert row["not_looping"]["accepted_length"] == pytest.approx(32 / 14)
    assert results["prompts"] == {"all": 12, "not_looping": 8}


def test_a_ratio_is_paired_by_prompt_so_a_constant_one_has_no_width(found):
    results = summarise(found, DISTINCT, PAIRS)
    rows = {(row["over"], row["way"]): row for row in results["ratios"]}
    twice = rows["sft", "1"]
    assert twice["all"]["ratio"] == pytest.approx(2)
    assert twice["all"]["interval"] == pytest.approx((2, 2))
    assert twice["all"]["by_seed"] == pytest.approx([2, 2])
    assert rows["sft", "2"]["all"]["interval"] == pytest.approx((1, 1))


def test_only_seeds_that_both_sides_have_are_compared(found):
    row = next(row for row in summarise(found, DISTINCT, PAIRS)["ratios"] if row["over"] == "sft-1")
    assert row["seeds"] == [1]
    assert row["all"]["ratio"] == pytest.approx(8 / 7)
    low, high = row["all"]["interval"]
    assert low < 8 / 7 < high


def test_the_tables_show_every_figure_once(found):
    text = markdown(summarise(found, DISTINCT, PAIRS))
    assert "| soft | 1 | 3.000 | 2.82 [" in text
    assert "| soft / sft | 1 | 2.000 [2.000, 2.000] | 2.000, 2.000 |" in text
    assert "accepted_length, 12 prompts" in text
    assert "no interval" not in text


def test_a_study_under_way_is_read_as_far_as_it_has_come(found, tmp_path):
    (tmp_path / "measured").mkdir()
    (tmp_path / "measured" / "soft-1-1-4-0.json").write_text(json.dumps(found["soft", 0]))
    read, distinct = read_measured(tmp_path)
    assert read == {("soft-1-1-4", 0): found["soft", 0]}
    assert distinct == []


def run_of(committed, steps):
    return {"greedy": {"committed": committed, "steps": steps}, "loss": {}}


def test_figures_are_ratios_of_sums_over_prompts_and_the_seeds_that_both_have():
    found = {
        ("kl", 0): run_of([30, 20] * 4, [10, 10] * 4), ("kl", 1): run_of([40, 10] * 4, [10, 10] * 4),
        ("sft", 0): run_of([20, 10] * 4, [10, 10] * 4),
    }  # fmt: skip
    results = summarise(found, [0.9, 0.1] * 4, [("kl", "sft", "greedy"), ("kl", "nobody", "greedy")])
    assert results["runs"]["kl"]["greedy"]["all"]["accepted_length"] == 2.5
    assert results["runs"]["kl"]["greedy"]["all"]["by_seed"] == [2.5, 2.5]
    (pair,) = results["ratios"]
    assert pair["all"]["ratio"] == pytest.approx(50 / 30)
    # (16 + k) / (8 + k) with k of the eight drawn prompts like the first; 95 of 100 draws have a k of 1 to 7.
    assert pair["all"]["interval"] == pytest.approx((23 / 15, 17 / 9))
    assert results["prompts"] == {"all": 8, "not_looping": 4}
    assert pair["not_looping"]["ratio"] == 1.5
    assert pair["not_looping"]["interval"] is None
    text = markdown(results)
    assert "| kl / sft | greedy | 1.667 [1.533, 1.889] | 1.667 | 1.500 [no interval] | 1.500 |" in text
    assert text.endswith("\n\nno interval: fewer than 8 prompts\n")
