"""What the engine keeps of each row and reports of it, and how rows that join share a chunk."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from draftsmith.infer.contract.row import Row
from draftsmith.infer.contract.trace import Generation, StepTrace


@dataclass(frozen=True, slots=True)
class RowEvent:
    """What happened to a row: the tokens that it committed, and how it ended, if it did.

    `problem` is the exception behind a generation with an `error`.
    """

    row: Row
    tokens: list[int]
    done: Generation | None = None
    problem: Exception | None = None


@dataclass(slots=True)
class Seat:
    """What the engine knows of a row. `shown`: how many of its ids were reported; `keep`: stays after its stop;
    `reading`: its prompt or new turn is not read yet."""

    keep: bool = False
    admitted: bool = False
    reading: bool = True
    shown: int = 0
    began: float = 0.0
    first_s: float = 0.0
    read_s: float = 0.0
    traces: list[StepTrace] = field(default_factory=list)


def fair_share(unread: Sequence[int], chunk: int) -> int:
    """The most tokens to read of each row, so that all rows together read at most `chunk`; short rows leave more."""
    left, limit = chunk, 0
    for done, tokens in enumerate(sorted(unread)):
        limit = left // (len(unread) - done)
        if tokens >= limit:
            return max(limit, 1)
        left -= tokens
    return max(unread)


def generation_of(row: Row, seat: Seat, error: str = "") -> Generation:
    return Generation(
        row=row.key,
        token_ids=row.new_ids,
        stop=row.stop,
        prompt_tokens=row.prompt_tokens,
        text="" if row.tokenizer is None else str(row.tokenizer.decode(row.new_ids, skip_special_tokens=True)),
        traces=seat.traces,
        first_s=seat.first_s,
        prefill_s=seat.read_s,
        seconds=time.perf_counter() - seat.began if seat.began else 0.0,
        error=error,
    )
