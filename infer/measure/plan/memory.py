"""Whether what `plan` measures fits into the memory of this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from draftsmith.infer.costs.timing import SPARE
from draftsmith.infer.measure.plan.shapes import Size, SurveyRequest
from draftsmith.infer.models.positions import max_positions
from draftsmith.infer.models.products.prepack import total_memory
from draftsmith.infer.models.runner.arena import SPARE_SHARE, SPARE_SLOTS


def check_room(config: Any, sizes: dict[str, Size], asked: SurveyRequest, device: torch.device) -> None:
    """Raise if the positions exceed the model's or weights and caches exceed this machine's memory."""
    check_fits(config, sizes, asked, _room(device), device.type)


def check_fits(config: Any, sizes: dict[str, Size], asked: SurveyRequest, room: float, where: str) -> None:
    """As `check_room`, with `room` bytes on the machine `where`."""
    longest = max(asked.contexts) + max(asked.nodes) + 1
    if longest > max_positions(config.get_text_config()):
        raise ValueError(
            f"a context of {max(asked.contexts)} and {max(asked.nodes)} nodes exceed the target's "
            f"{max_positions(config.get_text_config())} positions: use smaller --contexts or --lengths"
        )
    needed = needed_bytes(sizes, asked)
    if needed.total > room:
        fits = max(0, int(room - needed.weights) * max(asked.batch_sizes) // needed.cache)
        mend = f"use --batch_sizes of at most {fits}, or smaller --contexts" if fits else "take a smaller target"
        raise ValueError(
            f"this needs {needed.total / 2**30:.1f} GiB ({needed.weights / 2**30:.1f} for weights, "
            f"{needed.cache / 2**30:.1f} for the cache of {max(asked.batch_sizes)} rows), and {where} has "
            f"{room / 2**30:.1f} GiB available: {mend}"
        )


@dataclass(frozen=True, slots=True)
class Needed:
    """Bytes held at once: weights with their packed copies, and the caches."""

    weights: int
    cache: int

    @property
    def total(self) -> int:
        return self.weights + self.cache


def needed_bytes(sizes: dict[str, Size], asked: SurveyRequest) -> Needed:
    """What the survey holds at its peak: the target, and beside it one draft at a time."""
    target, drafts = sizes["target"], [sizes[name] for name in asked.timed]
    held = max(max(asked.contexts) + SPARE, max(asked.contexts) + max(asked.nodes) + 1)
    slots = held + held // SPARE_SHARE + SPARE_SLOTS
    weights = target.held_bytes + max(draft.held_bytes for draft in drafts)
    tokens = max(asked.batch_sizes) * slots
    return Needed(weights, tokens * (target.token_bytes + max(draft.token_bytes for draft in drafts)))


def _room(device: torch.device) -> int:
    """Available bytes, including reclaimable file caches; all memory where the system reports only that."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return total_memory()
