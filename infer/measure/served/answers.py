"""The run folder of a load: what every run folder has, the answers of each server and load in Spec-Bench's format."""

from __future__ import annotations

from typing import Any

from draftsmith.infer.measure.answer_files import Answer, Choice, write_answers
from draftsmith.infer.measure.run_folder import RunFolder
from draftsmith.infer.measure.served.load import ServedAnswer, ServedLevel, ServedLoad


def write_load(folder: RunFolder, load: ServedLoad, facts: dict[str, Any], results: dict[str, Any]) -> None:
    """The results come last: if they exist, so does the rest."""
    folder.write_run(facts)
    folder.write_questions(load.questions)
    for name, levels in load.levels.items():
        for level in levels:
            label = f"{name}, {level.concurrency} at once"
            write_answers(folder.answers_path(label), _answers(load, level, label))
    folder.write_results(results)


def _answers(load: ServedLoad, level: ServedLevel, label: str) -> list[Answer]:
    found = []
    for question in load.questions:
        several = level.answers[question.id]
        error = next((one.error for one in several if one.error), "")
        choices = [] if error else [_choice(one) for one in several]
        found.append(Answer(question.id, question.category, label, choices, error))
    return found


def _choice(answer: ServedAnswer) -> Choice:
    """wall_time is a request's own: with several at a time, they overlap."""
    return Choice(
        turns=[turn.text for turn in answer.turns],
        new_tokens=[turn.tokens for turn in answer.turns],
        wall_time=[turn.last_s for turn in answer.turns],
    )
