"""A store of text: a token stream in segments, and what a drafter looks up in it.

    000001.tokens     the documents of a segment end to end, with a separator after each
    000001.starts     where each document starts
    000001.documents  JSON Lines: each document's id and time
    000001.suffixes   rest's backward suffix array; a kind may also have parts for the store as a whole

The separator is the type's largest number and never a token id, so neither a match nor a continuation crosses into
another document. A reader keeps the store.json that it read and maps all files at once. They stay readable whatever a
writer does later, because files are replaced under new names and never rewritten (writer.py).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from draftsmith.infer.text.tokenizer import tokenizer_fingerprint
from draftsmith.retrieval.store.format import (
    MANIFEST,
    Check,
    Part,
    check_parts,
    map_part,
    parts_from_json,
    read_manifest,
    write_manifest,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def stream_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest type for the ids and a separator: 16 bits up to 65,535 ids, else 32."""
    return np.dtype(np.uint16) if vocab_size <= np.iinfo(np.uint16).max else np.dtype(np.uint32)


def separator(dtype: np.dtype[Any]) -> int:
    return int(np.iinfo(dtype).max)


def join(documents: Sequence[np.ndarray], dtype: np.dtype[Any]) -> tuple[np.ndarray, np.ndarray]:
    """Documents of ids -> (stream [N], starts [documents + 1]); document i is stream[starts[i] : starts[i + 1] - 1]."""
    lengths = np.fromiter((len(document) for document in documents), np.int64, len(documents))
    starts = np.zeros(len(documents) + 1, np.int64)
    np.cumsum(lengths + 1, out=starts[1:])
    stream = np.full(starts[-1], separator(dtype), dtype)
    for start, document in zip(starts, documents):
        stream[start : start + len(document)] = document
    return stream, starts


def check_ids(ids: Sequence[int] | np.ndarray, vocab_size: int, where: str) -> np.ndarray:
    """`ids` as int64; ValueError where one is outside the vocabulary."""
    given = np.asarray(ids, dtype=np.int64)
    if given.size and not (0 <= given.min() and given.max() < vocab_size):
        bad = int(given[(given < 0) | (given >= vocab_size)][0])
        raise ValueError(f"{where}: token id {bad} is outside the vocabulary of {vocab_size}")
    return given


@dataclass(frozen=True, slots=True)
class Segment:
    name: str
    documents: int
    tokens: int
    parts: dict[str, Part]


@dataclass(slots=True)
class Manifest:
    """The content of store.json. `tokens` excludes separators; `parts` are those of the store as a whole; `build` has
    the seconds that the first build took, over all its runs."""

    kind: str
    tokenizer: str
    vocab_size: int
    dtype: str
    template: str = ""
    template_name: str = ""
    content: str = ""
    target: str = ""
    segments: list[Segment] = field(default_factory=list)
    parts: dict[str, Part] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    build: dict[str, Any] = field(default_factory=dict)
    next_segment: int = 1

    @property
    def documents(self) -> int:
        return sum(segment.documents for segment in self.segments)

    @property
    def tokens(self) -> int:
        return sum(segment.tokens for segment in self.segments)

    @property
    def all_parts(self) -> list[Part]:
        return [part for group in (self.parts, *(s.parts for s in self.segments)) for part in group.values()]

    @property
    def bytes(self) -> int:
        return sum(part.bytes for part in self.all_parts)

    def to_json(self) -> dict[str, Any]:
        """store.json without format and kind."""
        counts = {"documents": self.documents, "tokens": self.tokens, "segments": len(self.segments)}
        said = asdict(self)
        del said["kind"]
        return {"counts": counts, **said}

    @classmethod
    def from_json(cls, said: dict[str, Any], where: str) -> Manifest:
        try:
            given = {name: said[name] for name in cls.__slots__ if name in said}
            given["segments"] = [
                Segment(**{**segment, "parts": parts_from_json(segment["parts"])}) for segment in given["segments"]
            ]
            given["parts"] = parts_from_json(given.get("parts", {}))
            return cls(**given)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{where} is damaged: {error}") from error

    @classmethod
    def read(cls, path: Path, kind: str = "") -> Manifest:
        return cls.from_json(read_manifest(path, kind), str(path / MANIFEST))

    def publish(self, folder: Path) -> None:
        write_manifest(folder, self.kind, self.to_json())


class OpenFile:
    """An array in an open file, which closes with the last reference."""

    def __init__(self, number: int, dtype: np.dtype[Any], length: int) -> None:
        self.number = number
        self.dtype = dtype
        self.length = length

    def __del__(self) -> None:
        os.close(self.number)


@dataclass(frozen=True, slots=True)
class OpenSegment:
    """A segment's mapped arrays: `tokens` is [N] with separators, `starts` is [documents + 1]. `files`: the parts also
    opened as files."""

    segment: Segment
    tokens: np.ndarray
    starts: np.ndarray
    arrays: dict[str, np.ndarray]
    files: dict[str, OpenFile]


class Store:
    """One snapshot of a store, opened for reading."""

    def __init__(self, path: Path, manifest: Manifest, filed: Sequence[str] = ()) -> None:
        self.path = path
        self.manifest = manifest
        self.segments = [self._map(segment, filed) for segment in manifest.segments]

    @classmethod
    def open(cls, path: str | Path, kind: str = "", check: Check = "sizes", filed: Sequence[str] = ()) -> Store:
        """The store at `path`, of `kind` if given; ValueError if it is incomplete.

        The segment parts named in `filed` are also opened as files (rest/stream_access.py).
        """
        path = Path(path).expanduser()
        while True:
            manifest = Manifest.read(path, kind)
            try:
                check_parts(path, manifest.all_parts, check)
                return cls(path, manifest, filed)
            except (FileNotFoundError, ValueError):
                # A writer may have replaced the files since store.json was read; then store.json has changed too.
                if Manifest.read(path, kind).to_json() == manifest.to_json():
                    raise

    def _map(self, segment: Segment, filed: Sequence[str]) -> OpenSegment:
        arrays = {name: map_part(self.path, part) for name, part in segment.parts.items() if part.dtype}
        if not {"tokens", "starts"} <= set(arrays):
            raise ValueError(f"{self.path / MANIFEST} is damaged: segment {segment.name} has no token stream")
        files = {}
        for name in filed:
            part = segment.parts[name]
            number = os.open(self.path / part.file, os.O_RDONLY)
            files[name] = OpenFile(number, np.dtype(part.dtype), part.shape[0])
        return OpenSegment(segment, arrays.pop("tokens"), arrays.pop("starts"), arrays, files)

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer_fingerprint(tokenizer) != self.manifest.tokenizer:
            raise ValueError(
                f"the store {self.path} was built with another tokenizer than {tokenizer.name_or_path}: "
                "build a store with this one"
            )

    def documents(self) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        """Every document's {id, time} and ids, in the order of the stream."""
        for opened in self.segments:
            yield from self.segment_documents(opened)

    def segment_documents(self, opened: OpenSegment) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        # Read from the mapping: the file itself may be gone by now.
        lines = opened.arrays["documents"].tobytes().splitlines()
        for line, start, stop in zip(lines, opened.starts, opened.starts[1:]):
            yield json.loads(line), np.asarray(opened.tokens[start : stop - 1])
