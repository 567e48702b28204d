"""How a drafter reads new nodes with its draft model: the whole model, or as deep as each node wants.

What a reader gives is logits; which nodes are read, and what is made of the logits, is the drafter's (lm_drafter.py).

Legend: N nodes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from draftsmith.infer.costs.policy import PlannedPass, Policy
from draftsmith.infer.drafters.exit_choice import ExitChoice, Fork
from draftsmith.infer.models.cached_lm import CachedLM, Entries
from draftsmith.infer.models.exit_lm import ExitLM


@dataclass(frozen=True, slots=True)
class DraftOutput:
    """[N, V] logits of all rows' nodes, one row behind the other, and the layer after which each was left."""

    logits_NV: torch.Tensor
    exits: list[int] = field(default_factory=list)


class DraftForward(Protocol):
    """Reads nodes with a cached model; `policy` is charged for its passes where there is one."""

    policy: Policy | None

    @property
    def lm(self) -> Any: ...

    def prefill(self, rows: Sequence[Any], tokens: Sequence[list[int]]) -> None: ...

    def read(
        self,
        rows: Sequence[Any],
        entries: Sequence[Entries],
        worths: Sequence[Sequence[float]],
        vocab_size: int,
    ) -> DraftOutput:
        """Run `entries`; the last len(worths[b]) of row b are the nodes, worth that much."""
        ...


class WholeForward:
    """Every node goes through the whole model. `name` is what the costs call its passes."""

    def __init__(self, lm: CachedLM, name: str) -> None:
        self.lm = lm
        self.name = name
        self.policy: Policy | None = None

    def prefill(self, rows: Sequence[Any], tokens: Sequence[list[int]]) -> None:
        self.lm.prefill(rows, tokens)

    def read(
        self,
        rows: Sequence[Any],
        entries: Sequence[Entries],
        worths: Sequence[Sequence[float]],
        vocab_size: int,
    ) -> DraftOutput:
        if self.policy is not None:
            work = PlannedPass(len(rows), max(len(entry.tokens) for entry in entries))
            self.policy.charge(self.policy.seconds(self.name, work))
        logits_BQV, _ = self.lm.forward(rows, entries)
        parts = []
        for b, (entry, nodes) in enumerate(zip(entries, worths)):
            end = len(entry.tokens)
            parts.append(logits_BQV[b, end - len(nodes) : end, :vocab_size])
        return DraftOutput(torch.cat(parts) if len(parts) > 1 else parts[0])


@dataclass(slots=True)
class _Reached:
    """A node on its way: its row and entry, where its logits go, and the states in which it left the last block."""

    row: int
    entry: int
    place: int
    worth: float
    state_D: torch.Tensor


class ExitForward:
    """Each node goes as deep as `choice` says; those that go on from an exit go together."""

    def __init__(self, lm: ExitLM, choice: ExitChoice, names: Sequence[str]) -> None:
        self.lm = lm
        self.choice = choice
        self.names = names
        self.policy: Policy | None = None
        self.blocks = choice.deepest(lm.exits)

    def prefill(self, rows: Sequence[Any], tokens: Sequence[list[int]]) -> None:
        self.lm.prefill(rows, tokens, self.blocks)

    def read(
        self,
        rows: Sequence[Any],
        entries: Sequence[Entries],
        worths: Sequence[Sequence[float]],
        vocab_size: int,
    ) -> DraftOutput:
        reached = self._enter(rows, entries, worths)
        logits: list[torch.Tensor | None] = [None] * len(reached)
        exits = [0] * len(reached)
        for at in range(self.blocks):
            last = at + 1 == self.blocks or not self.choice.may_go(at, [node.worth for node in reached])
            said_NV = self._logits(reached, vocab_size) if last or not self.choice.blind else None
            on = [False] * len(reached) if last else self.choice.deeper(at, self._forks(rows, at, reached, said_NV))
            if said_NV is None and not all(on):
                said_NV = self._logits(reached, vocab_size)
            for i, (node, goes) in enumerate(zip(reached, on)):
                if not goes:
                    assert said_NV is not None
                    logits[node.place], exits[node.place] = said_NV[i], self.lm.exits[at]
            reached = self._deepen(rows, at + 1, [node for node, goes in zip(reached, on) if goes])
            if not reached:
                break
        return DraftOutput(torch.stack([one for one in logits if one is not None]), exits)

    def _enter(
        self, rows: Sequence[Any], entries: Sequence[Entries], worths: Sequence[Sequence[float]]
    ) -> list[_Reached]:
        self._charge(0, len(rows), max(len(entry.tokens) for entry in entries))
        states = self.lm.enter(rows, entries)
        reached: list[_Reached] = []
        for b, (row, states_QD, nodes) in enumerate(zip(rows, states, worths)):
            uncommitted, new = self.lm.uncommitted(row), states_QD.shape[0]
            for n, worth in enumerate(nodes):
                back = len(nodes) - n
                reached.append(_Reached(b, uncommitted - back, len(reached), worth, states_QD[new - back]))
        return reached

    def _logits(self, reached: Sequence[_Reached], vocab_size: int) -> torch.Tensor:
        return self.lm.logits(torch.stack([node.state_D for node in reached]))[:, :vocab_size]

    def _forks(
        self, rows: Sequence[Any], at: int, reached: Sequence[_Reached], said_NV: torch.Tensor | None
    ) -> list[Fork]:
        tops = [0.0] * len(reached)
        if said_NV is not None:
            scores_NV = said_NV.float()
            tops = (scores_NV.amax(-1) - torch.logsumexp(scores_NV, -1)).exp().tolist()
        return [
            Fork(node.row, node.worth, top, self.lm.behind(rows[node.row], at + 1, [node.entry]))
            for node, top in zip(reached, tops)
        ]

    def _deepen(self, rows: Sequence[Any], block: int, going: list[_Reached]) -> list[_Reached]:
        """Take these nodes through a block, all in one pass."""
        if not going:
            return []
        live = sorted({node.row for node in going})
        wanted = [[node.entry for node in going if node.row == b] for b in live]
        chosen = [rows[b] for b in live]
        tokens = max(self.lm.behind(row, block, some) for row, some in zip(chosen, wanted))
        self._charge(block, len(live), tokens)
        states = self.lm.deepen(chosen, block, wanted)
        found = {
            (b, entry): state_D
            for b, some, states_ND in zip(live, wanted, states)
            for entry, state_D in zip(some, states_ND)
        }
        for node in going:
            node.state_D = found[node.row, node.entry]
        return going

    def _charge(self, block: int, rows: int, tokens: int) -> None:
        if self.policy is not None:
            self.policy.charge(self.policy.seconds(self.names[block], PlannedPass(rows, tokens)), entering=block == 0)
