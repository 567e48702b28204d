"""Hydra heads as drafter (arXiv 2402.05109): Medusa's, but a head reads the tokens of its path too.

All nodes of one depth, of all rows, go through one head in one pass.

Legend: B rows, N nodes, H width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from draftsmith.infer.contract.row import Row
from draftsmith.infer.drafters.draft_model import Sample, given_limits
from draftsmith.infer.drafters.draft_reader import DraftOutput
from draftsmith.infer.drafters.heads.state_reader import Path, RunHeads, StateReader, depth_of, follows, loaded
from draftsmith.infer.drafters.lm_drafter import LMDrafter
from draftsmith.infer.heads.folders import load_hydra
from draftsmith.infer.heads.hydra import HydraHeads

NAME = "hydra"


def Hydra(
    model: Any,
    num_draft_tokens: int | None = None,
    top_k: int | None = None,
    nodes: int = 16,
    width: int = 6,
    min_confidence: float = 0.1,
    sample: Sample | bool = "auto",
    replacement: bool = False,
    peaked: float | None = None,
    calibration: Any = "auto",
    costs: Any = "auto",
    dtype: str = "auto",
    device: str = "auto",
) -> LMDrafter:
    """Hydra heads as drafter. "Typical acceptance", with which their authors decode, is not lossless, and is left out:
    drafts are verified as all others are.

    Args:
        model: a folder or a Hub name of heads, or loaded heads.
        num_draft_tokens: the greatest depth; by default one per head.
        top_k: children per node; 1 drafts a chain. By default 4, and 1 for drawn drafts.
        nodes: the most nodes of a tree; a chain is limited by num_draft_tokens only.
        width: how many nodes of a row go through the heads per pass.
        min_confidence: do not expand nodes whose probability of being reached is below this; measured costs override
            it.
        sample: what to draft for rows with a temperature. drawn (or true): tokens drawn from the heads' distributions;
            coupled: the tokens that win under them when they share the noise of the target's own draws; likeliest (or
            false): their likeliest tokens, which greedy rows always get; auto: drawn, and coupled as part of a mix.
        replacement: for drawn trees, draw the children of a node independently.
        peaked: for trees drawn without replacement; where the likeliest top_k - 1 tokens have at least this probability
            (by default 0.3), take them outright and draw one from the rest.
        calibration: a file, auto (what `draftsmith calibrate` measured for these heads and target, if it did), or none.
        costs: measured pass costs: a file, auto, or none.
        dtype: of the weights, if `model` is a name; auto: the target's.
        device: where to load `model`, if it is a name; auto: the target's.
    """
    heads, origin = loaded(model, load_hydra, dtype, device)
    depth = depth_of(num_draft_tokens, len(heads.heads), origin or NAME)
    limits = given_limits(depth, depth, top_k, nodes, width, min_confidence, sample, replacement, peaked)
    reader = StateReader(HydraRows(heads, depth), origin, *follows(origin, dtype, device))
    return LMDrafter(NAME, reader, limits, {depth: NAME}, calibration, costs)


class HydraRows:
    """Runs the first `depth` heads over nodes."""

    name = NAME
    at_once = False
    depth_sources: tuple[str, ...] = ()

    def __init__(self, heads: HydraHeads, depth: int) -> None:
        self.heads = heads
        self.depth = depth
        self._embedding: nn.Module | None = None

    def lend(self, embedding: nn.Module) -> None:
        width = next(embedding.parameters()).shape[-1]
        if width != self.heads.width:
            raise ValueError(
                f"the target embeds tokens {width} wide, and Hydra heads of width {self.heads.width} cannot read them"
            )
        self._embedding = embedding

    def begin(self, rows: Sequence[Row]) -> None:
        """Nothing is kept."""

    def score(
        self, rows: Sequence[Row], states: Sequence[torch.Tensor], paths: Sequence[Sequence[Path]], run: RunHeads
    ) -> DraftOutput:
        places = [(b, path) for b, some in enumerate(paths) for path in some]
        by_depth: dict[int, list[int]] = {}
        for n, (_, path) in enumerate(places):
            by_depth.setdefault(len(path) - 1, []).append(n)
        made: dict[int, torch.Tensor] = {}
        # The depth with the most nodes first: it counts as the pass that they go through, the others as its surplus.
        for depth, held in sorted(by_depth.items(), key=lambda item: -len(item[1])):
            counts: dict[Row, int] = {}
            for n in held:
                row = rows[places[n][0]]
                counts[row] = counts.get(row, 0) + 1
            states_NH = torch.stack([states[places[n][0]] for n in held])
            tokens = [places[n][1] for n in held]
            logits_NV = run(partial(self.logits, depth, states_NH, tokens), counts, [self.heads.heads[depth]])
            made |= dict(zip(held, logits_NV))
        return DraftOutput(torch.stack([made[n] for n in range(len(places))]))

    def logits(self, depth: int, states_NH: torch.Tensor, paths: Sequence[Path]) -> torch.Tensor:
        assert self._embedding is not None, "bind the drafter first"
        where = next(self._embedding.parameters()).device
        embedded = self._embedding(torch.tensor(paths, device=where)).to(states_NH)
        return self.heads.logits(depth, states_NH, embedded.unbind(1))

    def timed(self, nodes: int) -> torch.Tensor:
        """The middle head: the heads grow by the same amount from one to the next."""
        depth = self.depth // 2
        weight = next(self.heads.parameters())
        return self.logits(depth, weight.new_zeros((nodes, self.heads.width)), [[0] * (depth + 1)] * nodes)
