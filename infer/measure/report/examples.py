"""The best and the worst questions of a drafter, their answers token by token with the source of each token.

Best and worst are by accepted_length, which no noise of a machine moves. The text is the answer file's; where it falls
into tokens the target's tokenizer.json says, read without the target. Where that file is missing, or gives another
text, the answer is shown whole and the page says why. Colours are not known here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from draftsmith.infer.measure.answer_files import Answer, Choice
from draftsmith.infer.measure.metrics import Totals, ratio
from draftsmith.infer.measure.report.traces import Steps

# So many questions at either end, so many tokens of a turn, and so many characters of a prompt.
ENDS = 2
TOKENS = 400
CHARACTERS = 1200


@dataclass(frozen=True, slots=True)
class Piece:
    """The text of one token; `begins` marks the first of a step. No source: the text could not be taken apart."""

    text: str
    source: str = ""
    begins: bool = False


@dataclass(frozen=True, slots=True)
class ExampleTurn:
    prompt: str
    pieces: list[Piece]
    hidden: int = 0


@dataclass(frozen=True, slots=True)
class Example:
    """One question with one drafter; `speedup` is this question's alone."""

    best: bool
    question_id: str
    category: str
    accepted_length: float
    speedup: float | None
    turns: list[ExampleTurn] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        return any(not piece.source for turn in self.turns for piece in turn.pieces)


def examples(
    steps: Steps,
    answers: Sequence[Answer],
    totals: Mapping[str, Totals],
    plain: Mapping[str, Totals],
    prompts: Mapping[str, list[str]],
    tokenizer: Any | None,
) -> list[Example]:
    """`totals` and `plain` are by question, of those alone that count; best first, then worst."""
    by_id = {str(answer.question_id): answer for answer in answers if answer.choices}
    found = [question_id for question_id in totals if question_id in by_id and totals[question_id].steps]
    ranked = sorted(found, key=lambda question_id: -(totals[question_id].accepted_length or 0.0))
    ends = min(ENDS, len(ranked) // 2) or len(ranked)
    chosen = [(True, one) for one in ranked[:ends]] + [(False, one) for one in ranked[ends:][-ends:]]
    made = []
    for best, question_id in chosen:
        answer, own, base = by_id[question_id], totals[question_id], plain.get(question_id)
        speedup = ratio(own.tokens_per_s or 0.0, (base.tokens_per_s or 0.0) if base else 0.0)
        turns = _turns(steps, question_id, answer.choices[0], prompts.get(question_id, []), tokenizer)
        length = own.accepted_length
        assert length is not None
        made.append(Example(best, question_id, answer.category, length, speedup, turns))
    return made


def _turns(
    steps: Steps, question_id: str, choice: Choice, prompts: list[str], tokenizer: Any | None
) -> list[ExampleTurn]:
    turns = []
    for number, text in enumerate(choice.turns):
        prompt = prompts[number] if number < len(prompts) else ""
        by_step = _sources(steps, question_id, number)
        ids = choice.token_ids[number] if number < len(choice.token_ids) else []
        texts = pieces(tokenizer, ids[:TOKENS], text, len(ids) > TOKENS) if tokenizer is not None else None
        sources = [(source, place == 0) for step in by_step for place, source in enumerate(step)]
        if texts is None or len(sources) != len(ids):
            turns.append(ExampleTurn(_begin(prompt, CHARACTERS), [Piece(_begin(text, 4 * TOKENS))]))
            continue
        shown = [Piece(piece, source, begins) for piece, (source, begins) in zip(texts, sources)]
        turns.append(ExampleTurn(_begin(prompt, CHARACTERS), shown, len(ids) - len(shown)))
    return turns


def _begin(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[:limit] + "…"


def _sources(steps: Steps, question_id: str, turn: int) -> list[list[str]]:
    """The first repeat's sources of that turn, step by step; nothing where it left no traces."""
    key = (f"{question_id}/{turn}", 0)
    return steps.step_sources(steps.answers.index(key)) if key in steps.answers else []


def pieces(tokenizer: Any, ids: Sequence[int], text: str, cut: bool = False) -> list[str] | None:
    """The part of `text` that each token adds; a character of several tokens belongs to its last.

    None where the tokenizer does not give this text. With `cut`, `ids` are only the beginning of it, and the
    last of them are passed over where they end within a character.
    """
    whole = str(tokenizer.decode(list(ids), skip_special_tokens=True))
    while cut and ids and whole.endswith("\ufffd"):
        ids = ids[:-1]
        whole = str(tokenizer.decode(list(ids), skip_special_tokens=True))
    if not (text.startswith(whole) if cut else whole == text):
        return None
    found, end = [], 0
    for count in range(1, len(ids) + 1):
        so_far = str(tokenizer.decode(list(ids[:count]), skip_special_tokens=True)).rstrip("\ufffd")
        reached = len(so_far) if whole.startswith(so_far) else end
        if count == len(ids):
            reached = len(whole)
        found.append(whole[end:reached] if reached > end else "")
        end = max(end, reached)
    return found


def find_tokenizer(target: str) -> Any | None:
    """The tokenizer of a folder, or of a Hub name whose tokenizer.json was fetched before; never from the network."""
    path = Path(target).expanduser() / "tokenizer.json"
    if not path.is_file():
        cached = _cached(target)
        if cached is None:
            return None
        path = cached
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(path))


def _cached(name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, "tokenizer.json")
    except ValueError:  # not a Hub name at all
        return None
    return Path(found) if isinstance(found, str) else None
