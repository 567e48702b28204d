"""Divergences between the draft's and target's distributions, each with its gradient in the draft's logits (`slope`).

`forward_kl`, `reverse_kl`, `jsd` and `total_variation` compare the two distributions (DistillSpec, arXiv 2310.08461,
has all four); `cross_entropy` uses the text. Three more are minus the log of what the rule that will run accepts:

    sampled   sum of min(target, draft): the probability that a sampled token is accepted (arXiv 2211.17192)
    greedy    the target's probability of the draft's likeliest token
    topk      the target's mass under the draft's top_k likeliest tokens

The last two contain an argmax, which has no gradient. It is replaced by the mass that top_k independent draws from the
sharpened draft softmax(sharpness x logits) would cover, sum of target x (1 - (1 - sharp)^top_k), one draw for greedy.
This is exact as sharpness grows, gives a flat distribution no more than top_k / V, and is largest where the likeliest
tokens of both are the same. The logarithm is there because acceptance itself is nearly flat where the draft is far off;
1 - acceptance of the sampled rule is `total_variation`.

Each function takes a chunk's Distributions and returns ([C] losses, [C, V] slopes, which will be overwritten).

Legend: V vocabulary, C positions of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module

import torch

from draftsmith.train.teacher.live import TeacherChunk


@dataclass
class Distributions:
    """Both distributions at a chunk of positions; each form is computed when first read, then kept.

    Args:
        logits_CV: the draft's logits at temperature 1.
        target: the target's distribution at the same positions; None where every loss is of the text alone.
        labels_C: the text's tokens.
        temperature: temperature of both; 0: a point mass on the target's likeliest token, and the draft's at 1.
        top_k: tokens that a tree will try at a node.
        sharpness: an argmax is replaced by softmax(sharpness x logits).
    """

    logits_CV: torch.Tensor
    target: TeacherChunk | None
    labels_C: torch.Tensor
    temperature: float = 1.0
    top_k: int = 4
    sharpness: float = 1.0

    @cached_property
    def draft_log_CV(self) -> torch.Tensor:
        scaled_CV = self.logits_CV if self.temperature in (0.0, 1.0) else self.logits_CV / self.temperature
        return torch.log_softmax(scaled_CV, -1)

    @cached_property
    def draft_probs_CV(self) -> torch.Tensor:
        return self.draft_log_CV.exp()

    @cached_property
    def target_log_CV(self) -> torch.Tensor:
        assert self.target is not None
        return self.target.log_probs(self.temperature, self.draft_log_CV)

    @cached_property
    def target_probs_CV(self) -> torch.Tensor:
        if self.temperature == 0.0:
            assert self.target is not None
            point_CV = torch.zeros_like(self.logits_CV)
            return point_CV.scatter_(1, self.target.choice()[:, None], 1.0)
        assert self.target is not None
        return self.target.probs(self.target_log_CV)


Divergence = Callable[[Distributions], tuple[torch.Tensor, torch.Tensor]]

# The loss that does not ask what the target's distribution is.
OF_TEXT = "cross_entropy"
# Losses defined for a target at temperature 0, whose distribution is a point mass.
OF_CHOICES = ("greedy", "topk", "cross_entropy")


def forward_kl(both: Distributions) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(target || draft): the draft has to cover all the target's mass."""
    target_CV = both.target_probs_CV
    loss_C = (both.target_log_CV - both.draft_log_CV).mul_(target_CV).sum(-1)
    slope_CV = both.draft_probs_CV - target_CV
    return loss_C, slope_CV if both.temperature == 1.0 else slope_CV.div_(both.temperature)


def reverse_kl(both: Distributions) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(draft || target): the draft has to avoid what the target would not say."""
    gap_CV = both.draft_log_CV - both.target_log_CV
    return _by_draft_probs(both, (both.draft_probs_CV * gap_CV).sum(-1), gap_CV)


def jsd(both: Distributions) -> tuple[torch.Tensor, torch.Tensor]:
    """Jensen-Shannon: the mean of both KLs to the distributions' mean."""
    mean_log_CV = torch.logaddexp(both.target_log_CV, both.draft_log_CV) - math.log(2)
    draft_gap_CV = both.draft_log_CV - mean_log_CV
    target_gap_CV = both.target_log_CV - mean_log_CV
    loss_C = 0.5 * (both.target_probs_CV * target_gap_CV + both.draft_probs_CV * draft_gap_CV).sum(-1)
    return _by_draft_probs(both, loss_C, 0.5 * draft_gap_CV)


def total_variation(both: Distributions) -> tuple[torch.Tensor, torch.Tensor]:
    """1 - sum of min(target, draft): the probability that a sampled token is rejected."""
    gap_CV = both.draft_probs_CV - both.target_probs_CV
    return _by_draft_probs(both, 0.5 * gap_CV.abs().sum(-1), 0.5 * gap_CV.sign())


def sampled(both: Distributions) -> tuple[torch.Tensor, torch.Tensor]:
    """-log of the sum of min(target, draft)."""
    target_CV, draft_CV = both.target_probs_CV, both.draft_probs_CV
    accepted_C = torch.minimum(target_CV, draft_CV).sum(-1).clamp_min(_tiny(draft_CV))
    below_CV = (draft_CV < target_CV).to(draft_CV.dtype)
    return _by_draft_probs(both, -accepted_C.log(), -below_CV / accepted_C[:, None])


def greedy(both: Distributions) -> tuple[torch.Tensor, torch.Tensor]:
    """-log of the target's probability of the draft's likeliest token."""
    return _uncovered(both, 1)


def topk(both: Distributions) -> tuple[torch.Tensor, torch.Tensor]:
    """-log of the target's mass under the draft's top_k likeliest tokens."""
    return _uncovered(both, both.top_k)


def cross_entropy(both: Distributions) -> tuple[torch.Tensor, torch.Tensor]:
    """-log of the draft's probability of the text's token, at temperature 1."""
    log_CV = both.draft_log_CV if both.temperature in (0.0, 1.0) else torch.log_softmax(both.logits_CV, -1)
    labels_C1 = both.labels_C[:, None]
    slope_CV = log_CV.exp()
    slope_CV.scatter_add_(1, labels_C1, torch.full_like(slope_CV[:, :1], -1.0))
    return -log_CV.gather(1, labels_C1)[:, 0], slope_CV


def mixed(
    losses: Sequence[tuple[Divergence, float]], both: Distributions, slope: bool, kept_C: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weighted sum of losses over a chunk, and its slope. `kept_C`: the positions that count; default: all."""
    summed, slope_CV = both.logits_CV.new_zeros(()), None
    for term, weight in losses:
        loss_C, term_CV = term(both)
        summed = summed + weight * (loss_C if kept_C is None else loss_C[kept_C]).sum()
        if slope:
            only = term_CV if weight == 1.0 else term_CV * weight
            slope_CV = only if slope_CV is None else slope_CV.add_(term_CV, alpha=weight)
    if slope_CV is not None and kept_C is not None and not bool(kept_C.all()):
        slope_CV[~kept_C] = 0.0
    return summed, slope_CV


def find_divergence(name: str) -> Divergence:
    """A loss of this module by its name, or any other by its dotted path."""
    path, _, last = name.rpartition(".")
    try:
        found = getattr(import_module(path or __name__), last)
    except (ImportError, AttributeError) as error:
        known = "cross_entropy, forward_kl, reverse_kl, jsd, total_variation, sampled, greedy, topk"
        raise ValueError(f"unknown loss {name!r}: {known}, or a function's dotted path") from error
    divergence: Divergence = found
    return divergence


def _by_draft_probs(
    both: Distributions, loss_C: torch.Tensor, by_probs_CV: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Turns the gradient in the draft's probabilities (up to a constant) into the gradient in its logits."""
    draft_CV = both.draft_probs_CV
    mean_C1 = (draft_CV * by_probs_CV).sum(-1, keepdim=True)
    return loss_C, draft_CV * (by_probs_CV - mean_C1) / both.temperature


def _uncovered(both: Distributions, draws: int) -> tuple[torch.Tensor, torch.Tensor]:
    """-log of the target's mass covered by `draws` draws from the sharpened draft."""
    target_CV = both.target_probs_CV
    sharp_CV = torch.softmax(both.logits_CV * both.sharpness, -1)
    missed_CV = torch.log1p(-sharp_CV.clamp_max(1 - torch.finfo(sharp_CV.dtype).eps))
    covered_C = (target_CV * -torch.expm1(draws * missed_CV)).sum(-1).clamp_min(_tiny(sharp_CV))
    gain_CV = target_CV * (draws * torch.exp((draws - 1) * missed_CV))
    gain_CV = gain_CV - (sharp_CV * gain_CV).sum(-1, keepdim=True)
    return -covered_C.log(), sharp_CV * gain_CV * (-both.sharpness / covered_C[:, None])


def _tiny(tensor: torch.Tensor) -> float:
    return torch.finfo(tensor.dtype).tiny
