"""Block verification, the default rule: a chain with drawn tokens is verified as a whole (arXiv 2403.10444).

It never accepts fewer tokens than `token` does in expectation, and more wherever the draft proposes some tokens too
often and others too rarely: what one token loses the next ones can make up for. It is traversal on one chain
(infer/rules/traversal.py). Trees are verified token by token, and drafts without drawn tokens by looking the target's
own tokens up, as by every rule.
"""

from __future__ import annotations

from draftsmith.infer.contract.draft import Draft
from draftsmith.infer.contract.protocols import TargetDistribution, Verdict
from draftsmith.infer.contract.rng import StepRng
from draftsmith.infer.rules.token import rejection
from draftsmith.infer.rules.traversal import traversal


def block(draft: Draft, distribution: TargetDistribution, rng: StepRng) -> Verdict:
    """`traversal` for a chain (no node has two trials), `token` for a tree."""
    is_chain = all(len(trials) <= 1 for trials in draft.trials.values())
    return (traversal if is_chain else rejection)(draft, distribution, rng)
