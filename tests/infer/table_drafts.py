"""Drafts over a vocabulary of four tokens, drawn with a chooser: every kind of group, chain and tree."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import enumeration as en
import torch

from draftsmith.infer.contract.draft import ROOT, Draft, Group

Law = Callable[[tuple[int, ...]], torch.Tensor]

TARGET = {(): [0.4, 0.3, 0.2, 0.1], (0,): [0.1, 0.6, 0.2, 0.1], (1,): [0.25, 0.25, 0.3, 0.2]}
DRAFT = {(): [0.1, 0.2, 0.3, 0.4], (0,): [0.3, 0.2, 0.4, 0.1], (1,): [0.0, 0.5, 0.5, 0.0]}


def target_distribution(path: tuple[int, ...]) -> list[float]:
    return TARGET.get(path, [0.2, 0.5, 0.1, 0.2])


def draft_distribution(path: tuple[int, ...]) -> list[float]:
    return DRAFT.get(path, [0.4, 0.1, 0.25, 0.25])


def distribution(path: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor(draft_distribution(path), dtype=torch.float64)


def laws(seed: int) -> tuple[Callable[[tuple[int, ...]], list[float]], Law]:
    """A target's and a draft's distributions over three tokens for every path."""

    def of(name: str, path: tuple[int, ...]) -> list[float]:
        chance = Random(f"{name} {seed} {path}")
        weights = [chance.random() ** 2 + 0.01 for _ in range(3)]
        return [weight / sum(weights) for weight in weights]

    return lambda path: of("target", path), lambda path: torch.tensor(of("draft", path), dtype=torch.float64)


def draw_children(
    draft: Draft,
    parent: int,
    count: int,
    replacement: bool,
    chooser: Any,
    distribution_of: Law = distribution,
) -> list[int]:
    """`count` draws from one group below `parent`."""
    probs_V = distribution_of(en.path_of(draft, parent))
    group, left_V, nodes = Group(probs_V, with_replacement=replacement), probs_V.clone(), []
    for _ in range(count):
        if not left_V.sum() > 0:
            break
        token = chooser.draw(left_V)
        nodes.append(draft.sampled(parent, token, group, "drawn", float(left_V[token])))
        if not replacement:
            left_V[token] = 0.0
    return nodes


def chain_of(depth: int, distribution_of: Law = distribution) -> Callable[[Any], Draft]:
    """A chain of drawn tokens."""

    def propose(chooser: Any) -> Draft:
        draft, node = Draft(), ROOT
        for _ in range(depth):
            (node,) = draw_children(draft, node, 1, True, chooser, distribution_of)
        return draft

    return propose


chain, chain_of_three = chain_of(2), chain_of(3)


def siblings(replacement: bool, count: int) -> Callable[[Any], Draft]:
    def propose(chooser: Any) -> Draft:
        draft = Draft()
        draw_children(draft, ROOT, count, replacement, chooser)
        return draft

    return propose


def tree(replacement: bool) -> Callable[[Any], Draft]:
    def propose(chooser: Any) -> Draft:
        draft = Draft()
        for node in dict.fromkeys(draw_children(draft, ROOT, 2, replacement, chooser)):
            draw_children(draft, node, 2, replacement, chooser)
        return draft

    return propose


def outright_tree(chooser: Any) -> Draft:
    draft = Draft()
    first = draft.outright(ROOT, 1, "found")
    draft.outright(ROOT, 3, "found")
    draft.outright(first, 2, "found")
    return draft


def outright_then_drawn(chooser: Any) -> Draft:
    draft = Draft()
    draft.outright(ROOT, 1, "found")
    draw_children(draft, ROOT, 2, False, chooser)
    draft.outright(ROOT, 0, "found")
    return draft


def drawn_then_outright(chooser: Any) -> Draft:
    draft = Draft()
    node = draw_children(draft, ROOT, 1, True, chooser)[0]
    draft.outright(ROOT, 2, "found")
    draft.outright(node, 1, "found")
    draw_children(draft, node, 1, True, chooser)
    return draft


def two_groups(chooser: Any) -> Draft:
    draft = Draft()
    draw_children(draft, ROOT, 2, False, chooser)
    other = Group(torch.tensor([0.7, 0.1, 0.1, 0.1], dtype=torch.float64))
    for _ in range(2):
        token = chooser.draw(other.draft_probs)
        draft.sampled(ROOT, token, other, "other", 0.5)
    return draft


def subset_vocabulary(chooser: Any) -> Draft:
    draft = Draft()
    group = Group(torch.tensor([0.75, 0.25], dtype=torch.float64), ids=torch.tensor([3, 1]))
    for _ in range(2):
        picked = chooser.draw(group.draft_probs)
        draft.sampled(ROOT, [3, 1][picked], group, "narrow", 0.5)
    return draft


def adaptive_growth(chooser: Any) -> Draft:
    """Whether to go on, and where, follows from what was drawn before: appending may look at it."""
    draft = Draft()
    nodes = draw_children(draft, ROOT, 1, True, chooser)
    if draft.tokens[nodes[0]] in (0, 3):
        nodes = draw_children(draft, nodes[0], 2, True, chooser)
        if draft.tokens[nodes[-1]] == 1:
            draw_children(draft, ROOT, 2, True, chooser)
    else:
        draft.outright(ROOT, 0, "found")
    return draft


def probes(chooser: Any) -> Draft:
    draft = Draft()
    probe = draft.probe(ROOT, 0)
    draft.probe(probe, 1)
    draw_children(draft, ROOT, 1, True, chooser)
    return draft


def outright_above_a_chain(chooser: Any) -> Draft:
    draft = Draft()
    node = draft.outright(ROOT, 1, "found")
    (node,) = draw_children(draft, node, 1, True, chooser)
    draw_children(draft, node, 1, True, chooser)
    return draft


def outright_below_a_chain(chooser: Any) -> Draft:
    draft = Draft()
    (node,) = draw_children(draft, ROOT, 1, True, chooser)
    (node,) = draw_children(draft, node, 1, True, chooser)
    draft.outright(draft.outright(node, 2, "found"), 1, "found")
    return draft


def from_the_rest_then_the_set(chooser: Any) -> Draft:
    """A token drawn from what is left of the draft's distribution without an outright set is tried before the set."""
    draft, chosen = Draft(), (1, 3)
    probs_V = distribution(()).clone()
    probs_V[list(chosen)] = 0.0
    group = Group(probs_V / probs_V.sum())
    node = draft.sampled(ROOT, chooser.draw(group.draft_probs), group, "drawn", 0.5)
    for token in chosen:
        draft.outright(ROOT, token, "found")
    draw_children(draft, node, 1, True, chooser)
    return draft


def outright_again_drawn(chooser: Any) -> Draft:
    """A token that is outright and has a drawn child may be drawn beside it: then its subtree is spent."""
    draft = Draft()
    node = draft.outright(ROOT, 1, "found")
    draw_children(draft, node, 1, True, chooser)
    draw_children(draft, ROOT, 2, True, chooser)
    return draft


SOUND = {
    "chain": chain,
    "one sample": siblings(True, 1),
    "three with replacement": siblings(True, 3),
    "three without replacement": siblings(False, 3),
    "all without replacement": siblings(False, 4),
    "tree with replacement": tree(True),
    "tree without replacement": tree(False),
    "chain of three": chain_of_three,
    "outright above a chain": outright_above_a_chain,
    "outright below a chain": outright_below_a_chain,
    "from the rest, then the set": from_the_rest_then_the_set,
    "outright, and drawn again": outright_again_drawn,
    "outright tree": outright_tree,
    "outright, then drawn": outright_then_drawn,
    "drawn, then outright": drawn_then_outright,
    "two groups": two_groups,
    "subset vocabulary": subset_vocabulary,
    "adaptive growth": adaptive_growth,
    "probes": probes,
    "empty": lambda chooser: Draft(),
}

# No node has two trials: what `block` verifies as a whole.
CHAINS = ("chain", "one sample", "chain of three", "outright above a chain", "outright below a chain")
