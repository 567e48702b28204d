"""Conversations as token ids on disk: rendered once as the model is served, then memory-mapped.

A cache folder is named by a hash of all that decides its content: the files' bytes (for a data set on the Hub its
commit), the template with its tokenizer, the length limit. It is written beside its place and renamed, so an existing
folder is complete.

Truncation keeps a prefix of the served tokens and drops unlearned tokens from its end; turns that fit are kept exactly.
Plain text has no turns and is used whole, in pieces.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from draftsmith.infer.files.atomic import folder_beside
from draftsmith.infer.text.read_files import find_source
from draftsmith.infer.text.records import ReadReport, Record, read_records
from draftsmith.infer.text.templates import Rendered, Template, render_record

FORMAT = 2
SHOWN = 3
TEXT_PROMPT = 32


@dataclass(frozen=True, slots=True)
class Corpus:
    """Samples in reading order. Sample i is tokens[offsets[i] : offsets[i + 1]]; `masks` is 1 on learned tokens.

    `groups` are equal for samples of one conversation and for conversations with the same beginning; `times` are
    seconds since 1970, NaN where a row has none.
    """

    tokens: np.ndarray
    masks: np.ndarray
    offsets: np.ndarray
    groups: np.ndarray
    times: np.ndarray
    loss_counts: np.ndarray
    report: dict[str, Any]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        return np.diff(self.offsets)

    def sample(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """(token ids, loss mask) of sample i."""
        start, end = int(self.offsets[i]), int(self.offsets[i + 1])
        return self.tokens[start:end], self.masks[start:end]

    def prompt(self, i: int) -> list[int]:
        """The tokens before the first learned token of sample i; for plain text, its start."""
        tokens, mask = self.sample(i)
        first = int(np.argmax(mask))
        return [int(token) for token in tokens[: first if first > 1 else min(TEXT_PROMPT, len(tokens) - 1)]]


def truncate(sample: Rendered, max_length: int) -> Rendered | None:
    """The first `max_length` tokens up to the last learned one; None if nothing is left to learn.

    A learned first token does not count: it has no predecessor.
    """
    mask = sample.loss_mask[:max_length]
    end = max((i + 1 for i, learned in enumerate(mask) if learned), default=0)
    return Rendered(sample.token_ids[:end], mask[:end]) if end > 1 else None


def pieces(sample: Rendered, max_length: int) -> list[Rendered]:
    """Plain text in pieces of `max_length` tokens; unlike an answer it may begin anywhere."""
    starts = range(0, len(sample.token_ids), max_length)
    return [Rendered(sample.token_ids[at : at + max_length], sample.loss_mask[at : at + max_length]) for at in starts]


def load_corpus(
    data: Sequence[str], template: Template, *, max_length: int, cache: Path, limit: int | None = None
) -> Corpus:
    """The corpus of `data`, from the cache, which is filled first if needed."""
    if max_length < 2:
        raise ValueError(f"max_length is {max_length}: it must be at least 2")
    folder = cache / corpus_key(data, template, max_length, limit)
    if not (folder / "report.json").is_file():
        _build(folder, data, template, max_length, limit)
    report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    arrays = {name: np.load(folder / f"{name}.npy") for name in ("offsets", "groups", "times", "loss_counts")}
    tokens = np.memmap(folder / "tokens.bin", dtype=np.int32, mode="r")
    masks = np.memmap(folder / "masks.bin", dtype=np.uint8, mode="r")
    return Corpus(tokens, masks, report=report, **arrays)


def corpus_key(data: Sequence[str], template: Template, max_length: int, limit: int | None) -> str:
    """A hash of all that decides the content of the corpus."""
    what: list[Any] = [FORMAT, template.fingerprint(), max_length, limit]
    for name in data:
        source = find_source(name)
        hub = source.hub and [source.hub, source.split, _hub_commit(source.hub)]
        what.append(hub or [_file_hash(path) for path in source.files])
    return hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]


def _hub_commit(name: str) -> str:
    """The commit that `datasets` will read: the newest or, offline, that of its local copy."""
    import datasets

    try:
        return str(datasets.load_dataset_builder(name).hash)
    except (OSError, ValueError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{name}: cannot determine which commit of this data set to read: {first}") from error


def _file_hash(path: Path) -> list[str]:
    with path.open("rb") as file:
        return [path.name, hashlib.file_digest(file, "sha256").hexdigest()]


def _build(folder: Path, data: Sequence[str], template: Template, max_length: int, limit: int | None) -> None:
    try:
        with folder_beside(folder) as part:
            _write(part, data, template, max_length, limit)
    except ValueError:
        # Another process was faster; its folder has the same content.
        if not (folder / "report.json").is_file():
            raise


def _write(folder: Path, data: Sequence[str], template: Template, max_length: int, limit: int | None) -> None:
    report = ReadReport()
    writer = _Writer(template, max_length)
    with (folder / "tokens.bin").open("wb") as tokens, (folder / "masks.bin").open("wb") as masks:
        for record in read_records(data, limit=limit, on_bad="skip", report=report):
            writer.add(record, tokens, masks)
    if not writer.loss_counts:
        reasons = "; ".join(line for line in writer.lines()) or "; ".join(report.lines())
        raise ValueError(f"no usable row in {', '.join(data)}: {reasons}")
    for name, dtype in (("offsets", np.int64), ("groups", np.uint64), ("times", np.float64)):
        np.save(folder / f"{name}.npy", np.asarray(getattr(writer, name), dtype=dtype))
    np.save(folder / "loss_counts.npy", np.asarray(writer.loss_counts, dtype=np.int64))
    facts = {**report.to_json(), "rendering": writer.to_json(), "lines": [*report.lines(), *writer.lines()]}
    (folder / "report.json").write_text(json.dumps(facts, indent=2, ensure_ascii=False), encoding="utf-8")


class _Writer:
    """Renders records and counts the samples, the cuts and the refusals."""

    def __init__(self, template: Template, max_length: int) -> None:
        self.template = template
        self.max_length = max_length
        self.offsets = [0]
        self.groups: list[int] = []
        self.times: list[float] = []
        self.loss_counts: list[int] = []
        self.cut = 0
        self.refused: dict[str, list[str]] = {}

    def add(self, record: Record, tokens: BinaryIO, masks: BinaryIO) -> None:
        try:
            samples = render_record(self.template, record)
        except ValueError as error:
            self._refuse(str(error), record)
            return
        if record.text and not record.token_ids:
            samples = [piece for sample in samples for piece in pieces(sample, self.max_length)]
        for whole in samples:
            sample = truncate(whole, self.max_length)
            if sample is None:
                self._refuse(f"nothing to learn within the first {self.max_length} tokens", record)
                continue
            self.cut += len(whole.token_ids) > self.max_length
            tokens.write(np.asarray(sample.token_ids, dtype=np.int32).tobytes())
            masks.write(np.asarray(sample.loss_mask, dtype=np.uint8).tobytes())
            self.offsets.append(self.offsets[-1] + len(sample.token_ids))
            self.groups.append(group_of(record))
            self.times.append(float("nan") if record.time is None else record.time)
            self.loss_counts.append(sum(sample.loss_mask[1:]))

    def _refuse(self, reason: str, record: Record) -> None:
        self.refused.setdefault(reason, []).append(f"{record.source} row {record.row}")

    def lines(self) -> list[str]:
        lines = [f"{len(self.loss_counts)} sequences, {self.offsets[-1]} tokens, {sum(self.loss_counts)} to learn"]
        if self.cut:
            lines.append(f"{self.cut} sequences were cut to {self.max_length} tokens")
        for reason, places in self.refused.items():
            more = ", ..." if len(places) > SHOWN else ""
            lines.append(f"not used: {len(places)} x {reason}: {', '.join(places[:SHOWN])}{more}")
        return lines

    def to_json(self) -> dict[str, Any]:
        refused = {reason: {"count": len(at), "places": at[:SHOWN]} for reason, at in self.refused.items()}
        sizes = {"sequences": len(self.loss_counts), "tokens": self.offsets[-1], "loss_tokens": sum(self.loss_counts)}
        return {**sizes, "cut": self.cut, "not_used": refused}


def group_of(record: Record) -> int:
    """Equal for conversations with the same beginning, so that none is both trained on and held out."""
    start = [[message.role, message.content] for message in record.prompt] or record.text or record.prompt_token_ids
    digest = hashlib.sha256(json.dumps(start or record.token_ids).encode()).digest()
    return int.from_bytes(digest[:8], "big")


def split(corpus: Corpus, held_out: float, by: str = "conversation") -> tuple[np.ndarray, np.ndarray]:
    """(sample indices to train on, held-out ones): by a hash of the conversation, or the newest by time."""
    if not 0 <= held_out < 1:
        raise ValueError(f"held_out is {held_out}: give a share, at least 0 and below 1")
    if by == "conversation":
        # Only the hash decides, so a conversation stays on its side when the corpus grows.
        out = (corpus.groups >> np.uint64(11)).astype(np.float64) / 2.0**53 < held_out
    elif by == "time":
        if np.isnan(corpus.times).any():
            raise ValueError(f"split by time: {int(np.isnan(corpus.times).sum())} sequences have no time")
        newest = np.sort(corpus.times)[::-1]
        count = round(held_out * len(corpus))
        out = corpus.times >= newest[count - 1] if count else np.zeros(len(corpus), dtype=bool)
    else:
        raise ValueError(f"split by {by!r}: choose conversation or time")
    kept = np.flatnonzero(~out)
    if not len(kept):
        raise ValueError("every conversation is held out, which leaves none to train on: lower held_out")
    return kept, np.flatnonzero(out)
