"""Traversal verification: what it accepts, against token by token and against the best that any rule could, and the
faults that would bias it. That it is exact is shown in test_token.py and test_two_steps.py."""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import Any

import enumeration as en
import pytest
import torch
from planted import plant
from table_drafts import (
    SOUND,
    chain_of_three,
    distribution,
    draw_children,
    from_the_rest_then_the_set,
    laws,
    outright_again_drawn,
    siblings,
    target_distribution,
    tree,
)  # fmt: skip

import draftsmith.infer.rules.traversal as traversal_module
from draftsmith.infer.contract.draft import ROOT, Draft, Group
from draftsmith.infer.rules.token import rejection
from draftsmith.infer.rules.traversal import traversal

EXACT = 1e-12
Propose = Callable[[Any], Draft]


def error(propose: Propose) -> float:
    emitted = en.emitted_distribution(propose, traversal_module.traversal, target_distribution, 3)
    return en.distance(emitted, en.plain_distribution(target_distribution, 3))


FAULTS = {
    "uncapped": ("next_cap", ", 1.0)", ", 1e9)"),
    "resampled without the cap": ("refuse", "left_V = self.cap *", "left_V = 1.0 *"),
    "kept by what is left alone": ("refuse", "total / (total + (1.0 - self.cap))", "total"),
    "refused draws are drawn again": ("refuse", ".append(token)", ""),
    "a refused token stays": ("refuse", "left_V[token] = 0.0", "pass"),
}
CAUGHT_BY = {
    "uncapped": chain_of_three,
    "resampled without the cap": chain_of_three,
    "kept by what is left alone": chain_of_three,
    "refused draws are drawn again": siblings(False, 3),
    "a refused token stays": outright_again_drawn,
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_caught(monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    name, sound, wrong = FAULTS[fault]
    assert error(CAUGHT_BY[fault]) < EXACT
    plant(monkeypatch, traversal_module._Visit, name, sound, wrong)
    assert error(CAUGHT_BY[fault]) > 1e-4


class Scripted:
    """Every number is the largest that a stream can give: whatever may be refused is."""

    def uniform(self, depth: int, purpose: str, index: int = 0) -> float:
        return 1 - 2.0**-53

    step_uniform = uniform


class Drawn:
    """Draws of a scripted stream: the last token."""

    greedy = False

    def __init__(self, probs_V: torch.Tensor) -> None:
        self.probs_V, self.vocab_size = probs_V, len(probs_V)

    def probs(self, node: int) -> torch.Tensor:
        return self.probs_V

    def choice(self, node: int) -> int:
        raise AssertionError("not greedy")

    def draw(self, node: int) -> int:
        return self.vocab_size - 1


def refused_by_rounding() -> list[int]:
    """A draft that is the target itself but for the last bit, and a number that refuses it."""
    probs_V = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    close_V = torch.nextafter(probs_V, torch.ones(3, dtype=torch.float64))
    draft = Draft()
    draft.sampled(ROOT, 0, Group(close_V), "drawn", 0.3)
    draft.trials[ROOT] = [draft.trials[ROOT][0]._replace(group=Group(close_V))]
    target_V = probs_V.clone()
    target_V[0] = torch.nextafter(probs_V[0], torch.zeros(1, dtype=torch.float64)[0])
    return traversal_module.traversal(draft, Drawn(target_V), Scripted()).path


def test_the_root_is_kept_whatever_rounding_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traversal_module, "draw_by_inversion", lambda probs_V, uniform: 0)
    monkeypatch.setattr(traversal_module, "draft_probs", lambda group, like_V, drawn: group.draft_probs)
    assert refused_by_rounding() == []
    plant(monkeypatch, traversal_module, "_kept_visits", "visit.node == ROOT or ", "")
    with pytest.raises(IndexError):
        refused_by_rounding()


# How much it accepts


@pytest.mark.parametrize("replacement", [True, False])
def test_a_drawn_tree_accepts_more_than_token_by_token(replacement: bool) -> None:
    gains = []
    for seed in range(6):
        target, drafted = laws(seed)

        def propose(chooser: Any, drafted: Callable[..., torch.Tensor] = drafted) -> Draft:
            draft = Draft()
            for node in dict.fromkeys(draw_children(draft, ROOT, 2, replacement, chooser, drafted)):
                draw_children(draft, node, 1, True, chooser, drafted)
            return draft

        token = en.expected_accepted(propose, rejection, target)
        gains.append(en.expected_accepted(propose, traversal, target) - token)
    assert min(gains) > -EXACT
    assert max(gains) > 0.001


def best_acceptance(propose: Propose) -> float:
    """The most often that any rule could accept one of the root's tokens: over all sets A, min P(not A) + Pr(the
    drafted tokens meet A)."""

    def drafted(chooser: Any) -> frozenset[int]:
        draft = propose(chooser)
        return frozenset(draft.tokens[trial.node] for trial in draft.trials[ROOT])

    sets, target = en.enumerate_outcomes(drafted), target_distribution(())
    bounds = []
    for size in range(len(target) + 1):
        for some in combinations(range(len(target)), size):
            meets = sum(weight for tokens, weight in sets.items() if tokens & set(some))
            bounds.append(1 - sum(target[token] for token in some) + meets)
    return min(bounds)


def first_is_accepted(propose: Propose) -> float:
    def accepts(chooser: Any) -> bool:
        draft = propose(chooser)
        table = en.TableDistribution(draft, target_distribution, chooser)
        return bool(traversal(draft, table, en.BranchingStream(chooser)).path)

    return en.enumerate_outcomes(accepts)[True]


def whole_then_the_set(chooser: Any) -> Draft:
    """As `from_the_rest_then_the_set`, but drawn from the whole distribution."""
    draft = Draft()
    node = draw_children(draft, ROOT, 1, True, chooser)[0]
    for token in (1, 3):
        draft.outright(ROOT, token, "found")
    draw_children(draft, node, 1, True, chooser)
    return draft


BOUNDED = [name for name in SOUND if name not in ("empty", "adaptive growth", "two groups") and "tree with" not in name]


@pytest.mark.parametrize("name", BOUNDED)
def test_no_draft_is_accepted_more_often_than_any_rule_could(name: str) -> None:
    assert first_is_accepted(SOUND[name]) < best_acceptance(SOUND[name]) + EXACT


def test_a_draw_from_the_rest_before_the_set_is_accepted_as_often_as_any_rule_could() -> None:
    found = first_is_accepted(from_the_rest_then_the_set)
    assert abs(found - best_acceptance(from_the_rest_then_the_set)) < EXACT
    rest_V = distribution(()).clone()
    rest_V[[1, 3]] = 0.0
    rest_V, target = rest_V / rest_V.sum(), target_distribution(())
    assert abs(found - (target[1] + target[3] + sum(min(target[t], float(rest_V[t])) for t in (0, 2)))) < EXACT
    assert found > first_is_accepted(whole_then_the_set) + 0.01


def test_these_drafts_hold_what_they_are_named_for() -> None:
    """Tokens with children that are drawn again occur in the drafts that are to have them."""
    for propose in (tree(True), outright_again_drawn):
        drafts = en.enumerate_outcomes(lambda chooser, propose=propose: _draws_a_parent_again(propose(chooser)))
        assert drafts[True] > 0.05


def _draws_a_parent_again(draft: Draft) -> bool:
    nodes = [trial.node for trial in draft.trials[ROOT]]
    return any(nodes.count(node) > 1 and node in draft.trials for node in nodes)
