"""The tree builder: budgets are never exceeded, and used when there is enough to use them for."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from draftsmith.infer.contract.draft import ROOT, Draft
from draftsmith.infer.contract.protocols import Budget
from draftsmith.infer.costs.pass_costs import Costs, PassCost
from draftsmith.infer.costs.policy import Policy
from draftsmith.infer.drafters.tree_builder import Candidate, Growth, affordable, grow


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


def policy_with(per_node: float) -> Policy:
    """A target whose pass takes one second, and `per_node` more for each node."""
    policy = Policy(Costs({"target": PassCost((1, 101), (1.0, 1.0 + 100 * per_node))}), None)
    policy.begin([10])
    return policy


@settings(max_examples=200, deadline=None)
@given(shape=st.lists(st.tuples(st.integers(-1, 30), st.floats(0, 1)), max_size=30), per_node=st.floats(0.001, 0.9))
def test_what_is_cut_is_worth_less_than_what_it_costs_and_what_stays_is_a_tree(
    shape: list[tuple[int, float]], per_node: float
) -> None:
    draft = Draft()
    for token, (parent, confidence) in enumerate(shape):
        draft.outright(min(parent, token - 1), token, "s", confidence)
    (kept,) = affordable([draft], policy_with(per_node))
    kept.check(1000)
    reach = {-1: 1.0}
    for parent in range(-1, len(draft)):
        for trial in draft.trials.get(parent, ()):
            reach[trial.node] = reach[parent] * trial.confidence
    for node, token in enumerate(draft.tokens):
        sure = reach[node] > per_node * 1.001
        assert not sure or token in kept.tokens, "a node worth its seconds was cut"
    assert sum(reach[draft.tokens.index(token)] for token in kept.tokens) >= len(kept) * per_node * 0.999


def test_all_rows_of_a_step_share_one_width() -> None:
    wide, narrow = Draft(), Draft().chain([1], "s", [0.9])
    for token in range(4):
        wide.outright(ROOT, token, "s", 0.24)
    policy = policy_with(0.2)
    policy.begin([10, 10])
    kept = affordable([wide, narrow], policy)
    assert [len(draft) for draft in kept] == [1, 1], "a second node of the wide row would cost both rows"
