"""The one thread that owns the engine: rows come in from other threads, and what becomes of them goes back.

Rows wait here, not in the engine, so that the queue has a length and a time limit. A round lets rows in, decodes one
step of all of them, and reports.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from draftsmith.infer.contract.row import Row
from draftsmith.infer.contract.top_tokens import states_asked
from draftsmith.infer.contract.trace import Generation
from draftsmith.infer.engine.engine import Engine
from draftsmith.infer.engine.seats import RowEvent
from draftsmith.infer.serving.errors import ApiError, failed, overloaded, unavailable
from draftsmith.infer.serving.metrics import ServerMetrics
from draftsmith.infer.serving.noted_logprobs import LogprobsRule, TokenLogprobs
from draftsmith.infer.serving.prefix_cache import PrefixCache

log = logging.getLogger(__name__)

# A step that fails is repeated: it drew the same numbers, and what failed may have passed (memory that was short).
TRIES = 2
LONGEST_RETRY_S = 60.0


@dataclass(frozen=True, slots=True)
class RowNews:
    """What happened to a row since the last news. `stop`: why it ended, empty while it is live."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    stop: str = ""
    error: ApiError | None = None

    @property
    def last(self) -> bool:
        return bool(self.stop) or self.error is not None


@dataclass(eq=False, slots=True)
class Ticket:
    """A row that a client waits for. `deliver` is called in the engine's thread, and must return at once.

    `top_logprobs`: how many of the likeliest tokens to report beside each; None: no log-probabilities. `cached`: how
    many tokens of its prompt were in the cache when it joined.
    """

    row: Row
    deliver: Callable[[RowNews], None]
    top_logprobs: int | None = None
    arrived: float = field(default_factory=time.monotonic)
    began: float = 0.0
    shown: int = 0
    cached: int = 0


class EngineThread:
    """Decodes tickets' rows with `engine`, whose rule must be `rule`.

    Args:
        queue: how many rows may wait for a seat.
        queue_s: how long a row may wait for one.
        prefix_cache: how many tokens of finished rows to keep in the cache.
        drafter: the name for the metrics.
    """

    def __init__(
        self,
        engine: Engine,
        rule: LogprobsRule,
        metrics: ServerMetrics,
        *,
        queue: int = 64,
        queue_s: float = 60.0,
        prefix_cache: int = 0,
    ) -> None:
        assert engine.rule is rule
        self.engine, self.rule, self.metrics = engine, rule, metrics
        self.queue, self.queue_s = queue, queue_s
        self.cache = PrefixCache(engine, prefix_cache) if prefix_cache and shares_prefixes(engine) else None
        self._changed = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._cancelled: list[Ticket] = []
        self._active: dict[Row, Ticket] = {}
        self._ending = self._aborting = False
        self._failures = 0
        self._row_s = 1.0  # how long a row takes, lately
        metrics.watch(lambda: self.state()["rows"], lambda: self.state()["waiting"], self._kept_tokens)
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def ending(self) -> bool:
        return self._ending

    def state(self) -> dict[str, int]:
        """How many rows decode, wait, and are kept."""
        kept = len(self.cache) if self.cache is not None else 0
        return {"rows": len(self._active), "waiting": len(self._waiting), "kept": kept}

    def _kept_tokens(self) -> int:
        return self.cache.tokens if self.cache is not None else 0

    def submit(self, tickets: Sequence[Ticket]) -> None:
        """Queue rows, all or none; ApiError if there is no room, or the server is going down."""
        with self._changed:
            if self._ending or not self.alive:
                raise unavailable("this server is shutting down" if self._ending else "the engine has stopped")
            if len(tickets) > self.most_rows:
                raise ApiError(
                    400, f"this asks for {len(tickets)} rows at once, and this server takes {self.most_rows}"
                )
            if len(self._active) + len(self._waiting) + len(tickets) > self.most_rows:
                raise overloaded(f"{len(self._waiting)} rows are waiting already: try again later", self.retry_after_s)
            self._waiting.extend(tickets)
            self._changed.notify()

    @property
    def most_rows(self) -> int:
        return self.engine.batch_size + self.queue

    @property
    def retry_after_s(self) -> float:
        """When there should be room again: as long as the rows that wait take, by those that ended lately."""
        turns = (len(self._waiting) + 1) / self.engine.batch_size
        return min(max(turns * self._row_s, 1.0), LONGEST_RETRY_S)

    def cancel(self, tickets: Iterable[Ticket]) -> None:
        """Let these rows leave, wherever they are; nothing more is delivered of them once they have."""
        with self._changed:
            self._cancelled.extend(tickets)
            self._changed.notify()

    def finish(self) -> None:
        """Take no further rows, and end after the last one."""
        with self._changed:
            self._ending = True
            self._changed.notify()

    def abort(self) -> None:
        """End now: rows that are not finished get an error."""
        with self._changed:
            self._ending = self._aborting = True
            self._changed.notify()

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait until the thread has ended; whether it has."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    # the thread

    def _run(self) -> None:
        try:
            while self._go_on():
                self._round()
            self._fail_all(unavailable("this server is shutting down"))
        except BaseException:
            log.exception("the engine's thread has ended")
            self._ending = True
            self._fail_all(failed("the engine has stopped"))
        finally:
            if self.cache is not None:
                self.cache.clear()
            self.engine.close()

    def _go_on(self) -> bool:
        """Wait for something to do; False when it is time to end."""
        with self._changed:
            while not (self._waiting or self._cancelled or self.engine.busy or self._ending):
                self._changed.wait()
            return not self._aborting and (not self._ending or bool(self._waiting or self._active or self.engine.busy))

    def _round(self) -> None:
        self._let_cancelled_leave()
        self._join_rows()
        if self.engine.busy:
            self._step()

    def _step(self) -> None:
        began = time.perf_counter()
        try:
            events = self.engine.step()
        except Exception as problem:
            self._failures += 1
            log.exception("a step failed (%d of %d tries)", self._failures, TRIES)
            if self._failures >= TRIES:
                self._fail_all(failed(f"decoding failed: {type(problem).__name__}"), waiting=False)
            return
        self._failures = 0
        self.metrics.step_seconds(time.perf_counter() - began)
        for event in events:
            self._report(event)

    def _let_cancelled_leave(self) -> None:
        with self._changed:
            cancelled, self._cancelled = self._cancelled, []
            for ticket in cancelled:
                if ticket in self._waiting:
                    self._waiting.remove(ticket)
        for ticket in cancelled:
            if self._active.pop(ticket.row, None) is not None:
                self._forget(ticket.row)
                self.metrics.aborted()

    def _forget(self, row: Row) -> None:
        self.rule.forget(row)
        if row in self.engine:
            self.engine.abort(row)

    def _join_rows(self) -> None:
        """Give free seats to waiting rows, in order; those that have waited for too long get an error."""
        late = time.monotonic() - self.queue_s
        while True:
            with self._changed:
                if not self._waiting or (
                    self._waiting[0].arrived >= late and len(self._active) >= self.engine.batch_size
                ):
                    return
                ticket = self._waiting.popleft()
            if ticket.arrived < late:
                waited = f"no seat was free within {self.queue_s:g} s: try again later"
                self._deliver(ticket, RowNews(error=unavailable(waited, self.retry_after_s)))
                continue
            self._begin(ticket)

    def _begin(self, ticket: Ticket) -> None:
        ticket.began = time.monotonic()
        if self.cache is not None:
            ticket.cached = self.cache.shared_by(ticket.row, self._active)
        if ticket.top_logprobs is not None:
            self.rule.note(ticket.row, ticket.top_logprobs)
        self._active[ticket.row] = ticket
        try:
            self.engine.add(ticket.row, keep=self.cache is not None)
        except ValueError as problem:
            self._end(ticket, RowNews(error=ApiError(400, str(problem))))

    def _report(self, event: RowEvent) -> None:
        ticket = self._active.get(event.row)
        if event.done is not None:
            self._count(event.done)
        if ticket is None:  # its client has gone
            return
        if event.tokens and not ticket.shown:
            self.metrics.first_token(time.monotonic() - ticket.arrived, ticket.row.prompt_tokens, ticket.cached)
        self.metrics.new_tokens(len(event.tokens))
        logprobs: list[TokenLogprobs] = []
        if ticket.top_logprobs is not None:
            start = ticket.row.prompt_tokens + ticket.shown
            logprobs = self.rule.take(ticket.row, start, len(event.tokens))
        ticket.shown += len(event.tokens)
        if event.problem is not None:
            self._end(ticket, RowNews(error=failed(str(event.problem))))
        elif event.done is not None:
            self._row_s += 0.2 * (time.monotonic() - ticket.began - self._row_s)
            if self.cache is not None:
                self.cache.add(ticket.row)
            self._end(ticket, RowNews(event.tokens, logprobs, event.done.stop), kept=True)
        else:
            self._deliver(ticket, RowNews(event.tokens, logprobs))

    def _count(self, done: Generation) -> None:
        self.metrics.row_ended(self.engine.drafter.name, done.traces)

    def _end(self, ticket: Ticket, news: RowNews, kept: bool = False) -> None:
        self._active.pop(ticket.row, None)
        try:
            if kept:
                self.rule.forget(ticket.row)
            else:
                self._forget(ticket.row)
        finally:
            self._deliver(ticket, news)

    def _fail_all(self, error: ApiError, waiting: bool = True) -> None:
        self._failures = 0
        for ticket in list(self._active.values()):
            self._end(ticket, RowNews(error=error))
        while waiting and self._waiting:
            self._deliver(self._waiting.popleft(), RowNews(error=error))

    def _deliver(self, ticket: Ticket, news: RowNews) -> None:
        try:
            ticket.deliver(news)
        except Exception:  # a client's trouble is not the other rows'
            log.exception("news of a row could not be delivered")


def shares_prefixes(engine: Engine) -> bool:
    """Whether rows share what was read of a common beginning. Not with a drafter that reads the target's states of
    every token, nor with a target whose state is a sum over all tokens."""
    return engine.target.draft_shape == "tree" and not states_asked(engine.drafter.features)
