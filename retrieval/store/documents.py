"""The documents of a store: token ids from any record that the reader knows, with an id and a time.

`answers` keeps what a model emitted, one document per answer; `all` keeps whole conversations as rendered. Text outside
a conversation is one document either way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from draftsmith.infer.text.records import OnBad, ReadReport, Record, read_records
from draftsmith.infer.text.templates import Rendered, Template, find_template, render_record
from draftsmith.infer.text.tokenizer import Encoder
from draftsmith.retrieval.store.segments import check_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Content = Literal["answers", "all"]


@dataclass(frozen=True, slots=True)
class Document:
    """`ids` is [T] int64; `time` is seconds since 1970, if the record has it."""

    id: str
    ids: np.ndarray
    time: float | None = None


@dataclass(frozen=True, slots=True)
class RecordDocuments:
    """Turns records into documents; one can be sent to a worker."""

    template: Template
    vocab_size: int
    content: Content

    def __call__(self, record: Record, report: ReadReport) -> list[Document]:
        """Empty for a record without tokens; `report` says why."""
        where = f"{record.source} row {record.row}"
        try:
            pieces = [piece for sample in self._samples(record) for piece in self._pieces(sample)]
        except ValueError as error:
            report.note(f"not rendered: {error}", where)
            return []
        documents = [
            Document(record.id, check_ids(piece, self.vocab_size, where), record.time) for piece in pieces if piece
        ]
        if not documents:
            report.note("it has no tokens", where)
        return documents

    def _samples(self, record: Record) -> Iterator[Rendered]:
        if record.outputs and not record.messages and not record.token_ids:
            encoder = Encoder(self.template.tokenizer, add_special_tokens=False)
            end = self.template.tokenizer.eos_token or ""
            for answer in record.outputs:
                ids = encoder.continuation([], encoder.without_end(answer) + end)
                yield Rendered(ids, [1] * len(ids))
            return
        yield from render_record(self.template, record)

    def _pieces(self, sample: Rendered) -> Iterator[list[int]]:
        """The whole sample, or each run of emitted tokens."""
        if self.content == "all":
            yield sample.token_ids
            return
        piece: list[int] = []
        for token, emitted in zip(sample.token_ids, sample.loss_mask):
            if emitted:
                piece.append(token)
            elif piece:
                yield piece
                piece = []
        yield piece


@dataclass(slots=True)
class DocumentReader:
    """The records of `sources`, and the documents that are made of them."""

    sources: Sequence[str]
    documents: RecordDocuments
    report: ReadReport
    on_bad: OnBad = "raise"
    limit: int | None = None

    @property
    def template(self) -> Template:
        return self.documents.template

    def records(self) -> Iterator[Record]:
        return read_records(self.sources, on_bad=self.on_bad, limit=self.limit, report=self.report)

    def __call__(self, skip: int = 0) -> Iterator[list[Document]]:
        """The documents of each record."""
        return (self.documents(record, self.report) for record in islice(self.records(), skip, None))


def open_reader(
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    content: Content,
    on_bad: OnBad = "raise",
    limit: int | None = None,
) -> DocumentReader:
    """The documents of files, folders and data sets, for a tokenizer."""
    vocab_size = max(tokenizer.get_vocab().values()) + 1
    documents = RecordDocuments(find_template(template, tokenizer), vocab_size, content)
    return DocumentReader(sources, documents, ReadReport(), on_bad, limit)


def stamp(sources: Sequence[str]) -> list[Any]:
    """Names, sizes and modification times, by which a resumed build sees whether its sources changed."""
    found: list[Any] = []
    for name in sources:
        path = Path(name).expanduser()
        files = sorted(path.rglob("*")) if path.is_dir() else [path]
        found.append([name, [[str(f), f.stat().st_size, f.stat().st_mtime_ns] for f in files if f.is_file()]])
    return found
