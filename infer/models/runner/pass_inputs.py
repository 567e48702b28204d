"""The inputs of a pass on the device: ids, positions, slots and masks of all its rows, uploaded as one tensor.

Legend: N tokens of a pass, S slots, D hidden.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from draftsmith.infer.costs.pass_costs import padded
from draftsmith.infer.models.runner.arena import Arena
from draftsmith.infer.models.runner.attention import PackedPass, Reads, RowReads, dense_seen, running
from draftsmith.infer.models.runner.entries import RunnerRow
from draftsmith.infer.models.runner.masks import MaskPlan, RowSlots, additive, pieces
from draftsmith.infer.models.runner.transfers import Transfers


@dataclass(frozen=True, slots=True)
class PassPlan:
    """What all passes of a model share. `marks` stand for the kinds of layers where it expects a mask."""

    masks: MaskPlan
    marks: Mapping[str, torch.Tensor]
    configs: Sequence[Any]
    buckets: Sequence[int]
    device: torch.device
    dtype: torch.dtype

    def handed(self, masks: Mapping[str, torch.Tensor]) -> Any:
        """The model's argument for these masks or marks, by kind."""
        return masks if self.masks.by_kind else next(iter(masks.values()))


@dataclass(slots=True)
class ChosenEntries:
    """The entries of one pass, row after row: their numbers in each row, their ids, positions and slots.

    `states`, if given, stand for the embeddings."""

    rows: list[RunnerRow]
    chosen: Sequence[Sequence[int]]
    tokens: list[int]
    states: torch.Tensor | None = None
    places: list[RowSlots] = field(init=False)
    slots: list[int] = field(init=False)
    positions: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.places = [row.slots() for row in self.rows]
        self.slots = [slot for place, some in zip(self.places, self.chosen) for slot in place.slots(some)]
        self.positions = [
            entry if entry < row.length else row.positions[entry - row.length]
            for row, some in zip(self.rows, self.chosen)
            for entry in some
        ]


@dataclass(slots=True)
class PassInputs:
    """A pass that is ready: the model's arguments, and the attention to run it in. `keep_K`: the places that were asked
    for, if not all or none were. `reads`: None where layers attend on their own."""

    arguments: dict[str, Any]
    attending: Any
    keep_K: torch.Tensor | None
    reads: Reads | None


def pass_inputs(
    entries: ChosenEntries, plan: PassPlan, cache: Arena, transfers: Transfers, keep: Sequence[int] = ()
) -> PassInputs:
    """Upload a pass and tell the cache where it writes. `keep`: places in the pass to hand back as `keep_K`."""
    count = len(entries.slots)
    tokens = padded(count, plan.buckets)
    spare = [0] * (tokens - count)
    slots = entries.slots + spare
    first = slots[0]
    run = slots == list(range(first, first + tokens))  # a slice is faster than an index
    made = {window: _reads(entries, window) for window in dict.fromkeys(plan.masks.windows.values())}
    masked: list[tuple[RowReads, int]] = []
    if plan.masks.packed:
        every = [row for rows in made.values() for row in rows]
        masked = [(row, i) for row in every for i, piece in enumerate(row.pieces) if piece.seen_QK is not None]
        seen = [part for row in every for piece in row.pieces if (part := piece.seen_QK) is not None]
    else:
        seen = [dense_seen(own, tokens, cache.size) for own in made.values()]
    ids = entries.tokens + spare if entries.states is None else []
    (positions_N, slots_N, keep_K, ids_N), on_device = transfers.up_with(
        plan.device, seen, entries.positions + spare, [] if run else slots, keep, ids
    )
    cache.begin(first, tokens, None if run else slots_N)
    windows = plan.masks.windows.items()
    attending: Any = contextlib.nullcontext()
    reads: Reads | None = None
    masks: Mapping[str, torch.Tensor] = plan.marks
    if plan.masks.packed:
        for (row, piece), mask in zip(masked, on_device):
            row.seen[piece] = mask
        reads = PackedPass({kind: made[window] for kind, window in windows}, plan.marks)
        attending = running(reads, plan.configs)
    else:
        dense = {window: additive(mask, plan.dtype)[None, None] for window, mask in zip(made, on_device)}
        masks = {kind: dense[window] for kind, window in windows}
    arguments: dict[str, Any] = {"position_ids": positions_N[None], "past_key_values": cache, "use_cache": True}
    if entries.states is None:
        arguments["input_ids"] = ids_N[None]
    else:
        arguments["inputs_embeds"] = nn.functional.pad(entries.states, (0, 0, 0, len(spare)))[None]
    arguments["attention_mask"] = plan.handed(masks)
    return PassInputs(arguments, attending, keep_K if len(keep) else None, reads)


def _reads(entries: ChosenEntries, window: int | None) -> list[RowReads]:
    """What the rows with entries see in layers with this window."""
    made, first = [], 0
    for place, some in zip(entries.places, entries.chosen):
        if some:
            made.append(RowReads(first, first + len(some), pieces(place, some, window)))
        first += len(some)
    return made
