"""The merged tree: a path is there once, parents before children, whatever the order in which sources come."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from draftsmith.infer.contract.draft import ROOT, Draft
from draftsmith.infer.drafters.mixed.merged_tree import MergedTree
from draftsmith.infer.drafters.mixed.pool import Pool
from draftsmith.infer.drafters.tree_builder import Candidate

PATHS = st.lists(st.lists(st.integers(0, 3), min_size=1, max_size=4), max_size=8)


def proposed(paths: list[list[int]], source: str) -> Draft:
    draft = Draft()
    for path in paths:
        draft.chain(path, source, [0.4] * len(path))
    return draft


@settings(max_examples=200, deadline=None)
@given(first=PATHS, second=PATHS, room=st.integers(0, 12))
def test_every_path_is_there_once_with_all_who_name_it(
    first: list[list[int]], second: list[list[int]], room: int
) -> None:
    drafts = [proposed(first, "a"), proposed(second, "b")]
    tree = MergedTree(Pool(2), room)
    for source, draft in enumerate(drafts):
        tree.graft([(source, draft, [0.4] * len(draft))])
    keys = list(zip(tree.parents, tree.tokens))
    assert len(set(keys)) == len(keys)
    assert sum(map(len, tree.named)) == sum(map(len, drafts))
    made, nodes = tree.draft()
    made.check(4)
    assert len(made) == min(room, len(tree))
    for leaf in range(len(tree)):
        parent = tree.parents[leaf]
        assert tree.reach(leaf) <= tree.reach(parent)
        assert abs(tree.reach(leaf) - tree.reach(parent) * tree.confidences[leaf]) < 1e-12
        if len(tree.named[leaf]) == 2 and leaf in nodes:
            assert nodes[leaf] in made.also


def test_a_lone_source_keeps_its_own_probabilities() -> None:
    tree = MergedTree(Pool(2), 9)
    tree.add(1, ROOT, [Candidate(5, 0.7, "b"), Candidate(6, 0.2, "b")])
    tree.add(0, ROOT, [])
    assert tree.confidences == [0.7, 0.2]
    assert tree.worth(ROOT) == 1 - (0.7 + 0.2)
    assert tree.wanted(1, 4, 2, 0.1) == [0, 1]
    assert tree.wanted(1, 1, 2, 0.0) == [ROOT]


def test_a_second_source_changes_the_reach_of_what_lies_below() -> None:
    tree = MergedTree(Pool(2), 9)
    tree.graft([(0, proposed([[5, 6, 7]], "a"), [0.5, 0.5, 0.5])])
    before = [tree.reach(leaf) for leaf in range(3)]
    tree.add(1, ROOT, [Candidate(9, 0.95, "b")])
    assert all(tree.reach(leaf) < old for leaf, old in enumerate(before))


def test_what_was_not_read_above_a_leaf_is_read_with_it() -> None:
    tree = MergedTree(Pool(2), 9)
    tree.graft([(0, proposed([[5, 6, 7], [8]], "a"), [0.9, 0.9, 0.9, 0.1])])
    tree.wanted(1, 9, 1, 0.0)
    assert [tree.tokens[leaf] for leaf in (0, 2, 3)] == [5, 6, 7]
    assert tree.with_ancestors(1, [3, 0]) == [ROOT, 0, 2, 3]
    tree.asked[1].update([ROOT, 0])
    assert tree.with_ancestors(1, [3]) == [2, 3]


def test_what_the_text_reached_is_graded_whether_or_not_it_was_kept() -> None:
    tree = MergedTree(Pool(2), 0)
    tree.graft([(0, proposed([[5, 6]], "a"), [0.4, 0.4]), (1, proposed([[5, 7], [4]], "b"), [0.4, 0.4, 0.4])])
    tree.grade([5, 7, 1])
    assert len(tree.pool._seen) == 4, "5 and 4 below the root, 6 and 7 below 5"
    tree.pool.refit()
    assert tree.pool.weights_F[5] > tree.pool.weights_F[0], "the second source was right twice, the first once"
