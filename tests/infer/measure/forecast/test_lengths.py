"""The forecast against the loop, enumerated exactly over a tiny vocabulary with an end token, limits and both rules."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache

import enumeration as en
import numpy as np
import pytest
import torch
from planted import plant

import draftsmith.infer.rules.token as token_module
import draftsmith.infer.rules.traversal as traversal_module
from draftsmith.infer.contract.draft import ROOT, Draft, Group
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.measure.forecast import lengths
from draftsmith.infer.measure.forecast.lengths import RULES, expected_steps, survival
from draftsmith.infer.rules.named import as_rule

VOCAB, END, LIMIT, PROMPT, CONTEXT = 3, 2, 5, 2, 5
TEXTS = list(itertools.product(range(VOCAB), repeat=LIMIT))


def table(seed: int, sharp: float) -> Callable[[tuple[int, ...]], list[float]]:
    """Distributions by prefix; the end token is rare enough for long texts."""

    @cache
    def law(prefix: tuple[int, ...]) -> list[float]:
        rng = np.random.default_rng([seed, len(prefix), *prefix])
        weights = rng.gamma(sharp, size=VOCAB) * [1.0, 1.0, 0.3]
        return list(weights / weights.sum())

    return law


TARGET, DRAFT = table(1, 0.7), table(2, 1.5)


def one_step(prefix: tuple[int, ...], depth: int, rule) -> dict[tuple[int, ...], float]:
    """The distribution of the tokens that a step behind `prefix` commits."""
    row = Row("row", [0] * PROMPT + list(prefix), stops=Stops(LIMIT, frozenset([END])), prompt_tokens=PROMPT)

    def procedure(chooser: en.Chooser) -> tuple[int, ...]:
        draft, parent, path = Draft(), ROOT, prefix
        for _ in range(depth):
            law = DRAFT(path)
            token = chooser.choose(law)
            parent = draft.sampled(parent, token, Group(torch.tensor(law, dtype=torch.float64)), "draft", 1.0)
            path = (*path, token)
        distribution = en.TableDistribution(draft, lambda path: TARGET((*prefix, *path)), chooser)
        verdict = rule(draft, distribution, en.BranchingStream(chooser))
        return tuple(row.cut([*(draft.tokens[node] for node in verdict.path), verdict.next_token])[0])

    return en.enumerate_outcomes(procedure)


def enumerated(length: int, rule, context: int, monkeypatch) -> tuple[float, float, float]:
    """Expected steps, drafted tokens and accepted_length of the loop, by enumeration of every step behind every
    prefix."""
    for module in (token_module, traversal_module):
        monkeypatch.setattr(module, "draw_by_inversion", en.draw_by_inversion)

    @cache
    def behind(prefix: tuple[int, ...]) -> tuple[float, float, float]:
        if len(prefix) == LIMIT or (prefix and prefix[-1] == END):
            return 0.0, 0.0, float(len(prefix))
        depth = max(min(length, LIMIT - len(prefix) - 1, context - PROMPT - len(prefix)), 0) if prefix else 0
        found = [1.0, float(depth), 0.0]
        for tokens, weight in one_step(prefix, depth, rule).items():
            for i, more in enumerate(behind(prefix + tokens)):
                found[i] += weight * more
        return found[0], found[1], found[2]

    steps, nodes, tokens = behind(())
    return steps, nodes, tokens / steps


def drawn_texts() -> dict[tuple[int, ...], float]:
    """Every text that the target can draw, with its probability."""
    found: dict[tuple[int, ...], float] = {}
    for tokens in TEXTS:
        text = tokens[: tokens.index(END) + 1] if END in tokens else tokens
        prob = 1.0
        for i, token in enumerate(text):
            prob *= TARGET(text[:i])[token]
        found[text] = prob
    return found


def forecast(length: int, rule: str, context: int = 99, log_target=np.log) -> tuple[float, float, float]:
    steps = nodes = tokens = 0.0
    for text, prob in drawn_texts().items():
        log_ratios = np.array(
            [np.log(DRAFT(text[:i])[token]) - log_target(TARGET(text[:i])[token]) for i, token in enumerate(text)]
        )
        found = expected_steps(
            lengths.survival(log_ratios, length, rule),
            [length],
            prompt_tokens=PROMPT,
            max_new_tokens=LIMIT,
            max_positions=context,
        )
        steps += prob * found.steps_L[0]
        nodes += prob * found.nodes_L[0]
        tokens += prob * found.tokens
    return steps, nodes, tokens / steps


@pytest.mark.parametrize("context", [99, CONTEXT])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("rule", RULES)
def test_the_forecast_is_the_enumerated_loop(rule, length, context, monkeypatch):
    found = forecast(length, rule, context)
    loop = enumerated(length, as_rule(rule), context, monkeypatch)
    assert found == pytest.approx(loop, abs=1e-10)
    assert loop[2] > 1.2  # some drafts are accepted, and some are not
    assert loop[2] < length + 1


def test_block_accepts_more_than_token_on_these_laws():
    assert forecast(4, "block")[2] > forecast(4, "token")[2] + 0.01


FAULTS = {
    "rejected tokens end the product only at their own position": (
        "survival", "np.cumsum(np.minimum(ahead_TK, 0.0), axis=1)", "np.minimum(ahead_TK, 0.0)", "token",
    ),
    "block without the minimum over the prefixes": (
        "survival", "np.minimum.accumulate(np.cumsum(ahead_TK, axis=1), axis=1)", "np.cumsum(ahead_TK, axis=1)",
        "block",
    ),
    "depth not capped by what is left": ("expected_steps", "max_new_tokens - at_T - 1", "max_new_tokens + 0 * at_T",
                                         "token"),
    "a first step that drafts": ("expected_steps", "room_T[:1] = 0", "room_T[:1] += 0", "token"),
    "steps from every position alike": (
        "expected_steps", "return ExpectedSteps(count, *sums_FLT[:, :, 0])",
        "return ExpectedSteps(count, count / (1 + reach_TK[:, 1:].sum(1)).mean() + 0 * sums_FLT[0, :, 0], "
        "*sums_FLT[1:, :, 0])", "token",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(fault, monkeypatch):
    name, sound, broken, rule = FAULTS[fault]
    loop = enumerated(3, as_rule(rule), 99, monkeypatch)
    assert forecast(3, rule) == pytest.approx(loop, abs=1e-10)
    plant(monkeypatch, lengths, name, sound, broken)
    monkeypatch.setitem(globals(), "expected_steps", lengths.expected_steps)
    assert forecast(3, rule) != pytest.approx(loop, abs=1e-4)


def test_the_draft_s_context_is_part_of_the_forecast(monkeypatch):
    """Without it the forecast would be that of a draft that always fits."""
    loop = enumerated(3, as_rule("token"), CONTEXT, monkeypatch)
    assert forecast(3, "token", 99)[2] > loop[2] + 0.01


def test_a_geometric_series_is_not_the_loop(monkeypatch):
    """Acceptance is correlated between positions, so one rate does not give every length."""
    rate = forecast(1, "token")[2] - 1
    series = (1 - rate**4) / (1 - rate)
    assert abs(series - enumerated(3, as_rule("token"), 99, monkeypatch)[2]) > 1e-3


def test_log_probabilities_at_another_temperature_give_another_figure(monkeypatch):
    """The target draws at 0.8 of its own temperature; its raw log-probabilities are those at 1."""

    def raw(prob: float) -> float:
        return 0.8 * float(np.log(prob))

    loop = enumerated(3, as_rule("token"), 99, monkeypatch)
    assert abs(forecast(3, "token", log_target=raw)[2] - loop[2]) > 0.01


@pytest.mark.parametrize("rule", RULES)
def test_survival_falls_with_depth_and_ends_at_an_impossible_token(rule):
    reach = survival(np.array([0.3, -0.1, -np.inf, 0.5]), 3, rule)
    assert (np.diff(reach, axis=1) <= 1e-15).all()
    assert reach[0].tolist() == pytest.approx([1.0, 1.0, np.exp(-0.1) if rule == "token" else 1.0, 0.0])
