"""Heads in `plan`: their sizes and passes are those of real heads of the target's width."""

from __future__ import annotations

import pytest
import torch
from tiny_folders import tiny_llama

from draftsmith.infer.costs.pass_costs import PassCost
from draftsmith.infer.costs.timing import PassShape, visit
from draftsmith.infer.measure.forecast.drafting import Drafting
from draftsmith.infer.measure.plan.head_shapes import CandidateHead
from draftsmith.infer.measure.plan.loop_timing import Overhead
from draftsmith.infer.measure.plan.ranking import Wish, evaluate, memory_and_hours, seconds
from draftsmith.infer.measure.plan.shapes import CandidateShape, Size, SurveyRequest
from draftsmith.infer.measure.plan.survey import Survey

CONFIG = tiny_llama().config
WIDTH, VOCAB = CONFIG.hidden_size, CONFIG.vocab_size
NAMES = ["eagle", "eagle:50", "medusa:2", "hydra:3", "mtp"]
CPU = torch.device("cpu")


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_read_as_it_is_written(name: str) -> None:
    assert CandidateHead.names(name)
    assert str(CandidateHead.parse(name)) == name


def test_medusa_and_hydra_have_four_heads_by_default() -> None:
    assert str(CandidateHead.parse("medusa")) == "medusa:4"
    assert not CandidateHead.names("2x512")


@pytest.mark.parametrize("word", ["eagle:0", "medusa:x", "hydra:", "mtp:3", "eagel"])
def test_anything_else_is_refused_in_one_line(word: str) -> None:
    with pytest.raises(ValueError, match=r"is no head: write eagle, eagle:TOKENS, medusa:HEADS"):
        CandidateHead.parse(word)
    with pytest.raises(ValueError, match="drafts more tokens"):
        CandidateHead("eagle", VOCAB + 1).made(CONFIG, torch.float32)


def test_medusa_and_hydra_are_counted_by_their_formulas() -> None:
    medusa = CandidateHead("medusa", 2).sized(CONFIG, torch.float32)
    assert medusa.parameters == 2 * (WIDTH * WIDTH + WIDTH + VOCAB * WIDTH)
    assert medusa.head_bytes == 2 * 4 * VOCAB * WIDTH
    assert medusa.token_bytes == 0
    hydra = CandidateHead("hydra", 3).sized(CONFIG, torch.float32)
    blocks = sum(2 * ((i + 2) * WIDTH * WIDTH + WIDTH) for i in range(3))
    assert hydra.parameters == blocks + 3 * (VOCAB * WIDTH + VOCAB)


def test_a_draft_vocabulary_saves_rows_and_mtp_borrows_the_targets_matrix() -> None:
    whole, part, mtp = (CandidateHead.parse(name).sized(CONFIG, torch.float32) for name in ("eagle", "eagle:50", "mtp"))
    assert whole.parameters - part.parameters == (VOCAB - 50) * WIDTH
    assert mtp.head_bytes == 4 * VOCAB * WIDTH
    assert mtp.multiplied - mtp.parameters == VOCAB * WIDTH
    heads = CONFIG.num_key_value_heads
    assert whole.token_bytes == 2 * heads * (WIDTH // CONFIG.num_attention_heads) * 4


@pytest.mark.parametrize("name", NAMES)
def test_a_pass_can_be_timed_and_its_work_is_counted(name: str) -> None:
    head = CandidateHead.parse(name)
    timer = head.timer(CONFIG, torch.float32, CPU)
    assert visit(timer, PassShape(2, 3, 8), lambda: 0.0) == 0.0
    timer.close()
    work = head.work(CONFIG, torch.float32)
    multiplied = sum(weights * count for weights, count in work.matrices.items())
    assert 0 < multiplied <= head.sized(CONFIG, torch.float32).multiplied
    if head.kind == "medusa":
        assert multiplied == 2 * (WIDTH * WIDTH + VOCAB * WIDTH)
    if head.kind == "hydra":  # the middle one of three
        assert multiplied == 2 * 3 * WIDTH * WIDTH + VOCAB * WIDTH


def test_heads_are_ranked_by_the_passes_that_they_make() -> None:
    heads = [CandidateHead("medusa", 3), CandidateHead("hydra", 3), CandidateHead("eagle")]
    drafting = [Drafting.chain(2), Drafting.chain(6), Drafting.parse_tree("4-2-1")]
    asked = SurveyRequest((1,), (0,), (2, 6, 20), [CandidateShape(1, 32)], heads=heads)
    passes = {
        "target": PassCost([1, 100], [10.0, 20.0]),
        **{name: PassCost([1, 64], [1.0, 1.5]) for name in asked.timed},
    }
    survey = Survey(
        asked, passes, dict.fromkeys(passes, Size(2, 9, 9, 9, 9, 9, 9, 9)), Overhead(0, 0, 0.25, 0), 1e6, {}
    )
    drafting_s = {name: seconds(survey, name, drafting[2], 1, 0)["draft_s"] for name in asked.timed}
    wide = 1.0 + sum(1.0 + 0.5 * (tokens - 1) / 63 for tokens in (4, 8))
    assert drafting_s == pytest.approx({"1x32": wide, "medusa:3": 1.0, "hydra:3": wide, "eagle": wide})
    assert seconds(survey, "medusa:3", drafting[0], 1, 0)["overhead_s"] == 0.25  # of one pass
    (batch,) = evaluate(survey, Wish(drafting, 0, (0.7,), (0.8,)))["batches"]
    drafted = {(step["shape"], step["draft"]) for step in batch["steps"]}
    assert ("eagle", "6") in drafted
    assert {draft for shape, draft in drafted if shape == "medusa:3"} == {"2", "4-2-1"}
    hours = memory_and_hours(survey, 1000)
    assert hours["1x32"]["hours"] < hours["1x32"]["hours_distilled"] == hours["eagle"]["hours"]


def test_a_costs_file_names_heads_as_drafters_do() -> None:
    asked = SurveyRequest((1,), (0,), (2,), [CandidateShape(1, 32)], heads=[CandidateHead("medusa", 3)])
    passes = {name: PassCost([1], [1.0]) for name in ("target", *asked.timed)}
    survey = Survey(asked, passes, {}, Overhead(0, 0, 0, 0), 1.0, {"device": "cpu"})
    assert list(survey.costs().passes) == ["target", "small:1x32", "medusa"]
