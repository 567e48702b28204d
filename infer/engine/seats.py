"""What the engine keeps of each row and reports of it, and how rows that join share a chunk."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from draftsmith.infer.contract.protocols import Feedback
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
    `reading`: no step has read the end of its turn yet; `joins_at`: with how many ids a step is to read the end of it;
    `unheard`: what the target has read of it and the drafter has not."""

    keep: bool = False
    admitted: bool = False
    reading: bool = True
    joins_at: int = 0
    shown: int = 0
    began: float = 0.0
    first_s: float = 0.0
    read_s: float = 0.0
    unheard: Feedback | None = None
    traces: list[StepTrace] = field(default_factory=list)

    def read(self, seconds: float, unheard: Feedback | None) -> None:
        """A part of the prompt was read; `unheard`: what of it the drafter has not read."""
        self.read_s += seconds
        self.unheard = unheard

    def stepped(self, trace: StepTrace, read_s: float, unheard: Feedback | None) -> None:
        """A step was decoded; if it read the end of the prompt, that took `read_s`."""
        self.traces.append(trace)
        self.reading = False
        self.read(read_s if trace.read else 0.0, unheard)

    def again(self, shown: int) -> Seat:
        """The seat of a kept row whose next turn begins now."""
        return Seat(keep=True, admitted=True, shown=shown, began=time.perf_counter(), unheard=self.unheard)


def fair_share(unread: Sequence[int], chunk: int) -> int:
    """The most tokens to read of each row, so that all rows together read at most `chunk`; short rows leave more."""
    left, limit = chunk, 0
    for done, tokens in enumerate(sorted(unread)):
        limit = left // (len(unread) - done)
        if tokens >= limit:
            return max(limit, 1)
        left -= tokens
    return max(unread, default=0)


class PassShares:
    """Splits the seconds of passes that decode and read the ends of prompts too.

    Such a step counts as the step of decoding that it is: as long as the last one that read no prompt. The rest of the
    pass is prefill. Before there was one, seconds are shared by tokens."""

    def __init__(self) -> None:
        self._last: float | None = None

    def book(self, traces: Sequence[StepTrace]) -> float:
        """Cut the traces of one step to their seconds of decoding; how long each row with a prompt was read."""
        reading = sum(trace.read > 0 for trace in traces)
        spent = traces[0].score_s
        if not reading:
            self._last = spent
            return 0.0
        tokens = sum(1 + trace.nodes for trace in traces)
        decoding = spent * tokens / (tokens + sum(trace.read for trace in traces))
        if self._last is not None:
            decoding = min(self._last, spent)
        for trace in traces:
            trace.score_s = decoding
            trace.target_forward_s *= decoding / spent if spent else 1.0
        return (spent - decoding) / reading


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
