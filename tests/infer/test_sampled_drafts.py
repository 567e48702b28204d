"""Sampled drafting by the real SmallLM and SD2: exact over a tiny vocabulary, in frequency through the whole loop."""

from __future__ import annotations

from collections import Counter
from typing import Any

import enumeration as en
import pytest
import torch
from joining import admit, release

import draftsmith.infer.contract.distribution as distribution_module
import draftsmith.infer.drafters.lm_drafter as lm_drafter
import draftsmith.infer.rules.token as rejection_module
from draftsmith.infer.contract.distribution import NodeDistribution
from draftsmith.infer.contract.protocols import Budget
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.costs.pass_costs import Costs, PassCost
from draftsmith.infer.costs.policy import Policy
from draftsmith.infer.drafters import SD2, SmallLM
from draftsmith.infer.drafters.controls import Empty
from draftsmith.infer.engine.generate import generate
from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.infer.rules.token import rejection

V = 3
PROMPT = [2, 1, 0, 2]
SHAPES = {
    "chain": {"num_draft_tokens": 2, "top_k": 1},
    "tree without replacement": {"num_draft_tokens": 2, "top_k": 2, "nodes": 4},
    "siblings with replacement": {"num_draft_tokens": 1, "top_k": 3, "nodes": 3, "replacement": True},
    "tree with replacement, cut by its budget": {"num_draft_tokens": 2, "top_k": 2, "nodes": 3, "replacement": True},
    "more than the vocabulary": {"num_draft_tokens": 1, "top_k": 7, "nodes": 7},
    "exits by threshold": {"exits": [1, 2], "selection": "threshold", "thresholds": [0.8, 0.0], "num_draft_tokens": 2,
                           "top_k": 2, "nodes": 4},
    "exits by level": {"exits": [1, 2], "selection": "level_threshold", "thresholds": [0.8, 0.0],
                       "num_draft_tokens": 2, "top_k": 2, "nodes": 3, "replacement": True},
    "exits by cost": {"exits": [1, 2], "num_draft_tokens": 2, "top_k": 2, "nodes": 3, "costs": "cheap"},
    "int8 chain": {"num_draft_tokens": 2, "top_k": 1, "int8": True},
    "int8 exits": {"exits": [1, 2], "selection": "threshold", "thresholds": [0.8, 0.0], "num_draft_tokens": 2,
                   "top_k": 2, "nodes": 4, "int8": True},
    "a whole draft by cost": {"num_draft_tokens": 2, "top_k": 2, "nodes": 4, "costs": "cheap"},
}  # fmt: skip
PASSES = {"target": PassCost((1, 8), (1.0, 1.2)), "small": PassCost((1, 8), (0.05, 0.06)),
          "sd2:1": PassCost((1, 8), (0.02, 0.03)), "sd2:2": PassCost((1, 8), (0.01, 0.05))}  # fmt: skip


@pytest.fixture(scope="module")
def target_model(make_model: Any) -> Any:
    return make_model("llama", vocab_size=V, pad_token_id=None, bos_token_id=None, eos_token_id=None)


@pytest.fixture(scope="module")
def draft_model(target_model: Any, shake: Any) -> Any:
    return shake(target_model, 0.5)


def sampled(draft_model: Any, **shape: Any) -> Any:
    if "costs" in shape:
        shape["costs"] = Costs(PASSES)
    return (SD2 if "exits" in shape else SmallLM)(draft_model, sample=True, **shape)


WARM, CUT = Settings(temperature=0.8, seed=1), Settings(temperature=0.7, top_k=2, seed=1)


@pytest.mark.parametrize(("shape", "settings"), [*((shape, WARM) for shape in SHAPES), ("chain", CUT)])
def test_a_step_has_the_targets_distribution_exactly(
    monkeypatch: pytest.MonkeyPatch, target_model: Any, draft_model: Any, shape: str, settings: Settings
) -> None:
    current: list[Any] = []

    def draw(probs_V: torch.Tensor, uniform: Any) -> int:
        return current[0].draw(probs_V)

    for module in (lm_drafter, rejection_module, distribution_module):
        monkeypatch.setattr(module, "draw_by_inversion", draw)
    target, drafter = HFTarget(target_model), sampled(draft_model, **SHAPES[shape])
    drafter.bind(target)
    distributions: dict[tuple[int, ...], list[float]] = {}
    seen: Counter[str] = Counter()
    exits: Counter[int] = Counter()

    def procedure(chooser: Any) -> tuple[int, ...]:
        current[:] = [chooser]
        row = Row("0", list(PROMPT), settings, Stops(4))
        admit(target, drafter, [row])
        policy = Policy.of(target, drafter)
        policy.begin([row])
        (draft,) = policy.cut([row], drafter.propose([row], [Budget(8, 3)], policy))
        distribution = target.score([row], [draft]).distribution(0)
        for node in range(-1, len(draft)):
            distributions[en.path_of(draft, node)] = distribution.probs(node).tolist()
        verdict = rejection(draft, distribution, en.BranchingStream(chooser))
        exits.update(exit for _, exit in draft.exits)
        release(target, drafter, [row])
        seen["deep"] += len(verdict.path) >= min(2, SHAPES[shape]["num_draft_tokens"])
        seen["rejected"] += any(not tried.accepted for tried in verdict.tried)
        tokens = [draft.tokens[node] for node in verdict.path] + [verdict.next_token]
        if len(tokens) < 2:
            tokens.append(chooser.choose(target_distribution(target_model, tuple(tokens), settings)))
        return tuple(tokens[:2])

    emitted = en.enumerate_outcomes(procedure)
    wanted = en.plain_distribution(lambda path: target_distribution(target_model, path, settings), 2)
    assert en.distance(emitted, wanted) < 1e-9
    assert seen["deep"]
    assert seen["rejected"]
    if "exits" in SHAPES[shape]:
        assert set(exits) == {1, 2}, "both exits were drafted from"


def target_distribution(model: Any, path: tuple[int, ...], settings: Settings) -> list[float]:
    from draftsmith.infer.contract.draft import Draft

    with torch.inference_mode():
        logits_V = model(torch.tensor([[*PROMPT, *path]]), use_cache=False).logits[0, -1]
    row = Row("distribution", [*PROMPT, *path], settings)
    return NodeDistribution(logits_V[None], row, Draft(), None).probs(-1).tolist()


@pytest.mark.parametrize("shape", ["chain", "tree without replacement"])
def test_frequencies_through_the_whole_loop_pass_a_chi_square_test(
    target_model: Any, draft_model: Any, shape: str
) -> None:
    """2,400 rows of their own seeds, batched, four tokens each; 1 % level on all pairs of first tokens."""
    target, drafter = HFTarget(target_model), sampled(draft_model, **SHAPES[shape])
    drafter.bind(target)
    count = 2400
    rows = [Row(str(i), list(PROMPT), Settings(temperature=1.0, seed=9), Stops(4)) for i in range(count)]
    done = generate(target, drafter, rows, batch_size=200)
    wanted = en.plain_distribution(lambda path: target_distribution(target_model, path, Settings(temperature=1.0)), 2)
    observed = Counter(tuple(generation.token_ids[:2]) for generation in done)
    bins = [pair for pair, share in wanted.items() if share * count >= 5]
    rest = count - sum(observed[pair] for pair in bins)
    rest_wanted = count * (1 - sum(wanted[pair] for pair in bins))
    statistic = sum((observed[pair] - count * wanted[pair]) ** 2 / (count * wanted[pair]) for pair in bins)
    statistic += (rest - rest_wanted) ** 2 / rest_wanted if rest_wanted > 1e-9 else 0.0
    freedom = len(bins) - (rest_wanted <= 1e-9)
    # Wilson and Hilferty: the 99th percentile of chi-square.
    limit = freedom * (1 - 2 / (9 * freedom) + 2.326 * (2 / (9 * freedom)) ** 0.5) ** 3
    assert statistic < limit
    traces = [trace for generation in done for trace in generation.traces]
    assert max(trace.accepted for trace in traces) >= 2
    assert any(not tried.accepted for trace in traces for tried in trace.tried)


def test_a_rows_tokens_do_not_depend_on_its_batch(make_model: Any, shake: Any) -> None:
    model = make_model("llama")
    settings = Settings(temperature=0.9, seed=4)

    def decode(batch_size: int) -> list[list[int]]:
        target, drafter = HFTarget(model), SmallLM(shake(model, 0.1), sample=True, top_k=2, nodes=6)
        drafter.bind(target)
        rows = [Row(str(i), [5 + i, 9, 12 + i], settings, Stops(12 + i)) for i in range(6)]
        return [generation.token_ids for generation in generate(target, drafter, rows, batch_size=batch_size)]

    alone = decode(1)
    assert decode(4) == alone
    assert len({token for tokens in alone for token in tokens}) >= 8


def test_a_greedy_row_is_drafted_for_greedily(make_model: Any, shake: Any) -> None:
    model = make_model("llama")
    target, drafter = HFTarget(model), SmallLM(shake(model, 0.06), top_k=1, sample=True)
    drafter.bind(target)
    rows = [Row(str(i), [5 + i, 9], Settings(), Stops(20)) for i in range(2)]
    mixed = [*rows, Row("drawn", [7, 9], Settings(temperature=1.0), Stops(20))]
    plain = generate(target, Empty(), [Row(r.key, list(r.ids), r.settings, r.stops) for r in rows])
    done = generate(target, drafter, mixed, batch_size=3)
    assert [one.token_ids for one in done[:2]] == [one.token_ids for one in plain]
