"""Draws drafts from the draft model's own distribution: chains and trees, with or without replacement.

Drafts only grow. Whether a node gets children, and how many, is decided from what was drawn before and from the
distribution that they would be drawn from, never from their own tokens; nothing that was drawn is sorted, merged or
dropped (see infer/contract/draft.py). Each row is decided for by its own account, whatever the rows beside it.

A node of a tree may be mixed: its likeliest tokens are taken outright, and one token is drawn from the rest. The drawn
one is tried first: then the node is passed as often as any design allows that takes these tokens outright.

Legend: Q nodes of one row, K likeliest tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from draftsmith.infer.contract.distribution import draw_by_inversion
from draftsmith.infer.contract.draft import ROOT, Draft, Group
from draftsmith.infer.contract.protocols import Budget
from draftsmith.infer.contract.rng import uniform
from draftsmith.infer.contract.row import Row
from draftsmith.infer.costs.acceptance import concentration
from draftsmith.infer.costs.account import Account
from draftsmith.infer.drafters.draft_model import DrawnLimits, Reaches
from draftsmith.infer.drafters.draft_reader import DraftOutput
from draftsmith.infer.drafters.tree_builder import TreePricing

# A row with more unread tokens than this is read apart; fewer are read with its first node. Reading that many serves
# all later steps, so it is not weighed against the gain of this one.
MAY_WAIT = 8

# (row index, nodes) pairs; the nodes are [ROOT] in the first round.
Asked = list[tuple[int, list[int]]]
# Runs the asked nodes of these drafts, reached with these probabilities, through the draft model.
Read = Callable[[Asked, Sequence[Draft], Reaches], DraftOutput]
# (output, number of the node) -> the source that its children are credited to.
Source = Callable[[DraftOutput, int], str]


def draw(
    rows: Sequence[Row],
    limits: Sequence[Budget],
    shape: DrawnLimits,
    read: Read,
    source: Source,
    entry: str,
    pricing: TreePricing | None,
) -> list[Draft]:
    """A drawn draft per row, one level per pass `entry` of the draft model. `pricing` decides which nodes are
    worth a pass, and how many children are worth verifying; without it both have the limits of `shape`."""
    drawings = [
        _Drawing(row, limit, shape, entry, *(() if pricing is None else (pricing.policy.alone(row), pricing.at_once)))
        for row, limit in zip(rows, limits)
    ]
    drafts = [drawing.draft for drawing in drawings]
    for depth in range(max(limit.depth for limit in limits)):
        asked = [(b, one.frontier) for b, one in enumerate(drawings) if one.frontier and depth < one.limit.depth]
        if pricing is not None:  # these nodes are drawn already: choosing among them keeps the distribution
            asked = _worth_reading(asked, drawings, pricing, depth)
        if not asked:
            break
        output = read(asked, drafts, [[drawings[b].reaches[node] for node in nodes] for b, nodes in asked])
        for one in drawings:
            one.frontier = []
        at = 0
        for b, nodes in asked:
            exits = output.exits[at : at + len(nodes)]
            drafts[b].exits += [(depth + 1, exit) for exit in exits]
            for q, node in enumerate(nodes):
                drawings[b].grow(node, output.logits_NV[at + q], source(output, at + q))
            at += len(nodes)
    return drafts


def _worth_reading(asked: Asked, drawings: Sequence[_Drawing], pricing: TreePricing, depth: int) -> Asked:
    if drawings[0].shape.top_k > 1:
        return pricing.drawn_worth_reading(asked, lambda b, node: drawings[b].reaches[node], depth == 0)
    kept = []
    for b, nodes in asked:
        unread = 1 + pricing.pending[b] if depth == 0 else 0 if pricing.at_once else 1
        if drawings[b].lengthens(nodes[0], unread):
            kept.append((b, nodes))
    return kept


@dataclass(slots=True)
class _Drawing:
    """One row's growing draft. `account`: with costs; `entry`: the draft's pass, `at_once`: which gives the
    distributions of every depth. `reaches`: each node's probability of being reached. `frontier`: the distinct nodes of
    the last level, in the order in which they were drawn."""

    row: Row
    limit: Budget
    shape: DrawnLimits
    entry: str
    account: Account | None = None
    at_once: bool = False
    draft: Draft = field(default_factory=Draft)
    reaches: dict[int, float] = field(default_factory=lambda: {ROOT: 1.0})
    frontier: list[int] = field(default_factory=lambda: [ROOT])

    def lengthens(self, node: int, unread: int) -> bool:
        """Whether it is worth reading the last node of a chain."""
        assert self.account is not None
        left = self.limit.depth - len(self.draft)
        reach, found, nodes = self.reaches[node], self.account.found, len(self.draft)
        return self.account.lengthen(reach, found, nodes, left, self.entry, unread, self.at_once)

    def grow(self, parent: int, logits_V: torch.Tensor, source: str) -> None:
        """Add the children of a node. How many is decided before any of them is drawn."""
        probs_V = draft_probs(self.row, logits_V)
        accepted = None if self.account is None else self.account.drawn_acceptance(concentration(probs_V))
        count = min(self._slots(parent, accepted), self.limit.nodes - len(self.draft))
        likeliest = self._outright(probs_V, count)
        if likeliest:
            rest_V = probs_V.clone()
            rest_V[likeliest] = 0.0
            if float(rest_V.sum()) > 0:
                left = float(rest_V.sum())
                self._draw(parent, rest_V / left, 1, source, None if accepted is None else left * accepted)
            for token in likeliest:
                confidence = float(probs_V[token])
                self._add(parent, self.draft.outright(parent, token, source, confidence), confidence)
        elif count > 0:
            self._draw(parent, probs_V, count, source, accepted)

    def _slots(self, parent: int, accepted: float | None) -> int:
        """How many children to draw below a node: as long as one more is worth verifying. A later one is assumed to be
        accepted as often as the mean, if those before it were not; its token plays no part."""
        account, most = self.account, self.shape.top_k
        if account is None or accepted is None:
            return most
        reach, nodes = self.reaches[parent], len(self.draft)
        if most == 1:
            room = self.limit.depth - nodes
            return int(account.lengthen(reach, accepted, nodes, room, self.entry, unread=0, at_once=self.at_once))
        count, gain, left = 0, reach * accepted, reach * (1 - accepted)
        while count < most and gain * account.seconds_per_token > account.next_node(nodes + count):
            gain, left = left * account.found, left * (1 - account.found)
            count += 1
        return count

    def _outright(self, probs_V: torch.Tensor, count: int) -> list[int]:
        """The likeliest tokens, if the node is to be mixed."""
        if count < 2 or self.shape.replacement:
            return []
        top_K = torch.topk(probs_V, min(count - 1, probs_V.numel()))
        if float(top_K.values.sum()) < self.shape.peaked:
            return []
        return [token for token, prob in zip(top_K.indices.tolist(), top_K.values.tolist()) if prob > 0]

    def _draw(self, parent: int, probs_V: torch.Tensor, count: int, source: str, accepted: float | None) -> None:
        group = Group(probs_V, with_replacement=self.shape.replacement)
        left_V = probs_V
        for i in range(count):
            if not self.shape.replacement and i and not float(left_V.sum()) > 0:
                break
            # Keyed by the step's start: numbers of a refused node must not come back in a later step.
            number = (parent + 1) * self.shape.top_k + i
            level = uniform(self.row.settings.seed, self.row.key, len(self.row.ids), "draft", number)
            token = draw_by_inversion(left_V, level)
            known = self.draft.child(parent, token)
            confidence = float(left_V[token] / left_V.sum())
            node = self.draft.sampled(parent, token, group, source, confidence)
            if known is None:
                self._add(parent, node, confidence if accepted is None else self._accepted(accepted, i))
            if not self.shape.replacement:
                left_V = left_V.clone()
                left_V[token] = 0.0

    def _accepted(self, first: float, number: int) -> float:
        """How likely draw `number` is accepted, if the first one is with probability `first`."""
        assert self.account is not None
        found = self.account.found
        return first if number == 0 else (1 - first) * found * (1 - found) ** (number - 1)

    def _add(self, parent: int, node: int, accepted: float) -> None:
        self.frontier.append(node)
        self.reaches[node] = self.reaches[parent] * accepted


def draft_probs(row: Row, logits_V: torch.Tensor) -> torch.Tensor:
    """[V] the draft's distribution at a node, after the row's temperature and truncation, float64."""
    scores_1V = logits_V[None].float()
    for warper in row.settings.warpers():
        scores_1V = warper(None, scores_1V)
    return torch.softmax(scores_1V[0].double(), -1)
