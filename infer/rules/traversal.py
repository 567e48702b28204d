"""Traversal verification: a draft with drawn trials is verified as a whole, from its ends upwards (arXiv 2505.12398).

A token-by-token rule refuses a node as soon as its own token fails, although what was drawn below it might have made up
for that. Here every node has a *cap*, the probability that the path down to it is kept: 1 at the root, and at a trial's
node min(1, cap x residual(x) / q(x)). The walk goes down the first trials to a node without any, keeps its path with
the probability of its cap, or else goes back to the parent, which loses that trial: with n = (cap x residual - q)+ and
its sum z, the parent's cap becomes z / (z + 1 - cap) and its residual n / z. Then its next trial is walked, and after
the last one the parent itself is kept or not. The root is always kept. On one chain this is block verification
(2403.10444).

A token that was drawn again below the same parent is kept or refused by itself: what is below it is spent. Where all
trials below a node are outright, no rule keeps more than the look-up does, so such a node ends the walk, and the
look-up goes on from it (infer/rules/token.py). A draft without drawn trials is therefore verified as by `token`.

Whether a node is kept depends on what was drawn below it, so uniforms are read beyond the accepted point: they are
keyed by the step's start. The target's own draws are read at the accepted point only, and keep their positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from draftsmith.infer.contract.distribution import draw_by_inversion
from draftsmith.infer.contract.draft import ROOT, Draft, Trial
from draftsmith.infer.contract.protocols import TargetDistribution, Verdict
from draftsmith.infer.contract.rng import StepRng
from draftsmith.infer.rules.token import draft_probs, note, rejection, walk


def traversal(draft: Draft, distribution: TargetDistribution, rng: StepRng) -> Verdict:
    """Keep the first path that passes, from its end upwards; then the target's own token from what is left there."""
    drawn = drawn_below(draft)
    if distribution.greedy or ROOT not in drawn:
        return rejection(draft, distribution, rng)
    visits = _kept_visits(draft, distribution, rng, drawn)
    verdict = Verdict([visit.node for visit in visits[1:]], [visit.trial for visit in visits[:-1]], -1, jointly=True)
    for depth, visit in enumerate(visits, start=1):
        note(verdict.tried, visit.trials, visit.refused if visit is not visits[-1] else None, depth)
    last, uniform = visits[-1], rng.uniform(len(verdict.path), "draw")
    if last.node not in drawn:
        return walk(draft, distribution, rng, verdict)
    if last.residual_V is None:
        verdict.next_token = distribution.draw(last.node, uniform)
    else:
        verdict.next_token = draw_by_inversion(last.residual_V, uniform)
    return verdict


def drawn_below(draft: Draft) -> set[int]:
    """The nodes with a drawn trial anywhere below them; ROOT is among them if there is any."""
    found: set[int] = set()
    for parent in sorted(draft.trials, reverse=True):  # children come after their parents
        if any(not trial.group.outright or trial.node in found for trial in draft.trials[parent]):
            found.add(parent)
    return found


@dataclass(slots=True)
class _Visit:
    """A node on the path that is walked. `trials` are those to walk below it, and `refused` of them were.

    `residual_V` is None where there are no trials: it is the target's distribution, seldom needed. `drawn`: the tokens
    of the refused draws of each group; `next_V`: the distribution of the next trial's token, if it is a drawn one.
    """

    node: int
    cap: float
    trials: Sequence[Trial]
    residual_V: torch.Tensor | None
    refused: int = 0
    drawn: dict[int, list[int]] = field(default_factory=dict)
    next_V: torch.Tensor | None = None

    @property
    def trial(self) -> Trial:
        return self.trials[self.refused]

    def next_cap(self, token: int) -> float:
        """The cap of the next trial's node."""
        assert self.residual_V is not None
        weight, group = 1.0, self.trial.group
        if not group.outright:
            self.next_V = draft_probs(group, self.residual_V, self.drawn.get(id(group), []))
            weight = float(self.next_V[token])
        if not weight > 0:
            raise ValueError(f"a sampled trial of {self.trial.source} has probability 0 under its own draft_probs")
        return min(self.cap * float(self.residual_V[token]) / weight, 1.0)

    def refuse(self, token: int) -> None:
        """The next trial, of `token`, and all below it were refused: take its distribution from what is left."""
        assert self.residual_V is not None
        left_V = self.cap * self.residual_V
        if self.next_V is None:
            left_V[token] = 0.0
        else:
            left_V = (left_V - self.next_V).clamp_(min=0.0)
            self.drawn.setdefault(id(self.trial.group), []).append(token)
        total = float(left_V.sum())
        # If nothing is left, the node is not kept; at the root only rounding can have refused the trial.
        if total > 0:
            self.residual_V = left_V / total
        self.cap = total / (total + (1.0 - self.cap)) if total > 0 else 0.0
        self.next_V = None
        self.refused += 1


def _kept_visits(draft: Draft, distribution: TargetDistribution, rng: StepRng, drawn: set[int]) -> list[_Visit]:
    """The visits from the root to the node that is kept."""
    walked: set[int] = set()
    visits = [_visit(draft, distribution, ROOT, 1.0, drawn, walked)]
    number = 0
    while True:
        visit = visits[-1]
        if visit.refused < len(visit.trials):
            node = visit.trial.node
            cap = visit.next_cap(draft.tokens[node])
            if cap > 0:
                visits.append(_visit(draft, distribution, node, cap, drawn, walked))
            else:
                visit.refuse(draft.tokens[node])
        # The root's cap is 1, but rounding may leave nothing there.
        elif visit.node == ROOT or rng.step_uniform("accept", number) < visit.cap:
            return visits
        else:
            number += 1
            visits.pop()
            visits[-1].refuse(draft.tokens[visit.node])


def _visit(
    draft: Draft, distribution: TargetDistribution, node: int, cap: float, drawn: set[int], walked: set[int]
) -> _Visit:
    trials = draft.trials[node] if node in drawn and node not in walked else ()
    walked.add(node)
    return _Visit(node, cap, trials, distribution.probs(node).to(torch.float64) if trials else None)
