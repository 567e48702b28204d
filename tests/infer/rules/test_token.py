"""The theorem is a test: for every kind of group, the distribution of the emitted tokens is the target's, by exact
enumeration; and each of the faults that bias it is caught by the same means."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import enumeration as en
import pytest
import torch
from planted import plant
from table_drafts import CHAINS, SOUND, draft_distribution, draw_children, outright_tree, siblings, target_distribution

import draftsmith.infer.rules.token as rejection_module
from draftsmith.infer.contract.distribution import draw_by_inversion
from draftsmith.infer.contract.draft import ROOT, Draft, Group
from draftsmith.infer.contract.protocols import Verdict
from draftsmith.infer.rules.named import NAMES, as_rule
from draftsmith.infer.rules.token import rejection

V = 4
EXACT = 1e-12
RULES = {name: as_rule(name) for name in NAMES}
CASES = [(name, rule) for name in SOUND for rule in RULES if rule != "block" or name in CHAINS]


@pytest.mark.parametrize(("name", "rule"), CASES)
def test_emitted_tokens_have_the_targets_distribution_exactly(name: str, rule: str) -> None:
    emitted = en.emitted_distribution(SOUND[name], RULES[rule], target_distribution, 3)
    assert en.distance(emitted, en.plain_distribution(target_distribution, 3)) < EXACT


@pytest.mark.parametrize(("name", "rule"), [(name, rule) for name, rule in CASES if name != "empty"])
def test_the_enumeration_accepts_and_rejects(name: str, rule: str) -> None:
    def outcome(chooser: Any) -> tuple[int, int]:
        draft = SOUND[name](chooser)
        distribution = en.TableDistribution(draft, target_distribution, chooser)
        verdict = RULES[rule](draft, distribution, en.BranchingStream(chooser))
        return len(verdict.path), sum(not tried.accepted for tried in verdict.tried)

    outcomes = en.enumerate_outcomes(outcome)
    assert abs(sum(outcomes.values()) - 1) < EXACT
    assert any(depth >= 1 for depth, _ in outcomes)
    assert any(rejected >= 1 for _, rejected in outcomes)
    if name in ("chain", "tree with replacement", "tree without replacement", "outright tree", "adaptive growth"):
        assert any(depth >= 2 for depth, _ in outcomes)


# Planted faults


def any_row_matches(draft: Draft, distribution: Any, rng: Any) -> Verdict:
    """REST's acceptance: every drafted row draws for itself, and the longest match wins."""
    path: list[int] = []
    node = ROOT
    while True:
        token = None
        for trial in draft.trials.get(node, ()):
            token = distribution.draw(node)
            if draft.tokens[trial.node] == token:
                node = trial.node
                path.append(node)
                break
        else:
            return Verdict(path, [], distribution.draw(node) if token is None else token)


def residual_forgotten(draft: Draft, distribution: Any, rng: Any) -> Verdict:
    """Rejected tokens leave no trace: the final draw is from the target's distribution itself."""
    for trial in draft.trials.get(ROOT, ()):
        token = draft.tokens[trial.node]
        weight = float(trial.group.draft_probs[token])
        if rng.uniform(0, "accept") * weight < float(distribution.probs(ROOT)[token]):
            return Verdict([trial.node], [trial], distribution.draw(trial.node))
    return Verdict([], [], distribution.draw(ROOT))


def duplicate_skipped(chooser: Any) -> Draft:
    """A duplicate that was tried and failed still changes the residual; here it is dropped from the list."""
    draft = siblings(True, 3)(chooser)
    seen: set[int] = set()
    draft.trials[ROOT] = [t for t in draft.trials[ROOT] if not (t.node in seen or seen.add(t.node))]
    return draft


def sorted_by_probability(chooser: Any) -> Draft:
    draft = siblings(True, 2)(chooser)
    draft.trials[ROOT].sort(key=lambda trial: -draft_distribution(())[draft.tokens[trial.node]])
    return draft


def pruned_by_probability(chooser: Any) -> Draft:
    draft = siblings(True, 2)(chooser)
    best = max(draft.trials[ROOT], key=lambda trial: draft_distribution(())[draft.tokens[trial.node]])
    draft.trials[ROOT] = [best]
    return draft


def exit_chosen_from_the_drawn_token(chooser: Any) -> Draft:
    """A shallow exit's draw is kept when it looks sure, and replaced by the deep exit's draw when it does not."""
    shallow = Group(torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64))
    deep = Group(torch.tensor([0.4, 0.4, 0.1, 0.1], dtype=torch.float64))
    group, token = shallow, chooser.draw(shallow.draft_probs)
    if float(shallow.draft_probs[token]) < 0.3:
        group, token = deep, chooser.draw(deep.draft_probs)
    draft = Draft()
    draft.sampled(ROOT, token, group, "exit", 1.0)
    return draft


def outright_unless_drawn_later(chooser: Any) -> Draft:
    """An outright trial may not exist because of what a later sampled sibling drew."""
    drawn = Draft()
    draw_children(drawn, ROOT, 1, True, chooser)
    token = drawn.tokens[0]
    draft = Draft()
    if token != 0:
        draft.outright(ROOT, 0, "found")
    group = drawn.trials[ROOT][0].group
    draft.sampled(ROOT, token, group, "drawn", 1.0)
    return draft


def test_accepting_any_matching_row_is_caught() -> None:
    emitted = en.emitted_distribution(outright_tree, any_row_matches, target_distribution, 1)
    assert en.distance(emitted, en.plain_distribution(target_distribution, 1)) > 0.05


def test_a_forgotten_residual_is_caught() -> None:
    emitted = en.emitted_distribution(siblings(True, 2), residual_forgotten, target_distribution, 1)
    assert en.distance(emitted, en.plain_distribution(target_distribution, 1)) > 0.01


@pytest.mark.parametrize(
    "fault",
    [
        duplicate_skipped,
        sorted_by_probability,
        pruned_by_probability,
        exit_chosen_from_the_drawn_token,
        outright_unless_drawn_later,
    ],
)
def test_a_draft_that_breaks_the_distribution_of_distributions_is_caught(fault: Callable[[Any], Draft]) -> None:
    emitted = en.emitted_distribution(fault, rejection, target_distribution, 1)
    assert en.distance(emitted, en.plain_distribution(target_distribution, 1)) > 0.005


def small_residuals(count: int) -> Callable[[Any], Draft]:
    """A draft so close to the target that what is left after a rejection is below 1e-2, and after two below 1e-4."""
    close = Group(torch.tensor([0.4004, 0.3001, 0.1998, 0.0997], dtype=torch.float64))

    def propose(chooser: Any) -> Draft:
        draft = Draft()
        for _ in range(count):
            draft.sampled(ROOT, chooser.draw(close.draft_probs), close, "drawn", 0.5)
        return draft

    return propose


def small_residual_error(count: int) -> float:
    emitted = en.emitted_distribution(small_residuals(count), rejection, target_distribution, 1)
    return en.distance(emitted, en.plain_distribution(target_distribution, 1))


@pytest.mark.parametrize("count", [1, 2])
def test_a_draft_close_to_the_target_leaves_a_small_residual_that_counts(count: int) -> None:
    assert small_residual_error(count) < EXACT


@pytest.mark.parametrize("level", ["1e-2", "1e-3"])
@pytest.mark.parametrize("count", [1, 2])
def test_planted_small_residual_that_is_accepted_is_caught(
    monkeypatch: pytest.MonkeyPatch, count: int, level: str
) -> None:
    plant(monkeypatch, rejection_module, "_reject_in_order", "if not total > 0:", f"if not total > {level}:")
    assert small_residual_error(count) > 1e-5


@pytest.mark.parametrize("rule", RULES)
def test_a_drawn_token_of_no_probability_is_an_error(rule: str) -> None:
    draft = Draft()
    draft.sampled(ROOT, 0, Group(torch.tensor([0.0, 1.0, 0.0, 0.0], dtype=torch.float64)), "liar", 1.0)
    chooser = en.Chooser()
    with pytest.raises(ValueError, match="probability 0"):
        RULES[rule](draft, en.TableDistribution(draft, target_distribution, chooser), en.BranchingStream(chooser))


def test_inversion_gives_each_token_the_share_of_uniforms_that_is_its_probability() -> None:
    probs_V = torch.tensor([0.0, 0.25, 0.0, 0.5, 0.25, 0.0], dtype=torch.float64)
    drawn = [draw_by_inversion(probs_V, (i + 0.5) / 1000) for i in range(1000)]
    assert [drawn.count(t) for t in range(6)] == [0, 250, 0, 500, 250, 0]
    assert draw_by_inversion(probs_V, 0.0) == 1
    assert draw_by_inversion(probs_V, 1.0 - 2.0**-53) == 4
