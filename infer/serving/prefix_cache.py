"""Finished rows whose caches stay with the engine, so that a later prompt that begins as one of them is not read again:
the next turn of a conversation, or another question behind the same system message.

Which row a prompt shares is the target's own choice (`Row.begins_as`); here is decided which rows stay.
"""

from __future__ import annotations

from collections.abc import Iterable

from draftsmith.infer.contract.row import SHARED_BY, Row
from draftsmith.infer.engine.engine import Engine


class PrefixCache:
    """Finished rows that `engine` keeps, least recently used first, of at most `tokens` tokens together."""

    def __init__(self, engine: Engine, tokens: int) -> None:
        self._engine = engine
        self._most = tokens
        self._rows: dict[Row, None] = {}

    def __len__(self) -> int:
        return len(self._rows)

    @property
    def tokens(self) -> int:
        return sum(len(row.ids) for row in list(self._rows))  # a copy: another thread may ask

    def shared_by(self, row: Row, live: Iterable[Row] = ()) -> int:
        """How many tokens of a row that joins now are in the cache; the row that has them counts as used."""
        best = max(self._rows, key=row.begins_as, default=None)
        found = row.begins_as(best) if best is not None else 0
        if best is not None and found:
            del self._rows[best]
            self._rows[best] = None
        return max([found, *(row.begins_as(other) for other in live)])

    def add(self, row: Row) -> None:
        """Keep a row that has ended, if it is long enough to be shared, and drop those that it continues."""
        if not _lots(len(row.ids)):
            self._engine.abort(row)
            return
        within = [kept for kept in self._rows if row.begins_as(kept) >= _lots(len(kept.ids))]
        for kept in within:
            self._drop(kept)
        self._rows[row] = None
        while self.tokens > self._most:
            self._drop(next(iter(self._rows)))

    def clear(self) -> None:
        for row in list(self._rows):
            self._drop(row)

    def _drop(self, row: Row) -> None:
        del self._rows[row]
        self._engine.abort(row)


def _lots(tokens: int) -> int:
    """The most tokens that another row can share of one with `tokens` tokens: whole lots, without its newest."""
    return (tokens - 1) - (tokens - 1) % SHARED_BY
