"""The time that a survey says is left, against stages that take what was predicted, or twice that."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from draftsmith.infer.costs.pass_costs import PassCost
from draftsmith.infer.measure.plan.schedule import LOOP, TARGET, TRAINING, SurveySchedule
from draftsmith.infer.measure.plan.shapes import CandidateShape, Size, SurveyRequest

SHAPES = [CandidateShape(1, 64), CandidateShape(4, 64)]
ASKED = SurveyRequest((1, 8), (16, 128), (1, 4), SHAPES)
SIZE = Size(8, 1000, 1500, 400, 1900, 2000, 8, 1000)
SIZES = {"target": SIZE, "1x64": replace(SIZE, multiplied=100), "4x64": replace(SIZE, multiplied=500)}
COST = PassCost([1, 40], [0.1, 1.0])


class Said:
    """Collects lines, on a clock that only the test turns."""

    def __init__(self, seconds=1e4):
        self.lines, self.now = [], 0.0
        self.schedule = SurveySchedule(self, clock=lambda: self.now)
        self.schedule.plan(ASKED, SIZES, COST, [1, 2, 5], seconds)

    def __call__(self, line, last=False):
        self.lines.append(line)

    def left(self):
        """The seconds in the last line."""
        value, unit = re.search(r"about ([\d.]+) (s|min)", self.lines[-1]).groups()
        return float(value) * (60 if unit == "min" else 1)


def test_the_first_line_says_how_long_it_takes_and_what_limits_it():
    said = Said(600)
    assert re.fullmatch(
        r"this takes about [\d.]+ (s|min); timing the passes ends after 10 min at most \(--seconds\)", said.lines[0]
    )
    assert said.left() == pytest.approx(sum(said.schedule.stages.values()), rel=0.05)
    assert list(said.schedule.stages) == [TARGET, "1x64", LOOP, "4x64", TRAINING]


@pytest.mark.parametrize("pace", [1.0, 2.0])
def test_the_time_left_is_corrected_by_what_the_stages_before_took(pace):
    said = Said()
    stages = dict(said.schedule.stages)
    for number, stage in enumerate(stages):
        said.schedule.begin(stage)
        assert said.lines[-1].startswith(f"{number + 1}/5 ")
        if number:
            assert said.left() == pytest.approx(pace * sum(list(stages.values())[number:]), rel=0.05, abs=1)
        said.now += pace * stages[stage]
    said.schedule.end()
    assert said.lines[-1].startswith("measured in ")


def test_a_stage_that_knows_what_is_left_of_it_is_believed():
    said = Said()
    said.schedule.begin(TARGET)
    said.schedule(500.0)
    assert said.left() == pytest.approx(500 + sum(list(said.schedule.stages.values())[1:]), rel=0.05)


def test_stages_share_the_limit_and_what_one_leaves_goes_to_the_next():
    said = Said(60)
    first = said.schedule.begin(TARGET)
    assert 0 < first < 60
    said.now += first / 2
    second = said.schedule.begin("1x64")
    said.now += second
    said.schedule.begin(LOOP)
    said.now += 1000
    assert said.schedule.begin("4x64") == pytest.approx(60 - first / 2 - second)


def test_too_little_time_is_refused_before_it_is_spent():
    with pytest.raises(ValueError, match=r"--seconds 5 are too few: .* give --seconds \d+") as refused:
        Said(5)
    Said(float(re.search(r"give --seconds (\d+)", str(refused.value))[1]))
