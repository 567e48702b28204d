"""Draws drafts from the draft model's own distribution: chains and trees, with or without replacement.

Drafts only grow. How many children a node gets is decided from what was drawn before it, never from its own draws, and
nothing that was drawn is sorted, merged or dropped (see infer/contract/draft.py). Each row is decided for by its own
account, as if it were decoded alone.

Legend: Q nodes of one row, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from draftsmith.infer.contract.distribution import draw_by_inversion
from draftsmith.infer.contract.draft import ROOT, Draft, Group
from draftsmith.infer.contract.protocols import Budget
from draftsmith.infer.contract.rng import uniform
from draftsmith.infer.contract.row import Row
from draftsmith.infer.costs.account import Account
from draftsmith.infer.drafters.draft_model import DraftOutput, Limits, Reaches
from draftsmith.infer.drafters.tree_builder import TreePricing

# (row index, nodes) pairs; the nodes are [ROOT] in the first round.
Asked = list[tuple[int, list[int]]]
# Runs the asked nodes of these drafts, reached with these probabilities, through the draft model.
Read = Callable[[Asked, Sequence[Draft], Reaches], DraftOutput]
# (exits, number of the node) -> the source that its children are credited to.
Source = Callable[[Sequence[int], int], str]


def draw(
    rows: Sequence[Row],
    limits: Sequence[Budget],
    shape: Limits,
    read: Read,
    source: Source,
    pricing: TreePricing | None,
) -> list[Draft]:
    """A drawn draft per row, one level per pass of the draft model. `pricing` decides which nodes are worth a pass, and
    how many children are worth verifying; without it both have the limits of `shape`."""
    accounts = [None if pricing is None else pricing.policy.alone(row) for row in rows]
    drafts = [Draft() for _ in rows]
    reaches: list[dict[int, float]] = [{ROOT: 1.0} for _ in rows]
    frontier = [[ROOT] for _ in rows]
    for depth in range(max(limit.depth for limit in limits)):
        asked = [(b, frontier[b]) for b in range(len(rows)) if frontier[b] and depth < limits[b].depth]
        if pricing is not None:  # these nodes are drawn already: choosing among them keeps the distribution
            asked = pricing.drawn_worth_reading(asked, lambda b, node: reaches[b][node], depth == 0)
        if not asked:
            break
        output = read(asked, drafts, [[reaches[b][node] for node in nodes] for b, nodes in asked])
        frontier = [[] for _ in rows]
        at = 0
        for b, nodes in asked:
            logits_QV = output.logits_NV[at : at + len(nodes)]
            exits = output.exits[at : at + len(nodes)]
            at += len(nodes)
            drafts[b].exits += [(depth + 1, exit) for exit in exits]
            sources = [source(exits, q) for q in range(len(nodes))]
            frontier[b] = _children(
                rows[b], drafts[b], nodes, logits_QV, sources, limits[b], shape, reaches[b], accounts[b]
            )
    return drafts


def _children(
    row: Row,
    draft: Draft,
    frontier: list[int],
    logits_QV: torch.Tensor,
    sources: Sequence[str],
    limit: Budget,
    shape: Limits,
    reaches: dict[int, float],
    account: Account | None,
) -> list[int]:
    """Draw the children of each frontier node; returns the distinct new nodes, in order.

    How many to draw is decided before drawing, from the nodes drawn so far.
    """
    made: list[int] = []
    for parent, logits_V, source in zip(frontier, logits_QV, sources):
        count = min(_slots(reaches[parent], len(draft), shape.top_k, account), limit.nodes - len(draft))
        distribution_V = draft_probs(row, logits_V)
        group = Group(distribution_V, with_replacement=shape.replacement)
        left_V = distribution_V
        for i in range(count):
            if not shape.replacement and i and not float(left_V.sum()) > 0:
                break
            number = (parent + 1) * shape.top_k + i
            position = len(row.ids) + (0 if parent == ROOT else draft.depths[parent])
            level = uniform(row.settings.seed, row.key, position, "draft", number)
            token = draw_by_inversion(left_V, level)
            known = draft.child(parent, token)
            confidence = float(left_V[token] / left_V.sum())
            node = draft.sampled(parent, token, group, source, confidence)
            if known is None:
                made.append(node)
                accepted = confidence if account is None else account.drawn_acceptance(i)
                reaches[node] = reaches[parent] * accepted
            if not shape.replacement:
                left_V = left_V.clone()
                left_V[token] = 0.0
    return made


def _slots(reach: float, nodes: int, most: int, account: Account | None) -> int:
    """How many children to draw below a node: as long as one more is worth verifying. Each is assumed to be accepted as
    often as the mean, if those before it were not; its token plays no part."""
    if account is None:
        return most
    found, count = account.found, 0
    left = reach * found
    while count < most and left * account.seconds_per_token > account.next_node(nodes + count):
        left *= 1 - found
        count += 1
    return count


def draft_probs(row: Row, logits_V: torch.Tensor) -> torch.Tensor:
    """[V] the draft's distribution at a node, after the row's temperature and truncation, float64."""
    scores_1V = logits_V[None].float()
    for warper in row.settings.warpers():
        scores_1V = warper(None, scores_1V)
    return torch.softmax(scores_1V[0].double(), -1)
