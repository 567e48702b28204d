"""Prompt lookup drafts what followed the same n-gram in the row's own text, in constant time a token."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from draftsmith.infer.contract.draft import ROOT, Draft
from draftsmith.infer.contract.protocols import Budget
from draftsmith.infer.contract.row import Row
from draftsmith.retrieval import PromptLookup

AMPLE = Budget(64, 64)


def drafted(ids: list[int], budget: Budget = AMPLE, **arguments: int) -> Draft:
    drafter, row = PromptLookup(**arguments), Row("0", list(ids))
    drafter.open([row])
    (draft,) = drafter.propose([row], [budget])
    return draft


def paths(draft: Draft) -> list[list[int]]:
    found = []
    for node in range(len(draft)):
        path, at = [], node
        while at != ROOT:
            path.append(draft.tokens[at])
            at = draft.parents[at]
        found.append(path[::-1])
    return found


def test_the_longest_ngram_wins_and_the_latest_match_comes_first() -> None:
    draft = drafted([1, 2, 3, 7, 8, 9, 2, 3, 5, 6, 1, 2, 3], matches=1, num_draft_tokens=2)
    assert draft.tokens == [7, 8], "1 2 3 is longer than 2 3"
    draft = drafted([2, 3, 7, 9, 2, 3, 5, 6, 2, 3], matches=1, num_draft_tokens=2)
    assert draft.tokens == [5, 6]


def test_several_matches_make_one_tree() -> None:
    draft = drafted([2, 3, 7, 9, 2, 3, 7, 6, 2, 3], matches=2, num_draft_tokens=2)
    assert paths(draft) == [[7], [7, 6], [7, 9]]


def test_nothing_is_drafted_where_nothing_matches() -> None:
    assert len(drafted([1, 2, 3, 4])) == 0
    assert len(drafted([1])) == 0
    assert len(drafted([1, 2, 1], min_ngram=2)) == 0


@settings(max_examples=200, deadline=None)
@given(
    ids=st.lists(st.integers(0, 4), min_size=1, max_size=60), nodes=st.integers(0, 20), depth=st.integers(0, 12),
    matches=st.integers(1, 5), max_ngram=st.integers(1, 4),
)  # fmt: skip
def test_every_path_stands_in_the_text_right_after_the_newest_tokens(
    ids: list[int], nodes: int, depth: int, matches: int, max_ngram: int
) -> None:
    draft = drafted(ids, Budget(nodes, depth), matches=matches, max_ngram=max_ngram)
    draft.check(5)
    assert len(draft) <= nodes
    assert draft.depth <= depth
    for path in paths(draft):
        follows = [ids[-1], *path]
        assert any(ids[at : at + len(follows)] == follows for at in range(len(ids) - 1))


def test_a_token_costs_the_same_at_any_length() -> None:
    """The text grows by a token at a time, as in decoding; a rescan would cost twenty times as much at the end."""
    drafter = PromptLookup()
    row = Row("0", [0])
    drafter.open([row])
    spent = []
    for at in range(20_000):
        row.ids.append((at * at * 7919 + at) % 997)
        began = time.perf_counter()
        drafter.propose([row], [Budget(64, 64)])
        spent.append(time.perf_counter() - began)
    early, late = sorted(spent[1000:3000]), sorted(spent[-2000:])
    assert late[1000] < 5 * early[1000]


@pytest.mark.parametrize("bad", [{"num_draft_tokens": 0}, {"max_ngram": 1, "min_ngram": 2}, {"matches": 0}])
def test_arguments_that_make_no_sense_are_refused(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        PromptLookup(**bad)
