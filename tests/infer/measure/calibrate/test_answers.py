"""Held-out answers: several turns, and loops left out."""

from dataclasses import replace

import pytest

from draftsmith.infer.contract.row import Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.measure.calibrate.answers import Answered, answer_prompts, without_loops
from draftsmith.infer.models.load import load_target
from draftsmith.infer.text.record import Message, Record
from draftsmith.infer.text.templates import find_template


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_every_turn_is_asked_behind_the_target_s_own_answers(folders, temperature):
    target = load_target(folders.target)
    template = find_template("chat", target.tokenizer)
    records = [Record(id="a", turns=["what?", "and then?"]), Record(id="b", turns=["why?"])]
    settings, stops = Settings(temperature=temperature, seed=3), Stops(12, target.eos_ids)
    calls = []
    found = answer_prompts(
        target,
        records,
        template,
        settings,
        stops,
        batch_size=2,
        progress=lambda done, turns: calls.append((done, turns)),
    )
    assert [(one.number, one.key) for one in found] == [(0, "0/0"), (1, "1/0"), (0, "0/1")]
    assert calls == [(1, 3), (2, 3), (3, 3)]
    first = target.tokenizer.decode(found[0].answer, skip_special_tokens=True)
    spoken = [Message("user", "what?"), Message("assistant", first), Message("user", "and then?")]
    assert found[2].prompt == template.prompt_ids(spoken)
    alone = answer_prompts(target, records, template, settings, stops, batch_size=1)
    assert [one.answer for one in alone] == [one.answer for one in found]


def test_answers_that_loop_are_left_out_when_asked():
    looping = Answered(0, "0/0", [1], [5] * 40)
    varied = replace(looping, answer=list(range(40)))
    assert without_loops([looping, varied], 0.5) == [varied]
    assert without_loops([looping, varied], 0.0) == [looping, varied]
