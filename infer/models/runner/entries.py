"""What a runner knows of a row, what a pass appends to one, and what comes out.

Legend: n entries of a row, N tokens of a pass, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from draftsmith.infer.models.runner.arena import Region
from draftsmith.infer.models.runner.masks import RowSlots


@dataclass(slots=True)
class Entries:
    """Tokens that a pass appends to one row, each with its parent.

    `parents[i]` is an index among the row's uncommitted entries, counted from the last commit (earlier passes, or
    earlier in this list), or -1: directly behind the committed tokens. `states`: what to run in place of the tokens'
    embeddings, [n, D].
    """

    tokens: list[int]
    parents: list[int]
    states: torch.Tensor | None = None

    @classmethod
    def chain(cls, tokens: list[int], uncommitted: int = 0) -> Entries:
        """A chain below the newest of `uncommitted` entries."""
        return cls(tokens, list(range(uncommitted - 1, uncommitted - 1 + len(tokens))))


@dataclass(slots=True)
class PassOutput:
    """Of a pass, row after row: the logits [N, V] that were wanted, and the tapped states [N, D] by name."""

    logits_NV: torch.Tensor
    taps: dict[str, torch.Tensor]


@dataclass(slots=True)
class RunnerRow:
    """One row: the regions that it reads together with others, its own, how many tokens are committed, and its
    uncommitted entries with positions and ancestors (bit masks).

    `filled[j]`: the number of committed entries that block j has seen; `passed[i]`: the number of blocks that have seen
    uncommitted entry i."""

    own: Region
    shared: list[Region] = field(default_factory=list)
    length: int = 0
    positions: list[int] = field(default_factory=list)
    visible: list[int] = field(default_factory=list)
    filled: list[int] = field(default_factory=list)
    passed: list[int] = field(default_factory=list)

    @property
    def elsewhere(self) -> int:
        """How many of its tokens lie in shared regions."""
        return sum(region.size for region in self.shared)

    def slots(self) -> RowSlots:
        spans = [(region.start, region.size) for region in self.shared]
        spans.append((self.own.start, self.length - self.elsewhere))
        return RowSlots(spans, self.positions, self.visible)

    def append(self, parents: Sequence[int]) -> list[int]:
        """Add uncommitted entries with these parents (see Entries); their numbers."""
        first = self.length + len(self.positions)
        for parent in parents:
            seen = self.visible[parent] if parent >= 0 else 0
            self.positions.append(self.length if parent < 0 else self.positions[parent] + 1)
            self.visible.append(seen | (1 << len(self.visible)))
            self.passed.append(0)
        return list(range(first, first + len(parents)))

    def cut(self, uncommitted: int) -> None:
        """Drop the entries beyond the first `uncommitted` ones."""
        for entries in (self.positions, self.visible, self.passed):
            del entries[uncommitted:]

    def keep(self, path: Sequence[int]) -> None:
        """Commit the entries of `path`, which lie behind the committed ones already, and drop the others."""
        for block, filled in enumerate(self.filled):
            if filled == self.length:
                seen = [self.passed[entry] > block for entry in path]
                self.filled[block] += seen.index(False) if False in seen else len(seen)
        self.length += len(path)
        self.cut(0)

    def missing(self, block: int, wanted: Sequence[int]) -> list[int]:
        """The numbers of the entries that `block` has not seen among the committed ones, the wanted ones and their
        ancestors."""
        seen = 0
        for entry in wanted:
            seen |= self.visible[entry - self.length]
        behind = [i for i in range(len(self.positions)) if seen >> i & 1 and self.passed[i] <= block]
        return [*range(self.filled[block], self.length), *(self.length + i for i in behind)]

    def mark(self, block: int, entry: int) -> None:
        """`block` has seen this entry."""
        if entry < self.length:
            self.filled[block] = entry + 1
        else:
            assert self.passed[entry - self.length] == block, "an entry skipped a block"
            self.passed[entry - self.length] = block + 1
