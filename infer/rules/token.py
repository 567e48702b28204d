"""Token-by-token verification: recursive rejection over a parent's trials, in list order.

At a parent the residual r starts as the target's distribution. A trial's token x, drawn from q (given the earlier
trials of its group), is accepted with min(1, r(x) / q(x)); else r becomes (r - q)+ normalised. After the last trial the
target's own token is drawn from r. This gives the target's distribution whatever the trials are (arXiv 2211.17192 for
one trial, 2305.09781 for several; without replacement 2402.14873).

If every trial of a parent is outright, the target's own draw is made first and looked up among them: this has the same
distribution, and gives the very token that plain sampling with the same seed gives. Temperature 0 is such a case for
every trial, because the residual of a point mass stays that point mass until its token is tried.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from draftsmith.infer.contract.distribution import draw_by_inversion
from draftsmith.infer.contract.draft import ROOT, Draft, Group, Trial
from draftsmith.infer.contract.protocols import TargetDistribution, Verdict
from draftsmith.infer.contract.rng import StepRng
from draftsmith.infer.contract.trace import Tried


def rejection(draft: Draft, distribution: TargetDistribution, rng: StepRng) -> Verdict:
    """Walk down from the prefix while a trial is accepted; end with the target's own token."""
    return walk(draft, distribution, rng, Verdict([], [], -1))


def walk(draft: Draft, distribution: TargetDistribution, rng: StepRng, verdict: Verdict) -> Verdict:
    """Continue from the end of the verdict's path, and set its next token."""
    path = verdict.path
    node = path[-1] if path else ROOT
    while True:
        trials = draft.trials.get(node, ())
        depth = len(path)
        if distribution.greedy or all(trial.group.outright for trial in trials):
            token = distribution.draw(node)
            found = _look_up(draft, trials, token)
        else:
            found, token = _reject_in_order(draft, trials, distribution.probs(node), rng, depth)
        note(verdict.tried, trials, found, depth + 1)
        if found is None:
            verdict.next_token = token
            return verdict
        verdict.accepted.append(trials[found])
        node = trials[found].node
        path.append(node)


def _look_up(draft: Draft, trials: Sequence[Trial], token: int) -> int | None:
    for index, trial in enumerate(trials):
        if draft.tokens[trial.node] == token:
            return index
    return None


def _reject_in_order(
    draft: Draft, trials: Sequence[Trial], probs_V: torch.Tensor, rng: StepRng, depth: int
) -> tuple[int | None, int]:
    """The index of the accepted trial, or None and the token drawn from the residual."""
    residual_V = probs_V.to(torch.float64)
    drawn: dict[int, list[int]] = {}
    for index, trial in enumerate(trials):
        token = draft.tokens[trial.node]
        uniform = rng.uniform(depth, "accept", index)
        if trial.group.outright:
            if uniform < float(residual_V[token]):
                return index, token
            left_V = residual_V.clone()
            left_V[token] = 0.0
        else:
            draft_V = draft_probs(trial.group, residual_V, drawn.setdefault(id(trial.group), []))
            weight = float(draft_V[token])
            if not weight > 0:
                raise ValueError(f"a sampled trial of {trial.source} has probability 0 under its own draft_probs")
            if uniform * weight < float(residual_V[token]):
                return index, token
            drawn[id(trial.group)].append(token)
            left_V = (residual_V - draft_V).clamp_(min=0.0)
        total = float(left_V.sum())
        if not total > 0:
            return index, token
        residual_V = left_V / total
    return None, draw_by_inversion(residual_V, rng.uniform(depth, "draw"))


def draft_probs(group: Group, like_V: torch.Tensor, drawn: list[int]) -> torch.Tensor:
    """[V] the distribution of the group's next draw, given its earlier ones (`drawn`)."""
    draft_V = group.dense(like_V.numel(), like_V.device)
    if not group.with_replacement and drawn:
        draft_V = draft_V.clone()
        draft_V[drawn] = 0.0
    return draft_V / draft_V.sum()


def note(tried: list[Tried], trials: Sequence[Trial], found: int | None, depth: int) -> None:
    """Note the trials that were reached below a node: all of them, or up to the accepted one."""
    reached = trials if found is None else trials[: found + 1]
    for index, trial in enumerate(reached):
        tried.append(Tried(depth, trial.source, trial.confidence, index == found))
