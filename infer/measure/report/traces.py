"""One runner's trace file as columns: a million steps are read in seconds and held as numbers, never as objects.

pyarrow parses the JSON because Python's own takes twice as long. Figures come out as `Totals`, so that every number has
the definition that it has everywhere else. What is drawn from them is not known here.

Legend: S steps (one entry per row and step), C committed tokens, G groups.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from draftsmith.infer.measure.metrics import Totals

# So many bytes of text are parsed at once.
BLOCK = 1 << 23

_WHOLE = ("batch", "context", "nodes", "accepted", "committed")
_TIMES = ("propose_s", "score_s", "verify_s", "commit_s", "target_forward_s", "draft_forward_s")


@dataclass(slots=True)
class Steps:
    """`answer_S` points into `answers`, (row key, choice) in file order; `source_C` into `sources`."""

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
        """Per answer: the question that it belongs to, as text; the rest of a row's key is the turn."""
        return [key.rpartition("/")[0] for key, _ in self.answers]

    def totals(self, group_S: np.ndarray, groups: int) -> list[Totals]:
        """One `Totals` per group; a step whose group is below zero belongs to none."""
        inside_S = group_S >= 0
        group_S, share_S = group_S[inside_S], 1.0 / self.batch_S[inside_S]

        def sums(values_S: np.ndarray) -> np.ndarray:
            return np.bincount(group_S, weights=values_S, minlength=groups)

        ones_S = np.ones(len(group_S))
        steps_G, committed_G = sums(ones_S), sums(self.committed_S[inside_S])
        accepted_G, nodes_G = sums(self.accepted_S[inside_S]), sums(self.nodes_S[inside_S])
        hits_G, passes_G = sums(self.nodes_S[inside_S] > 0), sums(share_S)
        decode_G, target_G, draft_G = (
            sums(values_S[inside_S] * share_S) for values_S in (self.seconds_S, self.target_S, self.draft_S)
        )
        return [
            Totals(
                steps=int(steps_G[group]),
                committed=int(committed_G[group]),
                accepted=int(accepted_G[group]),
                nodes=int(nodes_G[group]),
                hits=int(hits_G[group]),
                passes=float(passes_G[group]),
                decode_s=float(decode_G[group]),
                target_s=float(target_G[group]),
                draft_s=float(draft_G[group]),
            )
            for group in range(groups)
        ]

    def step_sources(self, answer: int) -> list[list[str]]:
        """The sources of an answer's committed tokens, step by step."""
        ends_S = np.cumsum(self.committed_S)
        return [
            [self.sources[code] for code in self.source_C[ends_S[at] - self.committed_S[at] : ends_S[at]]]
            for at in np.flatnonzero(self.answer_S == answer)
        ]


def read_steps(path: Path) -> Steps:
    """All steps of a trace file; a row that is no trace is a ValueError that names the file."""
    answers: dict[tuple[str, int], int] = {}
    sources: dict[str, int] = {}
    parts: dict[str, list[np.ndarray]] = {}
    for table in _tables(path):
        for name, values in _columns(table, answers, sources, path).items():
            parts.setdefault(name, []).append(values)
    if not parts:
        raise ValueError(f"{path}: holds no traces")
    columns = {name: np.concatenate(values) for name, values in parts.items()}
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
    """Whole lines, about half a BLOCK at a time, so that the parser meets none that crosses a border of its own."""
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
    """A parsed block as arrays; `answers` and `sources` grow by what is new in it."""
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
        raise ValueError(f"{path}: a trace has not one source for each committed token, or a batch of nobody")
    times = {name: np.asarray(columns[name]) for name in _TIMES}
    return found | {
        "answer_S": known[inverse_S],
        "seconds_S": times["propose_s"] + times["score_s"] + times["verify_s"] + times["commit_s"],
        "target_S": times["target_forward_s"],
        "draft_S": times["draft_forward_s"],
        "source_C": codes[np.asarray(names.indices)],
    }
