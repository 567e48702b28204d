"""The engine: rows join, are read in chunks, decode together and leave, one round at a time.

A round admits waiting rows, reads one chunk for the rows whose prompt is not read yet, and decodes one step of all
others, so a long prompt does not hold up the rows beside it. The end of a prompt is read by the pass that gives the
row's first token; the drafter reads it after that token was reported. A row's error ends that row only. An error that
is no row's (an interrupt, memory that ran out) leaves all rows as they were before the step: the next round repeats it,
and draws the same random numbers, because those are keyed by position or by the start of the step.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from draftsmith.infer.contract.arguments import at_least
from draftsmith.infer.contract.protocols import Budget, Drafter, Feedback, LearnsAnswers, Rule, Target
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.top_tokens import states_asked
from draftsmith.infer.contract.trace import Generation
from draftsmith.infer.costs.policy import Policy
from draftsmith.infer.engine.named import target_and_drafter
from draftsmith.infer.engine.seats import PassShares, RowEvent, Seat, fair_share, generation_of
from draftsmith.infer.engine.step import step
from draftsmith.infer.rules.named import as_rule

if TYPE_CHECKING:
    from draftsmith.infer.engine.prompts import Prompt

BUDGET = Budget(nodes=64, depth=64)
# Tokens that one round reads of all joining rows together.
CHUNK = 512


class Engine:
    """Decodes rows with `target` and `drafter`.

    Args:
        target: what decides the text; a folder or a Hub name is loaded.
        drafter: what makes it faster; None is plain decoding. One given by name, as for `--drafters`, is loaded and
            bound; one given as an object must be bound to the target.
        batch_size: how many rows are read or decoded at once; others wait.
        budget: the limits of one row's draft in one step.
        rule: the verification rule: token, block (the default), traversal, or one of your own (infer/rules).
        policy: decides how much is worth drafting and verifying; None: by what was measured for these two.
        chunk: how many tokens of joining rows are read per round, all rows together.
        learn: hand finished answers to a drafter that learns from them.
        dtype: of the weights of a target that is loaded.
        device: where to load it.
    """

    def __init__(
        self,
        target: str | Target,
        drafter: str | Drafter | None = None,
        *,
        batch_size: int = 1,
        budget: Budget = BUDGET,
        rule: str | Rule | None = None,
        policy: Policy | None = None,
        chunk: int = CHUNK,
        learn: bool = True,
        dtype: str = "auto",
        device: str = "auto",
    ) -> None:
        at_least(1, batch_size=batch_size, chunk=chunk)
        self.rule, self.budget = as_rule(rule), budget
        self.target, self.drafter = target_and_drafter(target, drafter, dtype, device)
        self.batch_size = batch_size
        self.policy = Policy.of(self.target, self.drafter, batch_size=batch_size) if policy is None else policy
        self.chunk, self.learn = chunk, learn
        self._seats: dict[Row, Seat] = {}
        self._waiting: deque[Row] = deque()
        self._live: list[Row] = []
        self._events: list[RowEvent] = []
        self._followed: dict[Row, RowEvent | None] = {}
        self._at_risk: list[Row] = []
        self._shares = PassShares()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()

    def __len__(self) -> int:
        """The number of rows that the engine holds: waiting, live or kept."""
        return len(self._seats)

    def __contains__(self, row: object) -> bool:
        return row in self._seats

    @property
    def busy(self) -> bool:
        """Whether `step` has anything to do or to report."""
        return bool(self._waiting or self._live or self._events)

    # rows

    def add(self, row: Row, keep: bool = False) -> Row:
        """Queue a row; ValueError if the target cannot decode it. `keep`: hold its cache after its stop (`resume`)."""
        if row in self._seats:
            raise ValueError(f"row {row.key} is in the engine already")
        if row.stop:
            raise ValueError(f"row {row.key} has ended ({row.stop}): give it a new turn, or decode a new row")
        if row.left < 1:
            raise ValueError(f"row {row.key} may generate no further token: raise max_new_tokens")
        row.check(self.target.vocab_size, self.target.max_positions)
        self._seats[row] = Seat(keep, shown=len(row.ids))
        self._waiting.append(row)
        return row

    def resume(self, row: Row, ids: Sequence[int] = (), stops: Stops | None = None) -> Row:
        """Continue a kept row with the tokens of a new turn; ValueError leaves it as it was."""
        if row not in self._seats or not row.stop:
            raise ValueError(f"row {row.key} is not kept in the engine: add it with keep=True and await its stop")
        length = len(row.ids)
        row.ids.extend(ids)
        try:
            row.check(self.target.vocab_size, self.target.max_positions)
        finally:
            del row.ids[length:]
        row.stops = row.stops if stops is None else stops
        row.turn(ids)
        self._seats[row] = self._seats[row].again(len(row.ids))
        self._waiting.append(row)
        return row

    def abort(self, row: Row) -> None:
        """Let a row leave, whether it waits, is being read, decodes or is kept; one that had not ended is reported."""
        if row not in self._seats:
            raise ValueError(f"row {row.key} is not in the engine")
        if not row.stop:
            row.stop = "aborted"
            self._report(row)
        self._drop(row)

    def close(self) -> None:
        """Let all rows leave and forget what was not reported."""
        for row in list(self._seats):
            self._drop(row)
        self._events.clear()

    # decoding

    def step(self) -> list[RowEvent]:
        """One round; what happened since the last one. Where it raises, call it again or `abort` rows."""
        self._round()
        events, self._events = self._events, []
        return events

    def run(
        self,
        rows: Sequence[Row],
        *,
        on_tokens: Callable[[Row, list[int]], None] | None = None,
        on_done: Callable[[Generation], None] | None = None,
        strict: bool = False,
    ) -> list[Generation]:
        """Decode `rows` to their stops; results are in the order given.

        `on_tokens(row, tokens)` is called after every round with what a row has committed, `on_done` when a row ends.
        `strict`: raise the first row's error instead of returning it. Where it raises, the rows have left.
        """
        own, done = set(rows), dict[Row, Generation]()
        if len(own) < len(rows) or any(row in self._seats for row in rows):
            raise ValueError("a row was given twice, or is in the engine already")
        others: list[RowEvent] = []
        try:
            for row in rows:
                self._add_or_report(row)
            while len(done) < len(own):
                events = self.step()
                others += [event for event in events if event.row not in own]
                for event in (event for event in events if event.row in own):
                    if strict and event.problem is not None:
                        raise event.problem
                    if event.tokens and on_tokens is not None:
                        on_tokens(event.row, event.tokens)
                    if event.done is not None:
                        done[event.row] = event.done
                        if on_done is not None:
                            on_done(event.done)
        finally:
            for row in own & self._seats.keys():
                self._drop(row)
            self._events = others + [event for event in self._events if event.row not in own]
        return [done[row] for row in rows]

    def generate(self, prompts: Prompt | Sequence[Prompt], **fields: Any) -> list[Generation]:
        """Answer prompts (texts, conversations or token ids), in order; a prompt that fails has an `error`.

        `fields`: those of transformers' GenerationConfig (max_new_tokens, temperature, top_p, do_sample, ...), `seed`,
        `template` and `system` (infer/engine/prompts.py).
        """
        from draftsmith.infer.engine.prompts import as_prompts, rows_of

        return self.run(rows_of(self.target, as_prompts(prompts), **fields))

    def stream(self, prompt: Row | Prompt, **fields: Any) -> Iterator[int]:
        """The tokens of one row as they commit; other rows decode beside it. Closing the iterator ends the row."""
        from draftsmith.infer.engine.prompts import rows_of

        row = prompt if isinstance(prompt, Row) else rows_of(self.target, [("0", prompt)], **fields)[0]
        if row not in self._seats:
            self.add(row)
        self._followed[row] = None
        return self._follow(row)

    def _follow(self, row: Row) -> Iterator[int]:
        shown = row.prompt_tokens
        try:
            while True:
                ended = self._followed[row]
                tokens = row.ids[shown:]
                yield from tokens
                shown += len(tokens)
                if ended is not None:
                    if ended.problem is not None:
                        raise ended.problem
                    return
                self._round()
        finally:
            self._followed.pop(row)
            if row in self._seats and not row.stop:
                self._drop(row)

    # a round

    def _round(self) -> None:
        self._recover()
        self._join()
        self._read([row for row in self._live if self._is_reading(row)])
        self._catch_up()
        ready = [row for row in self._live if not row.stop and (self._joins(row) or not self._is_reading(row))]
        if ready:
            self._apart(ready, self._decode)
        for row in [row for row in self._live if row.stop or len(row.ids) > self._seats[row].shown]:
            self._report(row)
            if row.stop:
                if self._seats[row].keep:
                    self._live.remove(row)
                else:
                    self._drop(row)
                if self.learn and isinstance(self.drafter, LearnsAnswers) and self.drafter.learns:
                    self.drafter.add_answer(row)

    def _is_reading(self, row: Row) -> bool:
        """Whether the row's turn is still read, or a step is to read its end. A step that failed may have committed."""
        seat = self._seats[row]
        seat.reading = seat.reading and len(row.ids) == seat.shown and (self._joins(row) or self.target.unread(row) > 0)
        return seat.reading

    def _join(self) -> None:
        while self._waiting and len(self._live) < self.batch_size:
            row = self._waiting[0]
            if self._can_share(row):
                return
            if not self._seats[row].admitted:
                try:
                    self._admit(row)
                except Exception as problem:  # whatever it is, it is this row's
                    self._fail(row, problem)
                    continue
            self._live.append(row)
            self._waiting.popleft()

    def _can_share(self, row: Row) -> bool:
        """Whether a row is being read that begins as `row` does: then `row` waits, and shares what is read."""
        if self._seats[row].admitted or states_asked(self.drafter.features):
            return False
        return any(row.begins_as(other) for other in self._live if self._is_reading(other))

    def _admit(self, row: Row) -> None:
        seat = self._seats[row]
        seat.began = time.perf_counter()
        self.target.admit([row], self.drafter.features)
        try:
            self.drafter.open([row])
        except BaseException:
            self.target.release([row])
            raise
        seat.admitted = True
        seat.read_s = time.perf_counter() - seat.began

    def _joins(self, row: Row) -> bool:
        """Whether the next step reads the end of the row's prompt. It stays so if that step fails, and ends with it."""
        return self._seats[row].joins_at == len(row.ids)

    def _read(self, reading: Sequence[Row]) -> None:
        """Read a chunk: as many tokens of each row as it has room for. Last tokens that fit are left to the step."""
        unread = {row: self.target.unread(row) for row in reading[: self.chunk]}
        limit = fair_share([*unread.values()], self.chunk)
        for row in reading:
            self._seats[row].joins_at = len(row.ids) if unread.get(row, limit + 1) <= min(limit, CHUNK) else 0
        rows = [row for row in unread if not self._joins(row)]
        feedback: dict[Row, Feedback] = {}
        began = time.perf_counter()
        if rows:
            self._apart(rows, lambda some: feedback.update(zip(some, self.target.prefill(some, limit), strict=True)))
        took = time.perf_counter() - began
        for row, given in feedback.items():
            self._seats[row].read(took / len(feedback), given)
            self._seats[row].joins_at = 0 if self.target.unread(row) else len(row.ids)  # some read prompts whole

    def _catch_up(self) -> None:
        """Let the drafter read what the target has read of prompts."""
        unheard = {row: given for row in self._live if (given := self._seats[row].unheard) is not None}
        began = time.perf_counter()
        if unheard:
            self._apart(list(unheard), lambda some: self.drafter.read(some, [unheard[row] for row in some]))
        took = time.perf_counter() - began
        for row in unheard.keys() & self._seats.keys():
            self._seats[row].read(took / len(unheard), None)

    def _decode(self, rows: Sequence[Row]) -> None:
        unheard: dict[Row, Feedback | None] = {row: None for row in rows if self._joins(row)}
        traces = step(self.target, self.drafter, rows, self.budget, self.rule, self.policy, unheard)
        read_s = self._shares.book(traces)
        for row, trace in zip(rows, traces):
            self._seats[row].stepped(trace, read_s, unheard.get(row))

    def _apart(self, rows: Sequence[Row], work: Callable[[Sequence[Row]], None]) -> None:
        """Do `work` for all rows; if it raises ValueError, for each row alone, and the row that raises it again ends.

        A row's text does not depend on its batch, so the others' text is the same.
        """
        try:
            with self._undone_on_error(rows):
                work(rows)
        except ValueError as problem:
            if len(rows) == 1:
                self._fail(rows[0], problem)
                return
            for row in rows:
                if not row.stop:
                    self._apart([row], work)

    @contextmanager
    def _undone_on_error(self, rows: Sequence[Row]) -> Iterator[None]:
        self._at_risk = list(rows)
        try:
            yield
        except BaseException:
            self._recover()
            raise
        self._at_risk = []

    def _recover(self) -> None:
        """Drop what a step that failed left behind; a second interrupt may have stopped the first attempt."""
        rows = [row for row in self._at_risk if row in self._seats]
        if rows:
            self.target.abandon(rows)
            self.drafter.abandon(rows)
        self._at_risk = []

    # ends

    def _add_or_report(self, row: Row) -> None:
        try:
            self.add(row)
        except ValueError as problem:
            row.stop = "error"
            self._emit(RowEvent(row, [], generation_of(row, Seat(), str(problem)), problem))

    def _fail(self, row: Row, problem: Exception) -> None:
        row.stop = "error"
        self._report(row, problem)
        self._drop(row)

    def _report(self, row: Row, problem: Exception | None = None) -> None:
        seat = self._seats[row]
        tokens, seat.shown = row.ids[seat.shown :], len(row.ids)
        if tokens and not seat.first_s:
            seat.first_s = time.perf_counter() - seat.began
        error = "" if problem is None else str(problem) or type(problem).__name__
        self._emit(RowEvent(row, tokens, generation_of(row, seat, error) if row.stop else None, problem))

    def _emit(self, event: RowEvent) -> None:
        if event.row not in self._followed:
            self._events.append(event)
        elif event.done is not None:
            self._followed[event.row] = event

    def _drop(self, row: Row) -> None:
        """Release a row in any state."""
        seat = self._seats.pop(row)
        for rows in (self._live, self._waiting):
            if row in rows:
                rows.remove(row)
        if not seat.admitted:
            return
        try:
            self.target.release([row])
        finally:
            self.drafter.close([row])
            self.policy.close([row])
