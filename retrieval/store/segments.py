"""A store of text: a token stream in segments, and what a drafter looks up in it (store_format.py: what a store is).

    000001.tokens     the documents of a segment end to end, a separator behind each (token_stream.py)
    000001.starts     where each document starts
    000001.documents  JSON Lines: each document's id and time
    000001.suffixes   what the kind needs (rest: the backward suffix array); a kind may also have parts of the whole

A reader holds the store.json that it read and maps its files at once; they stay readable under it whatever a writer
does afterwards, because files are replaced by new names and never written twice (store_writer.py). Nothing is read into
memory before it is used. What a drafter makes of the parts is not known here.
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


@dataclass(frozen=True, slots=True)
class Segment:
    name: str
    documents: int
    tokens: int
    parts: dict[str, Part]


@dataclass(slots=True)
class Manifest:
    """What store.json says. `tokens` do not count separators; `parts` belong to the store as a whole; `build` tells the
    seconds that the first building took, all its runs together."""

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
        """What store.json says besides format and kind."""
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


class Filed:
    """An array in an open file, which is closed with the last reference."""

    def __init__(self, number: int, dtype: np.dtype[Any], length: int) -> None:
        self.number = number
        self.dtype = dtype
        self.length = length

    def __del__(self) -> None:
        os.close(self.number)


@dataclass(frozen=True, slots=True)
class OpenSegment:
    """A segment's arrays, mapped: `tokens` is [N] with separators, `starts` is [documents + 1]. `files`: those that
    were asked for as open files too."""

    segment: Segment
    tokens: np.ndarray
    starts: np.ndarray
    arrays: dict[str, np.ndarray]
    files: dict[str, Filed]


class Store:
    """One snapshot of a store, opened for reading."""

    def __init__(self, path: Path, manifest: Manifest, filed: Sequence[str] = ()) -> None:
        self.path = path
        self._filed = filed
        self.manifest = manifest
        self.segments = [self._map_segment(segment) for segment in manifest.segments]
        self.arrays = self._map(manifest.parts)

    @classmethod
    def open(cls, path: str | Path, kind: str = "", check: Check = "sizes", filed: Sequence[str] = ()) -> Store:
        """The store at `path`, of `kind` if one is named; ValueError, in one line, where it is not whole.

        The parts of segments that `filed` names are opened as files as well (stream_access.py).
        """
        path = Path(path).expanduser()
        while True:
            manifest = Manifest.read(path, kind)
            try:
                store = cls(path, manifest, filed)
                if check == "checksums":
                    store.verify()
                return store
            except (FileNotFoundError, ValueError):
                # A writer may have replaced the files since store.json was read; then it has changed too.
                if Manifest.read(path, kind).to_json() == manifest.to_json():
                    raise

    def _map_segment(self, segment: Segment) -> OpenSegment:
        arrays = self._map(segment.parts)
        if not {"tokens", "starts"} <= set(arrays):
            raise ValueError(f"{self.path / MANIFEST} is damaged: segment {segment.name} has no token stream")
        files = {name: self._file(segment.parts[name]) for name in self._filed}
        return OpenSegment(segment, arrays.pop("tokens"), arrays.pop("starts"), arrays, files)

    def _file(self, part: Part) -> Filed:
        return Filed(os.open(self.path / part.file, os.O_RDONLY), np.dtype(part.dtype), part.shape[0])

    def _map(self, parts: dict[str, Part]) -> dict[str, np.ndarray]:
        check_parts(self.path, parts.values())
        return {name: map_part(self.path, part) for name, part in parts.items() if part.dtype}

    def verify(self) -> None:
        """Read every file through; ValueError names the first that differs from what was written."""
        check_parts(self.path, self.manifest.all_parts, "checksums")

    def check_tokenizer(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if tokenizer_fingerprint(tokenizer) != self.manifest.tokenizer:
            raise ValueError(
                f"the store {self.path} was built with another tokenizer than {tokenizer.name_or_path}: "
                "its token ids mean other text; build one with this tokenizer"
            )

    def documents(self) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        """Every document's {id, time} and ids, in the order of the stream."""
        for opened in self.segments:
            yield from self.segment_documents(opened)

    def segment_documents(self, opened: OpenSegment) -> Iterator[tuple[dict[str, Any], np.ndarray]]:
        # Mapped with the rest: the file itself may be gone by now.
        lines = opened.arrays["documents"].tobytes().splitlines()
        for line, start, stop in zip(lines, opened.starts, opened.starts[1:]):
            yield json.loads(line), np.asarray(opened.tokens[start : stop - 1])
