"""Trace files as columns, and from them the best and worst answers of a drafter, token by token with their sources.

A million steps are read in seconds: pyarrow parses the JSON (twice as fast as Python's own module) into arrays. Answers
are split into tokens with the target's tokenizer.json, without loading the target.

Legend: S steps (one entry per row and step), C committed tokens, G groups.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from draftsmith.infer.measure.answer_files import Answer, Choice
from draftsmith.infer.measure.metrics import Totals, ratio

# Bytes of text parsed at once.
BLOCK = 1 << 23
# Examples: questions from either end, tokens of a turn, characters of a prompt.
ENDS = 2
TOKENS = 400
CHARACTERS = 1200

_WHOLE = ("batch", "context", "nodes", "accepted", "committed")
_TIMES = ("propose_s", "score_s", "verify_s", "commit_s", "target_forward_s", "draft_forward_s")


@dataclass(slots=True)
class Steps:
    """`answer_S` indexes `answers`, (row key, choice) in file order; `source_C` indexes `sources`."""

    answers: list[tuple[str, int]]
    sources: list[str]
    answer_S: np.ndarray
    batch_S: np.ndarray
    context_S: np.ndarray
    nodes_S: np.ndarray
    accepted_S: np.ndarray
    committed_S: np.ndarray
    seconds_S: np.ndarray
    target_S: np.ndarray
    draft_S: np.ndarray
    source_C: np.ndarray

    def __len__(self) -> int:
        return len(self.batch_S)

    def question_ids(self) -> list[str]:
        """The question of each answer, as text; a row's key is QUESTION/TURN."""
        return [key.rpartition("/")[0] for key, _ in self.answers]

    def totals(self, group_S: np.ndarray, groups: int) -> list[Totals]:
        """One `Totals` per group; steps whose group is below zero are left out."""
        inside_S = group_S >= 0
        share_S = 1.0 / self.batch_S

        def sums(values_S: np.ndarray) -> list[float]:
            return np.bincount(group_S[inside_S], weights=values_S[inside_S], minlength=groups).tolist()

        counts = {
            "steps": np.ones(len(self)),
            "committed": self.committed_S,
            "accepted": self.accepted_S,
            "nodes": self.nodes_S,
            "hits": self.nodes_S > 0,
        }
        seconds = {"decode_s": self.seconds_S, "target_s": self.target_S, "draft_s": self.draft_S}
        shares = {"passes": share_S} | {name: values_S * share_S for name, values_S in seconds.items()}
        columns: dict[str, Iterable[Any]] = {name: map(int, sums(values_S)) for name, values_S in counts.items()}
        columns |= {name: sums(values_S) for name, values_S in shares.items()}
        return [Totals(**dict(zip(columns, row))) for row in zip(*columns.values())]

    def step_sources(self, answer: int) -> list[list[str]]:
        """The sources of an answer's committed tokens, step by step."""
        ends_S = np.cumsum(self.committed_S)
        return [
            [self.sources[code] for code in self.source_C[ends_S[at] - self.committed_S[at] : ends_S[at]]]
            for at in np.flatnonzero(self.answer_S == answer)
        ]


def read_steps(path: Path) -> Steps:
    """All steps of a trace file; a malformed row is a ValueError that names the file."""
    answers: dict[tuple[str, int], int] = {}
    sources: dict[str, int] = {}
    blocks = [_columns(table, answers, sources, path) for table in _tables(path)]
    if not blocks:
        raise ValueError(f"{path}: holds no traces")
    columns = {name: np.concatenate([block[name] for block in blocks]) for name in blocks[0]}
    return Steps(answers=list(answers), sources=list(sources), **columns)


def _tables(path: Path) -> Iterator[Any]:
    import pyarrow
    from pyarrow import json as arrow_json

    whole, number, text = pyarrow.int32(), pyarrow.float64(), pyarrow.string()
    fields = [("row", text), *((name, whole) for name in _WHOLE), *((name, number) for name in _TIMES)]
    trace = pyarrow.struct([*fields, ("committed_sources", pyarrow.list_(text))])
    schema = pyarrow.schema([("choice", whole), ("trace", trace)])
    parse = arrow_json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore")
    read = arrow_json.ReadOptions(use_threads=True, block_size=BLOCK)
    try:
        for block in _blocks(path):
            yield arrow_json.read_json(pyarrow.BufferReader(block), read_options=read, parse_options=parse)
    except (pyarrow.ArrowInvalid, OSError, EOFError) as error:
        raise ValueError(f"{path}: cannot be read as traces ({' '.join(str(error).split())})") from error


def _blocks(path: Path) -> Iterator[bytes]:
    """Whole lines, about half a BLOCK at a time: the parser fails on a line that spans its blocks."""
    left = b""
    with gzip.open(path, "rb") as lines:
        while read := lines.read(BLOCK // 2):
            whole, newline, rest = read.rpartition(b"\n")
            if newline:
                yield left + whole + newline
                left = rest
            else:
                left += read
    if left.strip():
        yield left


def _columns(
    table: Any, answers: dict[tuple[str, int], int], sources: dict[str, int], path: Path
) -> dict[str, np.ndarray]:
    """A parsed block as arrays; adds the answers and sources it is the first to name."""
    from pyarrow import compute

    trace = table.column("trace").combine_chunks()
    columns = {name: trace.field(name) for name in (*_WHOLE, *_TIMES, "row", "committed_sources")}
    missing = [name for name, values in {**columns, "choice": table.column("choice")}.items() if values.null_count]
    if missing or trace.null_count:
        raise ValueError(f"{path}: a row is not a trace (no {missing[0] if missing else 'trace'})")
    rows = compute.dictionary_encode(columns["row"])
    row_S, keys = np.asarray(rows.indices), rows.dictionary.to_pylist()
    choice_S = table.column("choice").to_numpy()
    choices = int(choice_S.max()) + 1
    pair_S = row_S.astype(np.int64) * choices + choice_S
    pairs, first, inverse_S = np.unique(pair_S, return_index=True, return_inverse=True)
    known = np.empty(len(pairs), dtype=np.int32)
    for at in np.argsort(first):
        answer = (keys[pairs[at] // choices], int(pairs[at] % choices))
        known[at] = answers.setdefault(answer, len(answers))
    names = compute.dictionary_encode(columns["committed_sources"].flatten())
    codes = np.array([sources.setdefault(name, len(sources)) for name in names.dictionary.to_pylist()], dtype=np.uint8)
    found = {f"{name}_S": np.asarray(columns[name]) for name in _WHOLE}
    lengths_S = np.asarray(compute.list_value_length(columns["committed_sources"]))
    if not np.array_equal(lengths_S, found["committed_S"]) or (found["batch_S"] < 1).any():
        raise ValueError(f"{path}: malformed trace: len(committed_sources) != committed, or batch < 1")
    times = {name: np.asarray(columns[name]) for name in _TIMES}
    return found | {
        "answer_S": known[inverse_S],
        "seconds_S": times["propose_s"] + times["score_s"] + times["verify_s"] + times["commit_s"],
        "target_S": times["target_forward_s"],
        "draft_S": times["draft_forward_s"],
        "source_C": codes[np.asarray(names.indices)],
    }


@dataclass(frozen=True, slots=True)
class Piece:
    """The text of one token; `begins` marks the first of a step. Without a source: a text that was not split."""

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
    """One question with one drafter; `speedup` is for this question alone."""

    best: bool
    question_id: str
    category: str
    accepted_length: float
    speedup: float | None
    turns: list[ExampleTurn] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Some turn was not split into tokens."""
        return any(not piece.source for turn in self.turns for piece in turn.pieces)


def examples(
    steps: Steps,
    answers: Sequence[Answer],
    totals: Mapping[str, Totals],
    plain: Mapping[str, Totals],
    prompts: Mapping[str, list[str]],
    tokenizer: Any | None,
) -> list[Example]:
    """The best questions, then the worst, by accepted_length, which timing noise does not change.

    `totals` and `plain` are by question, for the questions that count.
    """
    by_id = {str(answer.question_id): answer for answer in answers if answer.choices}
    lengths = {key: own.accepted_length for key, own in totals.items() if key in by_id}
    ranked = sorted(((length, key) for key, length in lengths.items() if length is not None), key=lambda pair: -pair[0])
    ends = min(ENDS, len(ranked) // 2) or len(ranked)
    made = []
    for place, (length, question_id) in enumerate([*ranked[:ends], *ranked[ends:][-ends:]]):
        answer, base = by_id[question_id], plain.get(question_id, Totals())
        speedup = ratio(totals[question_id].tokens_per_s or 0.0, base.tokens_per_s or 0.0)
        turns = _turns(steps, question_id, answer.choices[0], prompts.get(question_id, []), tokenizer)
        made.append(Example(place < ends, question_id, answer.category, length, speedup, turns))
    return made


def _turns(
    steps: Steps, question_id: str, choice: Choice, prompts: list[str], tokenizer: Any | None
) -> list[ExampleTurn]:
    turns = []
    for number, text in enumerate(choice.turns):
        prompt = _begin(prompts[number] if number < len(prompts) else "", CHARACTERS)
        ids = choice.token_ids[number] if number < len(choice.token_ids) else []
        texts = pieces(tokenizer, ids[:TOKENS], text, len(ids) > TOKENS) if tokenizer is not None else None
        # The traces of the first repeat, if there are any.
        key = (f"{question_id}/{number}", 0)
        by_step = steps.step_sources(steps.answers.index(key)) if key in steps.answers else []
        sources = [(source, place == 0) for step in by_step for place, source in enumerate(step)]
        if texts is None or len(sources) != len(ids):
            turns.append(ExampleTurn(prompt, [Piece(_begin(text, 4 * TOKENS))]))
            continue
        shown = [Piece(piece, source, begins) for piece, (source, begins) in zip(texts, sources)]
        turns.append(ExampleTurn(prompt, shown, len(ids) - len(shown)))
    return turns


def _begin(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[:limit] + "…"


def pieces(tokenizer: Any, ids: Sequence[int], text: str, cut: bool = False) -> list[str] | None:
    """The part of `text` that each token adds; a character made of several tokens belongs to the last of them.

    None where decoding `ids` does not give `text`. With `cut`, `ids` are only a prefix of the answer, and tokens at its
    end that are part of an unfinished character are skipped.
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
    """The tokenizer of a folder, or of a Hub name whose tokenizer.json is in the local cache; never downloaded."""
    from huggingface_hub import try_to_load_from_cache
    from tokenizers import Tokenizer

    path = Path(target).expanduser() / "tokenizer.json"
    if path.is_file():
        return Tokenizer.from_file(str(path))
    try:
        cached = try_to_load_from_cache(target, "tokenizer.json")
    except ValueError:  # not a Hub name
        return None
    return Tokenizer.from_file(cached) if isinstance(cached, str) else None
