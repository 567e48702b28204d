"""Sampled drafts of the real SmallLM, SD2 and Eagle: exact over a tiny vocabulary, in frequency through the loop."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import enumeration as en
import pytest
import torch
from joining import admit, release
from planted import plant
from tiny_eagle import tiny_eagle

import draftsmith.infer.contract.distribution as distribution_module
import draftsmith.infer.contract.rng as rng_module
import draftsmith.infer.drafters.drawn as drawn_module
import draftsmith.infer.rules.token as rejection_module
import draftsmith.infer.rules.traversal as traversal_module
from draftsmith.infer.contract.distribution import NodeDistribution
from draftsmith.infer.contract.draft import Group
from draftsmith.infer.contract.protocols import Budget
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.costs.acceptance import Acceptance
from draftsmith.infer.costs.calibration import Calibration
from draftsmith.infer.costs.calibrator import Calibrator
from draftsmith.infer.costs.pass_costs import Costs, PassCost
from draftsmith.infer.costs.policy import Policy
from draftsmith.infer.drafters import SD2, Eagle, SmallLM
from draftsmith.infer.drafters.controls import Empty
from draftsmith.infer.engine.generate import generate
from draftsmith.infer.engine.step import step
from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.infer.rules.named import NAMES, as_rule

V = 3
PROMPT = [2, 1, 0, 2]
TREE = "tree without replacement"
SHAPES = {
    "chain": {"num_draft_tokens": 2, "top_k": 1},
    "tree without replacement": {"num_draft_tokens": 2, "top_k": 2, "nodes": 4, "peaked": 1.0},
    "siblings with replacement": {"num_draft_tokens": 1, "top_k": 3, "nodes": 3, "replacement": True},
    "tree with replacement, cut by its budget": {"num_draft_tokens": 2, "top_k": 2, "nodes": 3, "replacement": True},
    "more than the vocabulary": {"num_draft_tokens": 1, "top_k": 7, "nodes": 7, "peaked": 1.0},
    "exits by threshold": {"exits": [1, 2], "selection": "threshold", "thresholds": [0.8, 0.0], "num_draft_tokens": 2,
                           "top_k": 2, "nodes": 4},
    "exits by level": {"exits": [1, 2], "selection": "level_threshold", "thresholds": [0.8, 0.0],
                       "num_draft_tokens": 2, "top_k": 2, "nodes": 3, "replacement": True},
    "exits by cost": {"exits": [1, 2], "num_draft_tokens": 2, "top_k": 2, "nodes": 3, "costs": "cheap"},
    "a head's chain": {"head": True, "num_draft_tokens": 2, "top_k": 1},
    "a head's tree": {"head": True, "num_draft_tokens": 2, "top_k": 2, "nodes": 4, "peaked": 1.0},
    "int8 chain": {"num_draft_tokens": 2, "top_k": 1, "int8": True},
    "int8 exits": {"exits": [1, 2], "selection": "threshold", "thresholds": [0.8, 0.0], "num_draft_tokens": 2,
                   "top_k": 2, "nodes": 4, "int8": True},
    "a whole draft by cost": {"num_draft_tokens": 2, "top_k": 2, "nodes": 4, "costs": "cheap"},
    "the default with costs and a calibration": {"num_draft_tokens": 2, "costs": "cheap", "calibration": "curves"},
    "a chain by its distributions": {"num_draft_tokens": 2, "costs": "dear", "past": "peaked is right"},
    "mixed nodes": {"num_draft_tokens": 2, "top_k": 2, "nodes": 5, "peaked": 0.0},
    "mixed nodes that take all": {"num_draft_tokens": 1, "top_k": 3, "nodes": 3, "peaked": 0.0},
    "mixed nodes where peaked": {"num_draft_tokens": 2, "top_k": 2, "nodes": 6, "peaked": 0.45},
    "mixed nodes by cost": {"num_draft_tokens": 2, "top_k": 2, "nodes": 4, "peaked": 0.5, "costs": "cheap"},
    "mixed nodes by exits": {"exits": [1, 2], "num_draft_tokens": 2, "top_k": 2, "nodes": 3, "peaked": 0.4,
                             "costs": "cheap"},
}  # fmt: skip
PASSES = {"target": PassCost((1, 8), (1.0, 1.2)), "small": PassCost((1, 8), (0.05, 0.06)),
          "sd2:1": PassCost((1, 8), (0.02, 0.03)), "sd2:2": PassCost((1, 8), (0.01, 0.03))}  # fmt: skip
# Another token costs nearly as much as a pass, so it must be likely to be accepted.
DEAR = PASSES | {"target": PassCost((1, 8), (1.0, 4.85)), "small": PassCost((1, 8), (0.01, 0.01))}
CURVES = Calibration("any", {"small": Calibrator((0.0, 1.0), (0.2, 0.9))}, temperature=0.8)


@pytest.fixture(scope="module")
def target_model(make_model: Any) -> Any:
    return make_model("llama", vocab_size=V, pad_token_id=None, bos_token_id=None, eos_token_id=None)


@pytest.fixture(scope="module")
def draft_model(target_model: Any, shake: Any) -> Any:
    return shake(target_model, 0.5)


def sampled(draft_model: Any, **shape: Any) -> Any:
    shape.pop("past", None)
    if "costs" in shape:
        shape["costs"] = Costs(DEAR if shape["costs"] == "dear" else PASSES)
    if "calibration" in shape:
        shape["calibration"] = CURVES
    shape.setdefault("sample", "drawn")
    if shape.pop("head", False):  # one of the three tokens it cannot draft
        return Eagle(tiny_eagle(vocab=V, ids=[0, 2], features=("layer:1", "last")), **shape)
    return (SD2 if "exits" in shape else SmallLM)(draft_model, **shape)


WARM, CUT = Settings(temperature=0.8, seed=1), Settings(temperature=0.7, top_k=2, seed=1)


MODULES = (drawn_module, rejection_module, traversal_module)
CASES = [*((shape, WARM, rule) for shape in SHAPES for rule in ("token", "traversal")), ("chain", WARM, "block"),
         ("chain", CUT, "token"), ("chain", CUT, "block")]  # fmt: skip


@pytest.mark.parametrize(("shape", "settings", "rule"), CASES)
def test_a_step_has_the_targets_distribution_exactly(
    monkeypatch: pytest.MonkeyPatch, target_model: Any, draft_model: Any, shape: str, settings: Settings, rule: str
) -> None:
    current: list[Any] = []

    def draw(probs_V: torch.Tensor, uniform: Any) -> int:
        return current[0].draw(probs_V)

    for module in MODULES:
        monkeypatch.setattr(module, "draw_by_inversion", draw)
    monkeypatch.setattr(distribution_module, "first", lambda logits_V, *key: draw(logits_V.double().softmax(-1), key))
    target, drafter = HFTarget(target_model), sampled(draft_model, **SHAPES[shape])
    drafter.bind(target)
    distributions: dict[tuple[int, ...], list[float]] = {}
    seen: Counter[str] = Counter()
    exits: Counter[int] = Counter()
    kinds: set[tuple[tuple[bool, ...], ...]] = set()

    def procedure(chooser: Any) -> tuple[int, ...]:
        current[:] = [chooser]
        row = Row("0", list(PROMPT), settings, Stops(4))
        admit(target, drafter, [row])
        policy = Policy.of(target, drafter)
        policy.begin([row])
        if "past" in SHAPES[shape]:
            policy.alone(row)._acceptance = Acceptance(offset=-7.0, slope=20.0)
        (draft,) = policy.cut([row], drafter.propose([row], [Budget(8, 3)], policy))
        distribution = target.score([row], [draft]).distribution(0)
        for node in range(-1, len(draft)):
            distributions[en.path_of(draft, node)] = distribution.probs(node).tolist()
        verdict = as_rule(rule)(draft, distribution, en.BranchingStream(chooser))
        exits.update(exit for _, exit in draft.exits)
        kinds.add(tuple(tuple(trial.group.outright for trial in trials) for trials in draft.trials.values()))
        release(target, drafter, [row])
        seen["deep"] += len(verdict.path) >= min(2, SHAPES[shape]["num_draft_tokens"])
        seen["rejected"] += any(not tried.accepted for tried in verdict.tried)
        return (*(draft.tokens[node] for node in verdict.path), verdict.next_token)

    def plain(path: tuple[int, ...]) -> list[float]:
        return target_distribution(target_model, path, settings)

    emitted = en.completed(en.enumerate_outcomes(procedure), plain, 2)
    assert en.distance(emitted, en.plain_distribution(plain, 2)) < 1e-9
    assert seen["deep"]
    assert seen["rejected"]
    if "exits" in SHAPES[shape]:
        assert set(exits) == {1, 2}, "both exits were drafted from"
    if "past" in SHAPES[shape]:
        assert len(kinds) > 1, "the distributions decided how much was drawn"
    if shape.startswith("mixed"):
        tried = {trials for kind in kinds for trials in kind}
        assert any(trials[:2] == (False, True) for trials in tried), "the drawn one first"
        assert shape != "mixed nodes where peaked" or (False, False) in tried


def target_distribution(
    model: Any, path: tuple[int, ...], settings: Settings, prompt: Sequence[int] = PROMPT
) -> list[float]:
    from draftsmith.infer.contract.draft import Draft

    with torch.inference_mode():
        logits_V = model(torch.tensor([[*prompt, *path]]), use_cache=False).logits[0, -1]
    row = Row("distribution", [*prompt, *path], settings)
    return NodeDistribution(logits_V[None], row, Draft(), None).probs(-1).tolist()


@pytest.fixture(scope="module")
def two_tokens(make_model: Any, shake: Any) -> tuple[Any, Any]:
    model = make_model("llama", vocab_size=2, pad_token_id=None, bos_token_id=None, eos_token_id=None)
    return model, shake(model, 2.5)


CALIBRATED = Calibration("any", {"small": Calibrator((0.0, 1.0), (0.2, 0.9))}, temperature=1.0)
PRICED = {"costs": Costs({"target": PassCost((1, 8), (1.0, 1.2)), "small": PassCost((1, 8), (0.3, 0.35))}),
          "calibration": CALIBRATED}  # fmt: skip
TWO_STEPS = [
    ("block", {"num_draft_tokens": 2, "top_k": 1}),
    ("block", {"num_draft_tokens": 3, "top_k": 1, **PRICED}),
    ("token", {"num_draft_tokens": 2, "top_k": 1, **PRICED}),
    ("traversal", {"num_draft_tokens": 2, "top_k": 2, "nodes": 3, "replacement": True, **PRICED}),
]


def two_step_error(
    monkeypatch: pytest.MonkeyPatch, models: tuple[Any, Any], rule: str, shape: dict[str, Any], make: Any = SmallLM
) -> tuple[float, Counter[str]]:
    """Two steps of the engine's own loop, on numbers that are intervals with the product's keys."""
    target, drafter = HFTarget(models[0]), make(models[1], sample="drawn", **shape)
    drafter.bind(target)
    settings, seen, current = Settings(temperature=1.0, seed=1), Counter[str](), list[Any]()

    def keyed(seed: int, row: str, position: int, purpose: str, index: int = 0) -> Any:
        return en.KeyedUniform(current[-1], (position, purpose, index))

    for module in MODULES:
        monkeypatch.setattr(module, "draw_by_inversion", en.draw_by_inversion)

    def race(logits_V: torch.Tensor, seed: int, row: str, position: int) -> int:
        return en.raced(current[-1], position).draw(logits_V.double().softmax(-1))

    monkeypatch.setattr(distribution_module, "first", race)
    for module in (drawn_module, rng_module):
        monkeypatch.setattr(module, "uniform", keyed)
    known: dict[tuple[int, ...], torch.Tensor] = {}

    def plain(path: tuple[int, ...]) -> torch.Tensor:
        if path not in known:
            shares = target_distribution(models[0], path, settings, [1, 0, 1])
            known[path] = torch.tensor(shares, dtype=torch.float64)
        return known[path]

    def procedure(chooser: Any) -> tuple[int, ...]:
        current[:] = [en.KeyedNumbers(chooser)]
        row, policy = Row("0", [1, 0, 1], settings, Stops(4)), Policy.of(target, drafter)
        admit(target, drafter, [row])
        for number in range(2):
            if not row.stop:
                (trace,) = step(target, drafter, [row], Budget(8, 3), as_rule(rule), policy)
                seen[f"deep in step {number}"] += trace.accepted >= 2
                seen[f"refused in step {number}"] += trace.nodes > 0 and trace.accepted == 0
                seen["jointly"] += trace.jointly
        release(target, drafter, [row])
        tokens = tuple(row.new_ids)
        while len(tokens) < 4:
            tokens += (en.raced(current[-1], 3 + len(tokens)).draw(plain(tokens)),)
        return tokens

    emitted = en.enumerate_outcomes(procedure)
    return en.distance(emitted, en.plain_distribution(lambda path: plain(path).tolist(), 4)), seen


@pytest.mark.parametrize(("rule", "shape"), TWO_STEPS)
def test_two_steps_have_the_targets_distribution_exactly(
    monkeypatch: pytest.MonkeyPatch, two_tokens: tuple[Any, Any], rule: str, shape: dict[str, Any]
) -> None:
    error, seen = two_step_error(monkeypatch, two_tokens, rule, shape)
    assert error < 1e-9
    assert seen["deep in step 0"]
    assert seen["refused in step 0"]
    assert seen["refused in step 1"]
    assert bool(seen["jointly"]) == (rule != "token")


def test_planted_keys_by_position_are_caught_in_two_steps(
    monkeypatch: pytest.MonkeyPatch, two_tokens: tuple[Any, Any]
) -> None:
    plant(
        monkeypatch, traversal_module, "_kept_visits", 'rng.step_uniform("accept", number)',
        'rng.uniform(len(visits) - 2, "accept")',
    )  # fmt: skip
    error, _ = two_step_error(monkeypatch, two_tokens, "block", {"num_draft_tokens": 2, "top_k": 1})
    assert error > 1e-3


@pytest.mark.parametrize("shape", ["chain", "tree with replacement, cut by its budget"])
@pytest.mark.parametrize("rule", NAMES)
def test_no_step_reads_a_number_that_an_earlier_one_has_read(
    monkeypatch: pytest.MonkeyPatch, target_model: Any, draft_model: Any, shape: str, rule: str
) -> None:
    read: list[tuple[Any, ...]] = []

    def noted(*key: Any) -> float:
        read.append(key)
        return uniform(*key)

    uniform = rng_module.uniform
    for module in (drawn_module, rng_module):
        monkeypatch.setattr(module, "uniform", noted)
    target, drafter = HFTarget(target_model), sampled(draft_model, **SHAPES[shape])
    drafter.bind(target)
    rows = [Row(str(i), list(PROMPT), WARM, Stops(30)) for i in range(4)]
    generate(target, drafter, rows, batch_size=4, rule=rule)
    assert len(read) > 150
    assert len(set(read)) == len(read)


@pytest.mark.parametrize(
    ("shape", "rule"), [("chain", "token"), ("chain", "block"), *((TREE, rule) for rule in ("token", "traversal"))]
)
def test_frequencies_through_the_whole_loop_pass_a_chi_square_test(
    target_model: Any, draft_model: Any, shape: str, rule: str
) -> None:
    """2,400 rows of their own seeds, batched, four tokens each; 1 % level on all pairs of first tokens."""
    target, drafter = HFTarget(target_model), sampled(draft_model, **SHAPES[shape])
    drafter.bind(target)
    count = 2400
    rows = [Row(str(i), list(PROMPT), Settings(temperature=1.0, seed=9), Stops(4)) for i in range(count)]
    done = generate(target, drafter, rows, batch_size=200, rule=rule)
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


@pytest.mark.parametrize(("top_k", "rule"), [(2, "token"), (1, "block"), (2, "traversal")])
def test_a_rows_tokens_do_not_depend_on_its_batch(make_model: Any, shake: Any, top_k: int, rule: str) -> None:
    model = make_model("llama")
    settings = Settings(temperature=0.9, seed=4)

    def decode(batch_size: int) -> list[list[int]]:
        target, drafter = HFTarget(model), SmallLM(shake(model, 0.1), sample="drawn", top_k=top_k, nodes=6)
        drafter.bind(target)
        rows = [Row(str(i), [5 + i, 9, 12 + i], settings, Stops(12 + i)) for i in range(6)]
        done = generate(target, drafter, rows, batch_size=batch_size, rule=rule)
        return [generation.token_ids for generation in done]

    alone = decode(1)
    assert decode(4) == alone
    assert len({token for tokens in alone for token in tokens}) >= 8


def test_a_greedy_row_is_drafted_for_greedily(make_model: Any, shake: Any) -> None:
    model = make_model("llama")
    target, drafter = HFTarget(model), SmallLM(shake(model, 0.06), sample="drawn")
    drafter.bind(target)
    rows = [Row(str(i), [5 + i, 9], Settings(), Stops(20)) for i in range(2)]
    mixed = [*rows, Row("drawn", [7, 9], Settings(temperature=1.0), Stops(20))]
    plain = generate(target, Empty(), [Row(r.key, list(r.ids), r.settings, r.stops) for r in rows])
    done = generate(target, drafter, mixed, batch_size=3)
    assert [one.token_ids for one in done[:2]] == [one.token_ids for one in plain]
    again = [Row(row.key, list(row.ids), row.settings, row.stops) for row in mixed]
    admit(target, drafter, again)
    likeliest, _, drawn = drafter.propose(again, [Budget(14, 4)] * 3)
    assert all(trial.group.outright for trials in likeliest.trials.values() for trial in trials)
    assert len(likeliest) > likeliest.depth, "a tree"
    assert not any(trial.group.outright for trials in drawn.trials.values() for trial in trials)
    assert drawn.is_chain()
    assert len(drawn) == 4


def claims_the_whole_distribution(grow: Any) -> Any:
    """A planted fault: the token was drawn from the rest of the distribution."""

    def planted(drawing: Any, parent: int, probs_V: torch.Tensor, *given: Any) -> None:
        before = len(drawing.draft.trials.get(parent, ()))
        grow(drawing, parent, probs_V, *given)
        trials = drawing.draft.trials[parent]
        whole_V = probs_V.clone()
        whole_V[whole_V == 0] = 0.4
        trials[before] = trials[before]._replace(group=Group(whole_V / whole_V.sum()))

    return planted


def drops_what_looks_unlikely(grow: Any) -> Any:
    """A planted fault: whether a token is kept depends on which it is."""

    def planted(drawing: Any, parent: int, *given: Any) -> None:
        grow(drawing, parent, *given)
        if drawing.draft.trials[parent][-1].confidence < 0.4:
            drawing.draft.trials[parent].pop()

    return planted


@pytest.mark.parametrize(
    ("shape", "plant"), [("mixed nodes", claims_the_whole_distribution), ("chain", drops_what_looks_unlikely)]
)
def test_the_enumeration_finds_planted_faults(
    monkeypatch: pytest.MonkeyPatch, target_model: Any, draft_model: Any, shape: str, plant: Any
) -> None:
    monkeypatch.setattr(drawn_module._Drawing, "_draw", plant(drawn_module._Drawing._draw))
    with pytest.raises(AssertionError, match="1e-09"):
        test_a_step_has_the_targets_distribution_exactly(monkeypatch, target_model, draft_model, shape, WARM, "token")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sample": "drawn", "peaked": 0.5}, "give top_k=2 or more"),
        ({"sample": True, "peaked": 0.5, "top_k": 1}, "give top_k=2 or more"),
        ({"sample": "drawn", "peaked": 0.5, "top_k": 3, "replacement": True}, "without replacement"),
        ({"sample": "drawn", "peaked": 1.5, "top_k": 3}, "between 0 and 1"),
        ({"sample": False, "replacement": True}, "add sample=drawn"),
        ({"sample": "coupled", "peaked": 0.5, "top_k": 3}, "add sample=drawn"),
        ({"sample": "warm"}, "coupled, drawn, likeliest"),
        ({"num_draft_tokens": 0}, "num_draft_tokens must be at least 1"),
        ({"top_k": 0}, "top_k must be at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(draft_model: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SmallLM(draft_model, **arguments)
