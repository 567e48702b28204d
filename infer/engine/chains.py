"""Cuts a draft tree to one chain, for a target whose state cannot branch.

What may decide the cut depends on how the tokens came about (see infer/contract/draft.py):

- A tree of outright trials only may be cut by any rule. The chain that is kept is the one with the most tokens to be
  expected: the path with the largest sum, over its nodes, of the probability that all of it down to there is accepted.
- As soon as one trial was drawn, the first trial at each node of the path is kept and nothing else counts. Keeping the
  drawn token that looks likeliest, or the branch that grew deepest, would choose among tokens after they were drawn:
  the kept one's distribution would no longer be the one that its trial claims, and the text would be biased towards
  what the draft model prefers. The first trial was drawn before its siblings and is kept whatever it and they turned
  out to be, so its claim stays true.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from draftsmith.infer.contract.draft import ROOT, Draft, Trial
from draftsmith.infer.contract.protocols import Budget, Target, Verdict
from draftsmith.infer.contract.row import Row

# A row with more accepted tokens than this still to be read again gets no draft in that step: then all of them, and the
# newest, are read for good. Each would cost a token of every pass until some draft is accepted to its end.
MOST_UNREAD = 8


@dataclass(frozen=True, slots=True)
class CutDraft:
    """A chain, and the node of the drafter's own draft that each of its nodes was."""

    draft: Draft
    nodes: list[int]

    def undone(self, verdict: Verdict) -> Verdict:
        """The verdict as the drafter knows the nodes."""
        accepted = [trial._replace(node=self.nodes[trial.node]) for trial in verdict.accepted]
        return replace(verdict, path=[self.nodes[node] for node in verdict.path], accepted=accepted)


def cut_to_chain(draft: Draft) -> CutDraft:
    """The chain of `draft` to verify; the draft itself if it is one already."""
    if draft.is_chain() and all(len(trials) == 1 for trials in draft.trials.values()) and not draft.probes:
        return CutDraft(draft, list(range(len(draft))))
    outright = all(trial.group.outright for trials in draft.trials.values() for trial in trials)
    best = _likeliest(draft) if outright else {node: trials[0] for node, trials in draft.trials.items() if trials}
    chain, nodes, at, below = Draft(exits=draft.exits), [], ROOT, ROOT
    while at in best:
        trial = best[at]
        token = draft.tokens[trial.node]
        if trial.group.outright:
            below = chain.outright(below, token, trial.source, trial.confidence)
        else:
            below = chain.sampled(below, token, trial.group, trial.source, trial.confidence)
        at = trial.node
        nodes.append(at)
        if at in draft.also:
            chain.also[below] = draft.also[at]
    return CutDraft(chain, nodes)


def row_budget(budget: Budget, row: Row, target: Target) -> Budget:
    """Nothing for a row with too many tokens to read again.

    Rows beside it may save it some of them. Drawn tokens are keyed by the starts of steps, so a row that may draw is
    judged as if it were alone: its text does not depend on its batch."""
    if target.draft_shape != "chain":
        return budget
    unread = target.unread(row) if row.settings.greedy else target.unread_alone(row)
    return Budget(0, 0) if unread > MOST_UNREAD else budget


def _likeliest(draft: Draft) -> dict[int, Trial]:
    """For each node with trials the one that starts the best path below it; the first of equals."""
    expected = [0.0] * len(draft)
    best: dict[int, Trial] = {}
    for parent in (*range(len(draft) - 1, ROOT, -1), ROOT):  # children come after their parents
        for trial in draft.trials.get(parent, ()):
            gain = trial.confidence * (1 + expected[trial.node])
            if parent not in best or gain > best[parent].confidence * (1 + expected[best[parent].node]):
                best[parent] = trial
        if parent != ROOT and parent in best:
            expected[parent] = best[parent].confidence * (1 + expected[best[parent].node])
    return best
