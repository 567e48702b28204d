"""How far a draft's distribution is from its target's: one function per loss, each with its slope in the draft's
logits.

`forward_kl`, `reverse_kl`, `jsd` and `total_variation` compare two distributions (DistillSpec, arXiv 2310.08461, has
all four);
`cross_entropy` asks the text. Three more ask what the rule that will run accepts, and are minus its logarithm:

    sampled   sum of min(target, draft): the chance that a drawn token is accepted (arXiv 2211.17192)
    greedy    the target's probability of the draft's likeliest token
    topk      the target's mass under the draft's top_k likeliest tokens

The last two count steps of an argmax, which have no slope. Both are replaced by the mass that top_k independent draws
from the sharpened draft softmax(sharpness x logits) would cover, sum of target x (1 - (1 - sharp)^top_k), one draw for
greedy: it is exact in the limit of sharpness, cannot be had by a flat distribution (that covers top_k / V), and is best
where the likeliest tokens of target and draft are the same. The logarithm is there because acceptance itself has hardly
a slope where the draft is far off; 1 - acceptance of the sampled rule is `total_variation`.

Each function takes the chunk's Distributions and returns ([C] losses, [C, V] slopes). Where the target's distribution
comes from, and which exits there are, is not known here.

Legend: V vocabulary, C positions of a chunk.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from importlib import import_module

import torch

from draftsmith.train.teacher.distributions import Distributions

Divergence = Callable[[Distributions], tuple[torch.Tensor, torch.Tensor]]

# Those that a target at temperature 0 can be asked for: its distribution is then a point mass.
OF_CHOICES = ("greedy", "topk", "cross_entropy")


def forward_kl(distributions: Distributions) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(target || draft): the draft covers all that the target may say."""
    target_CV = distributions.target_probs_CV
    loss_C = (target_CV * (distributions.target_log_CV - distributions.draft_log_CV)).sum(-1)
    return loss_C, (distributions.draft_probs_CV - target_CV) / distributions.temperature


def reverse_kl(distributions: Distributions) -> tuple[torch.Tensor, torch.Tensor]:
    """KL(draft || target): the draft says nothing that the target would not."""
    gap_CV = distributions.draft_log_CV - distributions.target_log_CV
    return _by_draft_probs(distributions, (distributions.draft_probs_CV * gap_CV).sum(-1), gap_CV)


def jsd(distributions: Distributions) -> tuple[torch.Tensor, torch.Tensor]:
    """Jensen-Shannon: the mean of both KLs to the distributions' mean."""
    mean_log_CV = torch.logaddexp(distributions.target_log_CV, distributions.draft_log_CV) - math.log(2)
    draft_gap_CV = distributions.draft_log_CV - mean_log_CV
    target_gap_CV = distributions.target_log_CV - mean_log_CV
    loss_C = 0.5 * (distributions.target_probs_CV * target_gap_CV + distributions.draft_probs_CV * draft_gap_CV).sum(-1)
    return _by_draft_probs(distributions, loss_C, 0.5 * draft_gap_CV)


def total_variation(distributions: Distributions) -> tuple[torch.Tensor, torch.Tensor]:
    """1 - sum of min(target, draft), the chance that a drawn token is rejected."""
    gap_CV = distributions.draft_probs_CV - distributions.target_probs_CV
    return _by_draft_probs(distributions, 0.5 * gap_CV.abs().sum(-1), 0.5 * gap_CV.sign())


def sampled(distributions: Distributions) -> tuple[torch.Tensor, torch.Tensor]:
    """-log of the sum of min(target, draft)."""
    target_CV, draft_CV = distributions.target_probs_CV, distributions.draft_probs_CV
    accepted_C = torch.minimum(target_CV, draft_CV).sum(-1).clamp_min(_tiny(draft_CV))
    below_CV = (draft_CV < target_CV).to(draft_CV.dtype)
    return _by_draft_probs(distributions, -accepted_C.log(), -below_CV / accepted_C[:, None])


def greedy(distributions: Distributions) -> tuple[torch.Tensor, torch.Tensor]:
    """-log of the target's probability of the draft's likeliest token."""
    return _uncovered(distributions, 1)


def topk(distributions: Distributions) -> tuple[torch.Tensor, torch.Tensor]:
    """-log of the target's mass under the draft's top_k likeliest tokens."""
    return _uncovered(distributions, distributions.top_k)


def cross_entropy(distributions: Distributions) -> tuple[torch.Tensor, torch.Tensor]:
    """-log of the draft's probability of the text's token, at temperature 1."""
    log_CV = (
        distributions.draft_log_CV
        if distributions.temperature in (0.0, 1.0)
        else torch.log_softmax(distributions.logits_CV, -1)
    )
    labels_C1 = distributions.labels_C[:, None]
    slope_CV = log_CV.exp()
    slope_CV.scatter_add_(1, labels_C1, torch.full_like(slope_CV[:, :1], -1.0))
    return -log_CV.gather(1, labels_C1)[:, 0], slope_CV


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
    distributions: Distributions, loss_C: torch.Tensor, by_probs_CV: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """From a loss's slope in the draft's probabilities (up to a constant) to that in its logits."""
    draft_CV = distributions.draft_probs_CV
    mean_C1 = (draft_CV * by_probs_CV).sum(-1, keepdim=True)
    return loss_C, draft_CV * (by_probs_CV - mean_C1) / distributions.temperature


def _uncovered(distributions: Distributions, draws: int) -> tuple[torch.Tensor, torch.Tensor]:
    """-log of the target's mass that `draws` draws from the sharpened draft cover."""
    target_CV = distributions.target_probs_CV
    sharp_CV = torch.softmax(distributions.logits_CV * distributions.sharpness, -1)
    missed_CV = torch.log1p(-sharp_CV.clamp_max(1 - torch.finfo(sharp_CV.dtype).eps))
    covered_C = (target_CV * -torch.expm1(draws * missed_CV)).sum(-1).clamp_min(_tiny(sharp_CV))
    gain_CV = target_CV * (draws * torch.exp((draws - 1) * missed_CV))
    gain_CV = gain_CV - (sharp_CV * gain_CV).sum(-1, keepdim=True)
    return -covered_C.log(), sharp_CV * gain_CV * (-distributions.sharpness / covered_C[:, None])


def _tiny(tensor: torch.Tensor) -> float:
    return torch.finfo(tensor.dtype).tiny
