"""Candidates that share the noise of the target's own draws (Gumbel coupling, arXiv 2408.07978).

The target's token is the winner of a race under its own distribution (infer/contract/race.py). Here the draft's
distribution runs the same race, with the same noise: its winner is the target's about as often as the two distributions
agree, the second one most of the other times, and so on. The target's draw does not depend on what is drafted, so these
candidates are outright: looked up, cut and mixed with others like the likeliest tokens of a greedy row.

Legend: N nodes, K candidates, R rivals, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from draftsmith.infer.contract.protocols import Target
from draftsmith.infer.contract.race import race_noise
from draftsmith.infer.contract.sampling import Settings

# A candidate's confidence is its share among this many of the first to arrive, each weighted by this power of its
# speed: the power that comes closest to how often each is right (LOG.md has the figures).
RIVALS, POWER = 8, 1.5


@dataclass(frozen=True, slots=True)
class Race:
    """Where the target's race is run: its number of tokens, and the device whose noise it is."""

    vocab_size: int
    device: torch.device

    @classmethod
    def of(cls, target: Target) -> Race:
        """Noise differs between devices, and the draft may lie on another one than the target."""
        device = torch.device("cpu")
        if target.model is not None:
            device = next(target.model.parameters()).device
        return cls(target.vocab_size, device)

    def arrivals(
        self, logits_NV: torch.Tensor, settings: Settings, row: str, positions: Sequence[int], count: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[N, K] The first `count` tokens to arrive at each of a row's positions under the draft's distributions there
        (at the row's temperature and truncation), and their confidences, which fall and sum to at most one. A token
        that truncation excludes has none."""
        scores_NV = logits_NV.float()
        for warper in settings.warpers():
            scores_NV = warper(None, scores_NV)
        noise_NV = torch.stack([
            race_noise(settings.seed, row, position, self.vocab_size, self.device) for position in positions
        ])  # fmt: skip
        raced_NV = scores_NV.double() + noise_NV[:, : scores_NV.shape[-1]].to(scores_NV.device)
        first_NR = torch.topk(raced_NV, min(max(RIVALS, count), raced_NV.shape[-1]), dim=-1)
        shares_NR = torch.softmax(POWER * first_NR.values, -1)
        return first_NR.indices[:, :count], shares_NR[:, :count]
