"""Block verification: equal to the published algorithm written out, never worse than token by token, and its faults."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import enumeration as en
import pytest
from table_drafts import (
    CHAINS,
    SOUND,
    chain,
    chain_of,
    chain_of_three,
    drawn_then_outright,
    laws,
    siblings,
    target_distribution,
)

from draftsmith.infer.contract.draft import Draft
from draftsmith.infer.contract.protocols import Verdict
from draftsmith.infer.rules.block import block
from draftsmith.infer.rules.token import rejection

EXACT = 1e-12


def written_out(fault: str = "") -> Callable[[Draft, Any, Any], Verdict]:
    """The published algorithm for a chain of drawn tokens, from its beginning; a `fault` makes it wrong."""

    def rule(draft: Draft, distribution: Any, rng: Any) -> Verdict:
        trials = [draft.trials[node][0] for node in range(-1, len(draft) - 1)]
        target = [distribution.probs(node) for node in range(-1, len(draft))]
        drafted = [trial.group.draft_probs for trial in trials]
        kept, cap, product, caps = 0, 1.0, 1.0, [1.0]
        for i, token in enumerate(draft.tokens):
            ratio = float(target[i][token] / drafted[i][token])
            cap, product, last = min(cap * ratio, 1.0), product * ratio, i == len(draft) - 1
            caps.append(cap)
            if last:
                passes = product if fault == "uncapped last test" else cap
            else:
                left = float((cap * target[i + 1] - drafted[i + 1]).clamp(min=0).sum())
                passes = left / (left + 1 - cap) if left + 1 - cap > 0 else 1.0
            if rng.step_uniform("block", i) < passes:
                kept = i + 1
            elif fault == "stop at the first failure":
                break
        path = list(range(kept))
        if kept == len(draft):
            return Verdict(path, trials, distribution.draw(kept - 1))
        cap = 1.0 if fault == "resample without the cap" else caps[kept]
        left_V = (cap * target[kept] - drafted[kept]).clamp(min=0)
        return Verdict(path, trials[:kept], rng.uniform(kept, "draw").draw(left_V / left_V.sum()))

    return rule


@pytest.mark.parametrize("propose", [chain, chain_of_three])
def test_it_is_the_published_algorithm(propose: Callable[[Any], Draft]) -> None:
    def outcomes(rule: Callable[..., Verdict]) -> dict[Any, float]:
        def outcome(chooser: Any) -> tuple[tuple[int, ...], int, int]:
            draft = propose(chooser)
            distribution = en.TableDistribution(draft, target_distribution, chooser)
            verdict = rule(draft, distribution, en.BranchingStream(chooser))
            return tuple(draft.tokens), len(verdict.path), verdict.next_token

        return en.enumerate_outcomes(outcome)

    assert en.distance(outcomes(block), outcomes(written_out())) < EXACT


@pytest.mark.parametrize("fault", ["uncapped last test", "stop at the first failure", "resample without the cap"])
def test_a_planted_fault_is_caught(fault: str) -> None:
    def error(rule: Callable[..., Verdict], seed: int) -> float:
        target, drafted = laws(seed)
        emitted = en.emitted_distribution(chain_of(3, drafted), rule, target, 3)
        return en.distance(emitted, en.plain_distribution(target, 3))

    assert max(error(written_out(), seed) for seed in range(3)) < EXACT
    assert max(error(written_out(fault), seed) for seed in range(3)) > 1e-3


@pytest.mark.parametrize("depth", [2, 3])
def test_it_accepts_at_least_as_many_tokens_as_token_by_token(depth: int) -> None:
    gains = []
    for seed in range(8):
        target, drafted = laws(seed)
        propose = chain_of(depth, drafted)
        token = en.expected_accepted(propose, rejection, target)
        gains.append(en.expected_accepted(propose, block, target) - token)
    assert min(gains) > -EXACT
    assert max(gains) > 0.01


@pytest.mark.parametrize("propose", [siblings(True, 2), siblings(False, 3), drawn_then_outright])
def test_trees_are_verified_token_by_token(propose: Callable[[Any], Draft]) -> None:
    def outcomes(rule: Callable[..., Verdict]) -> dict[Any, float]:
        def outcome(chooser: Any) -> tuple[Any, ...]:
            draft = propose(chooser)
            distribution = en.TableDistribution(draft, target_distribution, chooser)
            verdict = rule(draft, distribution, en.BranchingStream(chooser))
            return tuple(draft.tokens), *verdict.path, verdict.next_token, verdict.jointly

        return en.enumerate_outcomes(outcome)

    assert outcomes(block) == outcomes(rejection)


@pytest.mark.parametrize("name", CHAINS)
def test_chains_with_drawn_tokens_are_marked(name: str) -> None:
    chooser = en.Chooser()
    draft = SOUND[name](chooser)
    distribution = en.TableDistribution(draft, target_distribution, chooser)
    assert block(draft, distribution, en.BranchingStream(chooser)).jointly
    assert not rejection(draft, distribution, en.BranchingStream(chooser)).jointly
