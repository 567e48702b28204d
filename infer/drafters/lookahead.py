"""Lookahead decoding (arXiv 2402.02057): n-grams that the target writes while it decodes, drafted when they fit.

Beside the draft, every pass runs Jacobi iteration over a window of guesses. Its row 0 is a chain of guesses for the
next positions; below the root and below each of them hang the newer guesses for what follows there, a column. The
likeliest token at the end of a column completes an n-gram, which goes into the row's pool under its first token, and
the columns move on by what was committed. The draft is the n-grams of the newest token, newest first. Row 0 and column
0 follow the row's text, so they are tried as well, for nothing; the rest of the window is scored only.

N-grams of the row's own text join the pool. A row's window and pool leave with it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from draftsmith.infer.contract.arguments import at_least
from draftsmith.infer.contract.draft import ROOT, Draft
from draftsmith.infer.contract.protocols import Budget, Feedback, PassTimer, Target, Verdict
from draftsmith.infer.contract.rng import uniform
from draftsmith.infer.contract.row import Row
from draftsmith.infer.contract.top_tokens import TopTokens, no_top
from draftsmith.infer.costs.policy import Policy

# How likely n-grams of the pool, by depth, and guesses of the window are accepted, as far as they say themselves: the
# policy learns what that is worth.
FROM_POOL, DEEPER, FROM_WINDOW = 0.3, 0.6, 0.1


class NgramPool:
    """By first token, the `guesses` continuations that were added last."""

    def __init__(self, guesses: int) -> None:
        self.guesses = guesses
        self.known: dict[int, dict[tuple[int, ...], None]] = {}

    def add(self, first: int, rest: tuple[int, ...]) -> None:
        some = self.known.setdefault(first, {})
        some.pop(rest, None)
        some[rest] = None
        if len(some) > self.guesses:
            del some[next(iter(some))]

    def newest_first(self, first: int) -> list[tuple[int, ...]]:
        return list(self.known.get(first, ()))[::-1]


@dataclass(slots=True)
class Window:
    """One row's window. `columns[j]` holds the guesses from j tokens behind the newest one on, oldest first; the first
    of column 0 is the newest token itself. `upto`: how much of the row's text is in the pool."""

    pool: NgramPool
    columns: list[list[int]] = field(default_factory=list)
    upto: int = 0


class Lookahead:
    """Drafts n-grams that Jacobi iteration found.

    Args:
        window: how many columns of guesses are iterated.
        ngram: the length of an n-gram, its first token included.
        guesses: the most n-grams per first token, and in a draft.
        own_text: also keep the n-grams of the row's own text.
        calibration: how often candidates of each confidence are accepted: a file, auto (what `draftsmith calibrate`
            measured for this target, if it did) or none.
        costs: measured costs of the target's passes: a file, auto or none. With costs, a window and its draft are
            verified as a whole, or not at all.
    """

    name = "lookahead"
    features: tuple[str, ...] = ("top:1",)
    forward_seconds = 0.0
    bytes_moved = 0
    origin = ""

    def __init__(
        self,
        window: int = 7,
        ngram: int = 5,
        guesses: int = 7,
        own_text: bool = True,
        calibration: Any = "auto",
        costs: Any = "auto",
    ) -> None:
        at_least(1, window=window, guesses=guesses)
        at_least(2, ngram=ngram)
        self.window = window
        self.ngram = ngram
        self.guesses = guesses
        self.own_text = own_text
        self.calibration = calibration
        self.costs = costs
        self._windows: dict[Row, Window] = {}

    def pass_timers(self) -> dict[str, PassTimer]:
        return {}

    def bind(self, target: Target) -> None:
        if target.draft_shape != "tree":
            raise ValueError(
                f"{self.name} scores a tree of guesses in every pass, and this target verifies "
                f"{'chains' if target.draft_shape == 'chain' else 'no drafts'}: recycle learns from chains too"
            )

    def open(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._windows[row] = Window(NgramPool(self.guesses))

    def close(self, rows: Sequence[Row]) -> None:
        for row in rows:
            del self._windows[row]

    def abandon(self, rows: Sequence[Row]) -> None:
        pass

    def read(self, rows: Sequence[Row], feedback: Sequence[Feedback]) -> None:
        """A prompt or a new turn: what was guessed for the text before it is dropped."""
        for row, one in zip(rows, feedback):
            if one.count and one.top is None:
                raise no_top(self.name)
            self._windows[row].columns.clear()

    def propose(self, rows: Sequence[Row], budgets: Sequence[Budget], policy: Policy | None = None) -> list[Draft]:
        return [self._draft(row, self._windows[row], budget) for row, budget in zip(rows, budgets)]

    def observe(self, rows: Sequence[Row], verdicts: Sequence[Verdict], feedback: Sequence[Feedback]) -> None:
        for row, verdict, one in zip(rows, verdicts, feedback):
            if one.top is None:
                raise no_top(self.name)
            window = self._windows[row]
            if window.columns:
                self._iterate(window, one.top)
                self._move(row, window, len(verdict.committed))

    # the draft

    def _draft(self, row: Row, window: Window, budget: Budget) -> Draft:
        draft = Draft(whole=True)
        if not budget.nodes or not budget.depth:
            return draft
        if self.own_text:
            self._add_text(row, window)
        if not window.columns:
            window.columns = [[self._any_token(row, j)] for j in range(self.window)]
        columns = self._fitting(window, budget)
        left = budget.nodes - max(sum(map(len, columns)) - 1, 0)
        for rest in window.pool.newest_first(row.ids[-1]):
            chain = rest[: min(budget.depth, left)]
            before, at, confidence = len(draft), ROOT, FROM_POOL
            for token in chain:
                at, confidence = draft.outright(at, token, self.name, confidence), DEEPER
            left -= len(draft) - before
        source, at = f"{self.name}:window", ROOT
        for j, column in enumerate(columns):
            if j:
                at = draft.outright(at, column[0], source, FROM_WINDOW)
            below = at
            for token in column[1:]:
                below = draft.probe(below, token) if j else draft.outright(below, token, source, FROM_WINDOW)
        return draft

    def _fitting(self, window: Window, budget: Budget) -> list[list[int]]:
        """The leading columns that the budget has room for: a column is scored as a whole, or not at all."""
        fitting: list[list[int]] = []
        nodes = -1
        for j, column in enumerate(window.columns):
            nodes += len(column)
            if nodes > budget.nodes or j + len(column) - 1 > budget.depth:
                break
            fitting.append(column)
        return fitting

    # what a pass brought

    def _iterate(self, window: Window, top: TopTokens) -> None:
        """Append to each column that was scored the likeliest token at its end."""
        places = {(parent, token): i for i, (token, parent) in enumerate(zip(top.tokens, top.parents))}
        row_0: int | None = 0
        for j, column in enumerate(window.columns):
            row_0 = places.get((row_0, column[0])) if j and row_0 is not None else row_0
            at = row_0
            for token in column[1:]:
                at = places.get((at, token)) if at is not None else None
            if at is None or top.ids_NK[at, 0] < 0:
                continue
            column.append(int(top.ids_NK[at, 0]))
            if len(column) == self.ngram:
                window.pool.add(top.tokens[0] if j == 0 else column[0], tuple(column[1:]))

    def _move(self, row: Row, window: Window, committed: int) -> None:
        """Shift the window by the committed tokens. A column that is complete loses its oldest guess and so stands for
        the place behind it; the others move to the left."""
        old, new = window.columns, list[list[int]]()
        for j in range(self.window):
            right, left = j + committed, j + committed - 1
            if right < len(old) and len(old[right]) < self.ngram:
                new.append(list(old[right]))
            elif left < len(old) and len(old[left]) > 1:
                new.append(old[left][1:])
            else:
                new.append([self._any_token(row, j)])
        new[0][0] = row.ids[-1]
        window.columns = new

    def _any_token(self, row: Row, column: int) -> int:
        """Where there is no guess yet: some token of the row's text."""
        if not column:
            return row.ids[-1]
        return row.ids[int(uniform(row.settings.seed, row.key, len(row.ids), "lookahead", column) * len(row.ids))]

    def _add_text(self, row: Row, window: Window) -> None:
        ids = row.ids
        for start in range(window.upto, len(ids) - self.ngram + 1):
            window.pool.add(ids[start], tuple(ids[start + 1 : start + self.ngram]))
        window.upto = max(window.upto, len(ids) - self.ngram + 1)
