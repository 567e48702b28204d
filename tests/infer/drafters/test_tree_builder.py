"""The tree builder: budgets are never exceeded, and used when there is enough to use them for."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draftsmith.infer.contract.draft import ROOT
from draftsmith.infer.contract.protocols import Budget
from draftsmith.infer.drafters.tree_builder import Candidate, Growth, grow, grow_looked_up


def endless(branching: int, calls: list[int]):
    """Every node has `branching` children whose probabilities fall off, whatever is asked."""

    def expand(asked):
        calls.append(sum(len(leaves) for _, leaves in asked))
        return [
            [[Candidate(10 * i + k, 0.6 / (k + 1), "s") for k in range(branching)] for i in range(len(leaves))]
            for _, leaves in asked
        ]

    return expand


@settings(max_examples=200, deadline=None)
@given(
    nodes=st.integers(0, 40), depth=st.integers(0, 9), branching=st.integers(1, 6), width=st.integers(1, 6),
    rows=st.integers(1, 3),
)  # fmt: skip
def test_budgets_hold_for_every_value_and_are_used(
    nodes: int, depth: int, branching: int, width: int, rows: int
) -> None:
    growths = [Growth(Budget(nodes, depth)) for _ in range(rows)]
    calls: list[int] = []
    grow(growths, endless(branching, calls), width=width)
    assert len(calls) <= depth
    assert all(call <= max(width, 1) * rows for call in calls)
    for growth in growths:
        draft, placed = growth.draft()
        draft.check(1000)
        assert len(draft) <= nodes
        assert draft.depth <= depth
        assert placed[ROOT] == ROOT
        if nodes and depth:
            assert len(draft) == min(nodes, len(growth.leaves))


@settings(max_examples=200, deadline=None)
@given(nodes=st.integers(0, 30), depth=st.integers(0, 7), seed=st.integers(0, 10**6))
def test_looking_up_one_leaf_at_a_time_gives_the_tree_of_rounds_over_all(nodes: int, depth: int, seed: int) -> None:
    """Confidences of one decimal, so that many reaches are equal: then those of either tree are the same."""

    def below(growth: Growth, leaf: int) -> list[Candidate]:
        path = []
        while leaf != ROOT:
            path.append(growth.leaves[leaf].candidate.token)
            leaf = growth.leaves[leaf].parent
        drawn = random.Random(hash((seed, *path)))
        confidences = sorted((drawn.randint(0, 10) / 10 for _ in range(drawn.randint(0, 4))), reverse=True)
        return [Candidate(token, confidence, "s") for token, confidence in enumerate(confidences)]

    rounds, looked_up = Growth(Budget(nodes, depth)), Growth(Budget(nodes, depth))
    grow([rounds], lambda asked: [[below(rounds, leaf) for leaf in leaves] for _, leaves in asked], width=max(nodes, 1))
    calls: list[int] = []
    grow_looked_up(looked_up, lambda leaf: calls.append(leaf) or below(looked_up, leaf))
    assert looked_up.reaches() == pytest.approx(rounds.reaches())
    assert len(set(calls)) == len(calls) <= nodes + 1
    looked_up.draft()[0].check(1000)


def test_the_likeliest_paths_are_kept_and_deep_ones_among_them() -> None:
    sure = [Candidate(1, 0.9, "s"), Candidate(2, 0.05, "s")]

    def expand(asked):
        return [[sure for _ in leaves] for _, leaves in asked]

    growth = Growth(Budget(5, 5))
    grow([growth], expand, width=1)
    draft, _ = growth.draft()
    assert draft.tokens == [1] * 5
    assert draft.is_chain()


def test_nothing_is_expanded_below_the_least_worth() -> None:
    growth = Growth(Budget(20, 9))
    calls: list[int] = []
    grow([growth], endless(1, calls), width=1, min_reach=0.3)
    draft, _ = growth.draft()
    assert len(calls) == 3, "0.6, 0.36 and 0.216: the third is drafted, and nothing below it"
    assert draft.depth == 3
