"""Cut documents into segments of about as many tokens, and write a segment's files."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from draftsmith.retrieval.store.documents import Document
from draftsmith.retrieval.store.format import write_array
from draftsmith.retrieval.store.segments import Segment, join

CHUNK_TOKENS = 16_000_000

MakeParts = Callable[[np.ndarray, np.ndarray], dict[str, np.ndarray]]


@dataclass(frozen=True, slots=True)
class Cut:
    """The documents of a segment, made from `records` records of which the first has the number `first`."""

    number: int
    first: int
    records: int
    documents: list[Document]


@dataclass(slots=True)
class Cutter:
    """Takes the documents of one record after the other. `number`: of the segment that is being filled."""

    chunk_tokens: int
    number: int = 1
    first: int = 0
    records: int = 0
    tokens: int = 0
    documents: list[Document] = field(default_factory=list)

    def add(self, batch: list[Document]) -> Cut | None:
        """The segment, if these documents fill it."""
        self.records += 1
        self.documents.extend(batch)
        self.tokens += sum(len(document.ids) for document in batch)
        return self.rest() if self.tokens >= self.chunk_tokens else None

    def rest(self) -> Cut | None:
        """The segment with what there is, if any."""
        if not self.documents:
            return None
        cut = Cut(self.number, self.first, self.records, self.documents)
        self.skip(self.records)
        return cut

    def skip(self, records: int) -> None:
        """Begin the next segment `records` records further on."""
        self.number, self.first = self.number + 1, self.first + records
        self.records, self.tokens, self.documents = 0, 0, []


def write_segment(folder: Path, dtype: np.dtype[Any], make_parts: MakeParts, cut: Cut) -> Segment:
    """Each file is whole or absent."""
    name, documents = f"{cut.number:06d}", cut.documents
    stream, starts = join([document.ids for document in documents], dtype)
    metas = [{"id": document.id} | ({} if document.time is None else {"time": document.time})
             for document in documents]  # fmt: skip
    lines = "".join(json.dumps(meta) + "\n" for meta in metas).encode()
    arrays = {"tokens": stream, "starts": starts, **make_parts(stream, starts)}
    parts = {kind: write_array(folder, f"{name}.{kind}", array) for kind, array in arrays.items()}
    parts["documents"] = write_array(folder, f"{name}.documents", np.frombuffer(lines, np.uint8))
    return Segment(name, len(documents), len(stream) - len(documents), parts)
