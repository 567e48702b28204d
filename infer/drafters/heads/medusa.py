"""Medusa heads as drafter (arXiv 2401.10774): one pass over the target's newest state gives every depth's candidates.

A head's distribution is of its depth, whatever the tokens above: all nodes of a depth have the same candidates, and
drawn children of different nodes come from one distribution, each with its own draw. The tree is grown by the one
builder from the candidates' probabilities of acceptance: those that `draftsmith calibrate` measured for each head, and
until then the rates that were learned while decoding.

Medusa's "typical acceptance" is not offered: it changes the text.

Legend: B rows, N nodes, K heads, H width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from draftsmith.infer.contract.row import Row
from draftsmith.infer.drafters.draft_model import Sample, given_limits
from draftsmith.infer.drafters.draft_reader import DraftOutput
from draftsmith.infer.drafters.heads.state_reader import Path, RunHeads, StateReader, depth_of, follows, loaded
from draftsmith.infer.drafters.lm_drafter import LMDrafter
from draftsmith.infer.heads.folders import load_medusa
from draftsmith.infer.heads.medusa import MedusaHeads

NAME = "medusa"
# Children per node. The trees of Medusa's authors have up to 10.
CHILDREN = 8


def Medusa(
    model: Any,
    num_draft_tokens: int | None = None,
    top_k: int | None = None,
    nodes: int = 24,
    min_confidence: float = 0.02,
    sample: Sample | bool = "auto",
    replacement: bool = False,
    peaked: float | None = None,
    calibration: Any = "auto",
    costs: Any = "auto",
    dtype: str = "auto",
    device: str = "auto",
) -> LMDrafter:
    """Medusa heads as drafter. Their "typical acceptance" is not lossless, and is left out: drafts are verified as
    all others are.

    Args:
        model: a folder or a Hub name of heads, or loaded heads.
        num_draft_tokens: the greatest depth; by default one per head.
        top_k: children per node; 1 drafts a chain. By default 8, and 1 for drawn drafts.
        nodes: the most nodes of a tree; a chain is limited by num_draft_tokens only.
        min_confidence: do not expand nodes whose probability of being reached is below this; measured costs override
            it.
        sample: what to draft for rows with a temperature. drawn (or true): tokens drawn from the heads' distributions;
            coupled: the tokens that win under them when they share the noise of the target's own draws; likeliest (or
            false): their likeliest tokens, which greedy rows always get; auto: drawn, and coupled as part of a mix.
        replacement: for drawn trees, draw the children of a node independently.
        peaked: for trees drawn without replacement; where the likeliest top_k - 1 tokens have at least this probability
            (by default 0.3), take them outright and draw one from the rest.
        calibration: a file, auto (what `draftsmith calibrate` measured for these heads and target, if it did), or none.
            Without one, how often each head's candidates are right is learned while decoding.
        costs: measured pass costs: a file, auto, or none.
        dtype: of the weights, if `model` is a name; auto: the target's.
        device: where to load `model`, if it is a name; auto: the target's.
    """
    heads, origin = loaded(model, load_medusa, dtype, device)
    depth = depth_of(num_draft_tokens, len(heads.heads), origin or NAME)
    limits = given_limits(
        depth, depth, top_k, nodes, nodes, min_confidence, sample, replacement, peaked, children=CHILDREN
    )
    reader = StateReader(MedusaRows(heads, depth), origin, *follows(origin, dtype, device))
    return LMDrafter(NAME, reader, limits, {depth: NAME}, calibration, costs)


class MedusaRows:
    """Runs the first `depth` heads over the states of rows, once per draft."""

    name = NAME
    at_once = True

    def __init__(self, heads: MedusaHeads, depth: int) -> None:
        self.heads = heads
        self.depth = depth
        self.depth_sources = tuple(f"{NAME}:{number + 1}" for number in range(depth))
        self._logits: dict[Row, torch.Tensor] = {}

    def lend(self, embedding: nn.Module) -> None:
        """The heads read states alone."""

    def begin(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self._logits.pop(row, None)

    def score(
        self, rows: Sequence[Row], states: Sequence[torch.Tensor], paths: Sequence[Sequence[Path]], run: RunHeads
    ) -> DraftOutput:
        new = [b for b, row in enumerate(rows) if row not in self._logits]
        if new:
            states_BH = torch.stack([states[b] for b in new])
            read = list(self.heads.heads[: self.depth])
            logits_BKV = run(lambda: self.heads(states_BH, self.depth), {rows[b]: 1 for b in new}, read)
            self._logits |= {rows[b]: logits_KV for b, logits_KV in zip(new, logits_BKV)}
        at = [[len(path) - 1 for path in some] for some in paths]
        logits_NV = torch.cat([self._logits[row][depths] for row, depths in zip(rows, at)])
        return DraftOutput(logits_NV, sources=[self.depth_sources[depth] for depths in at for depth in depths])

    def logits(self, depth: int, states_NH: torch.Tensor, paths: Sequence[Path]) -> torch.Tensor:
        found: torch.Tensor = self.heads.heads[depth](states_NH)
        return found

    def timed(self, nodes: int) -> torch.Tensor:
        weight = next(self.heads.parameters())
        logits_NKV: torch.Tensor = self.heads(weight.new_zeros((nodes, self.heads.width)), self.depth)
        return logits_NKV
