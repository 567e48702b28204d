"""Two steps in a row, enumerated with the product's keys: a number that a step has read beyond its accepted point must
not come back in the next one. One step alone cannot show this."""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import enumeration as en
import pytest
import torch
from planted import plant
from table_drafts import chain_of, draw_children

import draftsmith.infer.rules.traversal as traversal_module
from draftsmith.infer.contract.draft import ROOT, Draft
from draftsmith.infer.rules.named import NAMES, as_rule

V = 2
EXACT = 1e-11
LENGTH = 4
Law = Callable[[tuple[int, ...]], list[float]]
Propose = Callable[[Any], Draft]


def law(name: str, seed: int) -> Law:
    """A distribution for every path, between .05 and .95."""

    def distribution_of(path: tuple[int, ...]) -> list[float]:
        share = 0.05 + 0.9 * Random(f"{name} {seed} {path}").random()
        return [share, 1 - share]

    return distribution_of


def drafted(seed: int) -> Callable[[tuple[int, ...]], torch.Tensor]:
    return lambda path: torch.tensor(law("draft", seed)(path), dtype=torch.float64)


def children(draft: Draft, parent: int, count: int, replacement: bool, chooser: Any, seed: int) -> list[int]:
    return draw_children(draft, parent, count, replacement, chooser, drafted(seed))


def chain(depth: int) -> Callable[[int], Propose]:
    return lambda seed: chain_of(depth, drafted(seed))


def tree(replacement: bool) -> Callable[[int], Propose]:
    """Two draws below the root, which may agree, and one below each node."""

    def seeded(seed: int) -> Propose:
        def propose(chooser: Any) -> Draft:
            draft = Draft()
            for node in dict.fromkeys(children(draft, ROOT, 2, replacement, chooser, seed)):
                children(draft, node, 1, True, chooser, seed)
            return draft

        return propose

    return seeded


def drawn_first(seed: int) -> Propose:
    def propose(chooser: Any) -> Draft:
        draft = Draft()
        (node,) = children(draft, ROOT, 1, True, chooser, seed)
        draft.outright(ROOT, 0, "found")
        children(draft, node, 1, True, chooser, seed)
        return draft

    return propose


def outright_first(seed: int) -> Propose:
    def propose(chooser: Any) -> Draft:
        draft = Draft()
        node = draft.outright(ROOT, 0, "found")
        children(draft, node, 1, True, chooser, seed)
        (node,) = children(draft, ROOT, 1, True, chooser, seed)
        draft.outright(node, 1, "found")
        return draft

    return propose


def outright_tail(seed: int) -> Propose:
    def propose(chooser: Any) -> Draft:
        draft = Draft()
        (node,) = children(draft, ROOT, 1, True, chooser, seed)
        draft.outright(draft.outright(node, 1, "found"), 0, "found")
        return draft

    return propose


def outright_head(seed: int) -> Propose:
    def propose(chooser: Any) -> Draft:
        draft = Draft()
        node = draft.outright(ROOT, 1, "found")
        (node,) = children(draft, node, 1, True, chooser, seed)
        children(draft, node, 1, True, chooser, seed)
        return draft

    return propose


CHAINS: dict[str, tuple[Callable[[int], Propose], Callable[[int], Propose]]] = {
    "chain of two": (chain(2), chain(2)),
    "chain of three, then of two": (chain(3), chain(2)),
    "outright tail": (outright_tail, chain(2)),
    "outright head": (outright_head, outright_tail),
}
TREES: dict[str, tuple[Callable[[int], Propose], Callable[[int], Propose]]] = {
    "tree with replacement, chain": (tree(True), chain(2)),
    "tree without replacement": (tree(False), tree(False)),
    "drawn first": (drawn_first, drawn_first),
    "outright first": (outright_first, drawn_first),
}
SHAPES = CHAINS | TREES
CASES = [(shape, rule) for shape in SHAPES for rule in NAMES if rule != "block" or shape in CHAINS]


def error(shape: str, rule: str, seed: int) -> float:
    first, second = SHAPES[shape]
    target = law("target", seed)
    emitted = en.after_steps([first(seed), second(seed + 100)], as_rule(rule), target, LENGTH)
    assert abs(sum(emitted.values()) - 1) < EXACT
    return en.distance(emitted, en.plain_distribution(target, LENGTH))


@pytest.mark.parametrize(("shape", "rule"), CASES)
def test_two_steps_emit_the_targets_distribution_exactly(shape: str, rule: str) -> None:
    assert error(shape, rule, seed=1) < EXACT


@pytest.mark.parametrize("rule", NAMES)
def test_many_laws_agree(rule: str) -> None:
    assert max(error("chain of two", rule, seed) for seed in range(8)) < EXACT


def key_by_position(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(
        monkeypatch, traversal_module, "_kept_visits", 'rng.step_uniform("accept", number)',
        'rng.uniform(len(visits) - 2, "accept")',
    )  # fmt: skip


def test_planted_keys_by_position_are_caught_in_a_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    key_by_position(monkeypatch)
    assert max(error("chain of two", "block", seed) for seed in range(8)) > 1e-4


def test_planted_keys_by_position_are_not_seen_in_one_step(monkeypatch: pytest.MonkeyPatch) -> None:
    key_by_position(monkeypatch)
    target = law("target", 1)
    emitted = en.after_steps([chain(2)(1)], as_rule("block"), target, LENGTH)
    assert en.distance(emitted, en.plain_distribution(target, LENGTH)) < EXACT


def test_planted_keys_by_position_are_caught_in_a_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    key_by_position(monkeypatch)
    assert max(error("tree without replacement", "traversal", seed) for seed in range(3)) > 1e-4


def test_planted_draws_keyed_by_position_are_caught_in_a_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the draft's draws were keyed by position and node: a refused node's number comes back."""

    class ByPosition(en.KeyedDraws):
        def draw(self, probs_V: torch.Tensor) -> int:
            self.count += 1
            return en.KeyedUniform(self.numbers, (self.start + self.count, "draft")).draw(probs_V)

    monkeypatch.setattr(en, "KeyedDraws", ByPosition)
    assert max(error("tree without replacement", "token", seed) for seed in range(3)) > 1e-4
