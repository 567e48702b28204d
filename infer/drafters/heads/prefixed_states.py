"""The states that Hydra++ heads start from: the target's, after one decoder layer of the heads' own.

The layer attends to the target's states at all accepted positions; of drafted ones it keeps nothing. States wait until
a draft, or a prompt's reading, wants them.

Legend: n states of a row, H width.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from draftsmith.infer.contract.protocols import Feedback
from draftsmith.infer.contract.row import Row
from draftsmith.infer.models.positions import max_positions
from draftsmith.infer.models.runner.entries import Entries
from draftsmith.infer.models.runner.masks import MaskPlan
from draftsmith.infer.models.runner.model_runner import PREFILL_CHUNK, ModelRunner

log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Prefixed:
    """Of one row: the states that were not run yet, and the last one that was, after the layer. `lost`: some that the
    target had are missing."""

    waiting: torch.Tensor
    newest_H: torch.Tensor
    lost: bool = False


class PrefixedStates:
    """Has the methods of NewestStates. `prefix`: the layer, where it will run."""

    def __init__(self, feature: str, prefix: Any) -> None:
        self.feature = feature
        self.lm = ModelRunner(prefix, MaskPlan())
        self.max_positions = max_positions(prefix.config)
        self._nothing = torch.empty((0, prefix.config.hidden_size), dtype=self.lm.dtype, device=self.lm.device)
        self._rows: dict[Row, _Prefixed] = {}

    def open(self, row: Row, nodes: int) -> None:
        if len(row.ids) < self.max_positions:
            self._rows[row] = _Prefixed(self._nothing, self._nothing)
            self.lm.open(row, len(row.ids) + nodes)

    def close(self, rows: Sequence[Row]) -> None:
        for row in rows:
            if self._rows.pop(row, None) is not None:
                self.lm.close(row)

    def abandon(self, row: Row) -> None:
        """Drop the states that `row.ids` does not hold."""
        if row in self._rows:
            self._cut(row, len(row.ids) - 1)

    def take(self, rows: Sequence[Row], feedback: Sequence[Feedback]) -> None:
        """Note what has entered the target's cache."""
        for row, given in zip(rows, feedback):
            states_TH = given.features.get(self.feature)
            if row not in self._rows or states_TH is None or not len(states_TH):
                continue
            held = self._rows[row]
            if given.start > self._known(row) and not held.lost:
                held.lost = True
                log.warning("row %s lost states of the target in an interrupted step: not drafted any more", row.key)
            if not held.lost:
                self._cut(row, given.start)
                held.waiting = torch.cat([held.waiting, states_TH.to(self._nothing)])

    def there(self, row: Row) -> bool:
        """Whether the state that predicted the row's newest token is known."""
        held = self._rows.get(row)
        if held is None or held.lost or self._known(row) != len(row.ids) - 1:
            return False
        return len(held.waiting) > 0 or held.newest_H.dim() == 1

    def unread(self, row: Row) -> int:
        return max(len(self._rows[row].waiting) - 1, 0) if row in self._rows else 0

    def read(self, upto: Sequence[tuple[Row, int]]) -> None:
        """Run the waiting states up to a position, chunk by chunk."""
        left = {row: min(end - self.lm.length(row), len(self._rows[row].waiting))
                for row, end in upto if row in self._rows}  # fmt: skip
        left = {row: count for row, count in left.items() if count > 0}
        while left:
            counts = {row: min(count, PREFILL_CHUNK) for row, count in left.items()}
            self._run(counts)
            left = {row: count - counts[row] for row, count in left.items() if count > counts[row]}

    def pending(self, rows: Sequence[Row]) -> dict[Row, int]:
        """How many states of each row the next call of `newest` has to run."""
        return {row: count for row in rows if (count := len(self._rows[row].waiting))}

    def newest(self, rows: Sequence[Row]) -> list[torch.Tensor]:
        """[H] of each row: the newest state, after the layer."""
        self.read([(row, len(row.ids)) for row in rows])
        return [self._rows[row].newest_H for row in rows]

    @torch.inference_mode()
    def _run(self, counts: dict[Row, int]) -> None:
        entries = []
        for row, count in counts.items():
            states_NH = self._rows[row].waiting[:count]
            chain = Entries.chain([0] * count)
            entries.append(Entries(chain.tokens, chain.parents, states_NH))
        rows = list(counts)
        last_BH = self.lm.forward(rows, entries, wanted=[1] * len(rows)).logits_NV
        self.lm.commit(rows, [list(range(count)) for count in counts.values()])
        for (row, count), state_H in zip(counts.items(), last_BH):
            held = self._rows[row]
            # Copies: views would hold the states of a whole chunk.
            held.waiting, held.newest_H = held.waiting[count:].clone(), state_H.clone()

    @torch.inference_mode()
    def along(self, states_TH: torch.Tensor) -> torch.Tensor:
        """[T, H] the states of a text, as far as the layer reaches, after it."""
        states_TH = states_TH[: self.max_positions].to(self._nothing)
        row, parts = object(), [self._nothing]
        self.lm.open(row, len(states_TH))
        try:
            for chunk_NH in states_TH.split(PREFILL_CHUNK):
                chain = Entries.chain([0] * len(chunk_NH))
                entries = Entries(chain.tokens, chain.parents, chunk_NH)
                parts.append(self.lm.forward([row], [entries], wanted=[len(chunk_NH)]).logits_NV)
                self.lm.commit([row], [range(len(chunk_NH))])
        finally:
            self.lm.close(row)
        return torch.cat(parts)

    def _known(self, row: Row) -> int:
        return self.lm.length(row) + len(self._rows[row].waiting)

    def _cut(self, row: Row, known: int) -> None:
        """Keep the states of the first `known` positions; the last that was run is not kept apart, so it is lost with
        those behind it."""
        held, ran = self._rows[row], self.lm.length(row)
        held.waiting = held.waiting[: max(known - ran, 0)]
        if known < ran:
            self.lm.shorten(row, known)
            held.newest_H = self._nothing
