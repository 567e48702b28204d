"""A tree that is cut to a chain: the likeliest of outright trials, the first of drawn ones, by exact enumeration."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import enumeration as en
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from planted import plant

from draftsmith.infer.contract.draft import ROOT, Draft, Group
from draftsmith.infer.contract.protocols import Verdict
from draftsmith.infer.engine import chains
from draftsmith.infer.engine.chains import cut_to_chain
from draftsmith.infer.rules import token
from draftsmith.infer.rules.token import rejection

EXACT = 1e-12
TARGET = {(): [0.4, 0.3, 0.2, 0.1], (0,): [0.1, 0.6, 0.2, 0.1], (1,): [0.25, 0.25, 0.3, 0.2]}
DRAFT = {(): [0.1, 0.2, 0.3, 0.4], (0,): [0.3, 0.2, 0.4, 0.1], (1,): [0.0, 0.5, 0.5, 0.0]}


@pytest.fixture(autouse=True)
def branching(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every draw of the rule is a choice to enumerate."""
    monkeypatch.setattr(token, "draw_by_inversion", lambda probs_V, uniform: uniform.chooser.draw(probs_V))


def target_distribution(path: tuple[int, ...]) -> list[float]:
    return TARGET.get(path, [0.2, 0.5, 0.1, 0.2])


def drawn_children(draft: Draft, parent: int, replacement: bool, chooser: Any) -> list[int]:
    """Two draws below `parent`, of a confidence that is the draft's own probability."""
    probs = DRAFT.get(en.path_of(draft, parent), [0.4, 0.1, 0.25, 0.25])
    probs_V = torch.tensor(probs, dtype=torch.float64)
    group, left_V, nodes = Group(probs_V, with_replacement=replacement), probs_V.clone(), []
    for _ in range(2):
        drawn = chooser.draw(left_V)
        nodes.append(draft.sampled(parent, drawn, group, "drawn", float(probs_V[drawn])))
        if not replacement:
            left_V[drawn] = 0.0
    return nodes


def drawn_tree(replacement: bool) -> Callable[[Any], Draft]:
    def propose(chooser: Any) -> Draft:
        draft = Draft()
        drawn_children(draft, drawn_children(draft, ROOT, replacement, chooser)[0], replacement, chooser)
        return draft

    return propose


def mixed_tree(chooser: Any) -> Draft:
    """A retrieved token first, drawn ones behind it, retrieved ones below."""
    draft = Draft()
    draft.outright(draft.outright(ROOT, 1, "found", 0.2), 2, "found", 0.9)
    for node in drawn_children(draft, ROOT, True, chooser):
        draft.outright(node, 0, "found", 0.5)
        draft.outright(node, 1, "found", 0.6)
    return draft


def cut(propose: Callable[[Any], Draft]) -> Callable[[Any], Draft]:
    return lambda chooser: chains.cut_to_chain(propose(chooser)).draft


TREES = {"with replacement": drawn_tree(True), "without replacement": drawn_tree(False), "mixed": mixed_tree}


@pytest.mark.parametrize("kind", TREES)
def test_a_cut_tree_emits_the_target_s_distribution(kind: str) -> None:
    emitted = en.emitted_distribution(cut(TREES[kind]), rejection, target_distribution, 3)
    assert en.distance(emitted, en.plain_distribution(target_distribution, 3)) < EXACT


@pytest.mark.parametrize("kind", ["with replacement", "without replacement"])
def test_keeping_the_likeliest_of_drawn_tokens_would_not(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    plant(monkeypatch, chains, "cut_to_chain", "if outright else", "if True else")
    emitted = en.emitted_distribution(cut(TREES[kind]), rejection, target_distribution, 3)
    assert en.distance(emitted, en.plain_distribution(target_distribution, 3)) > 0.01


def test_the_likeliest_path_is_the_one_with_the_most_expected_tokens() -> None:
    draft = Draft()
    short = draft.outright(ROOT, 1, "a", 0.6)
    draft.outright(short, 2, "a", 0.1)
    long = draft.outright(ROOT, 3, "b", 0.5)
    draft.outright(draft.outright(long, 4, "b", 0.9), 5, "b", 0.9)
    found = cut_to_chain(draft)
    assert found.draft.tokens == [3, 4, 5]
    assert found.draft.is_chain()
    assert found.nodes == [2, 3, 4]


def test_of_equals_the_first_is_kept_and_probes_are_not() -> None:
    draft = Draft()
    draft.probe(ROOT, 9)
    draft.outright(ROOT, 1, "a")
    draft.outright(ROOT, 2, "b")
    assert cut_to_chain(draft).draft.tokens == [1]


def test_a_chain_is_left_alone() -> None:
    draft = Draft().chain([1, 2, 3], "a")
    assert cut_to_chain(draft).draft is draft
    assert not len(cut_to_chain(Draft()).draft)


@given(st.lists(st.tuples(st.integers(-1, 20), st.integers(0, 3), st.floats(0, 1)), max_size=20))
def test_a_cut_tree_is_a_path_of_the_tree_and_verdicts_find_back(parts: list[tuple[int, int, float]]) -> None:
    draft = Draft()
    for parent, tried, confidence in parts:
        draft.outright(min(parent, len(draft) - 1), tried, "any", confidence)
    found = cut_to_chain(draft)
    found.draft.check(4)
    assert found.draft.is_chain()
    assert [draft.tokens[node] for node in found.nodes] == found.draft.tokens
    assert [draft.parents[node] for node in found.nodes] == [ROOT, *found.nodes][: len(found.nodes)]
    accepted = [trial for trials in found.draft.trials.values() for trial in trials]
    undone = found.undone(Verdict(list(range(len(found.draft))), accepted, 0))
    assert undone.path == found.nodes == [trial.node for trial in undone.accepted]
    assert bool(len(found.draft)) == bool(len(draft))
