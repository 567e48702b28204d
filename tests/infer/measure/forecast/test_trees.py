"""Trees and greedy chains against the engine, step by step: the texts are given, so nothing is left to chance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from planted import plant
from tiny_folders import tiny_llama

from draftsmith.infer.contract.draft import ROOT, Draft
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.costs.pass_costs import Costs, PassCost
from draftsmith.infer.drafters import SD2, SmallLM
from draftsmith.infer.drafters.controls import Empty
from draftsmith.infer.engine.engine import Engine
from draftsmith.infer.measure.forecast import forecast as forecast_module
from draftsmith.infer.measure.forecast import lengths
from draftsmith.infer.measure.forecast.drafting import Drafting
from draftsmith.infer.measure.forecast.forecast import Forecast
from draftsmith.infer.measure.forecast.outlook import TREES
from draftsmith.infer.measure.forecast.texts import DrawnText
from draftsmith.infer.models.hf_target import HFTarget

STOPS = Stops(16, frozenset(range(0, 300, 23)))
PROMPTS = [[5, 6, 7, 10 + i] for i in range(12)]
GREEDY, WARM = Settings(), Settings(temperature=0.8, top_k=3, seed=1)


class FixedTree(Empty):
    """The likeliest tokens of `model`, as many children at each node of a depth, one forward pass a node."""

    name = "fixed"

    def __init__(self, model, widths, context):
        self.model, self.widths, self.context = model, widths, context

    @torch.inference_mode()
    def propose(self, rows, budgets, policy=None):
        drafts = [Draft() for _ in rows]
        for row, budget, draft in zip(rows, budgets, drafts):
            level = [(ROOT, list(row.ids))]
            for width in self.widths[: max(min(budget.depth, self.context - len(row.ids)), 0)]:
                below = []
                for parent, ids in level:
                    logits_V = self.model(torch.tensor([ids])).logits[0, -1]
                    for token in torch.topk(logits_V, width).indices.tolist():
                        below.append((draft.outright(parent, token, self.name), [*ids, token]))
                level = below
        return drafts


def decode(target, drafter, settings):
    drafter.bind(target)
    rows = [Row(str(i), prompt, settings, STOPS) for i, prompt in enumerate(PROMPTS)]
    with Engine(target, drafter, batch_size=6) as engine:
        done = engine.run(rows, strict=True)
    texts = [
        DrawnText(one.row, prompt, one.token_ids, np.zeros(len(one.token_ids))) for prompt, one in zip(PROMPTS, done)
    ]
    return done, texts


def figures(model, texts, settings, lengths=(1,), trees=()):
    run = Forecast(texts, settings, lengths, ["token"], STOPS.max_new_tokens, trees=trees)
    return run.figures(SmallLM(model))


def check_varied(done):
    """Some drafts were accepted whole, some were refused, and the texts differ."""
    traces = [trace for one in done for trace in one.traces]
    assert max(trace.accepted for trace in traces) >= 2
    assert any(trace.accepted < trace.depth for trace in traces)
    assert {one.stop for one in done} == {"eos", "max_new_tokens"}
    assert len({token for one in done for token in one.token_ids}) >= 8
    return traces


@pytest.fixture(scope="module")
def pair():
    """A target and a draft that is often right, and whose distributions are peaked."""
    model, draft = tiny_llama(max_position_embeddings=64), tiny_llama(max_position_embeddings=15)
    with torch.no_grad():
        for given, own in zip(model.parameters(), draft.parameters()):
            own.copy_(given + 0.006 * torch.randn(given.shape, generator=torch.Generator().manual_seed(given.numel())))
        draft.lm_head.weight *= 8
    return HFTarget(model), draft.eval()


@pytest.mark.parametrize("length", [1, 3, 6])
def test_a_greedy_chain_is_forecast_step_by_step(pair, length):
    target, draft = pair
    drafter = SmallLM(draft, num_draft_tokens=length, top_k=1, min_confidence=0, costs="none", calibration="none")
    done, texts = decode(target, drafter, GREEDY)
    found = figures(draft, texts, GREEDY, [length])["small", "token"][0]
    traces = [trace for one in done for trace in one.traces]
    assert found.steps.tolist() == [len(one.traces) for one in done]
    assert found.nodes_per_step == pytest.approx(sum(trace.nodes for trace in traces) / len(traces))
    assert found.context == pytest.approx(sum(trace.context for trace in traces) / len(traces))
    if length > 1:
        check_varied(done)


@pytest.mark.parametrize("settings", [GREEDY, WARM], ids=["greedy", "warm"])
@pytest.mark.parametrize("name", ["3-2-1", "1-1-1-1", "2-2"])
def test_a_tree_of_a_fixed_shape_is_forecast_step_by_step(pair, name, settings):
    target, draft = pair
    tree = Drafting.parse_tree(name)
    done, texts = decode(target, FixedTree(draft, tree.widths, 15), settings)
    found = figures(draft, texts, settings, trees=[tree])["small", TREES][0]
    traces = check_varied(done)
    assert found.steps.tolist() == [len(one.traces) for one in done]
    assert found.nodes_per_step == pytest.approx(sum(trace.nodes for trace in traces) / len(traces))
    assert list(found.covered) == sorted(found.covered, reverse=True)
    assert 0 < found.covered[-1] < found.covered[0] < 1


@pytest.mark.parametrize("settings", [GREEDY, WARM], ids=["greedy", "warm"])
def test_a_tree_that_grows_is_replayed_step_by_step(pair, settings):
    target, draft = pair
    drafter = SmallLM(draft, num_draft_tokens=3, nodes=6, sample="likeliest", costs="none", calibration="none")
    done, texts = decode(target, drafter, settings)
    check_varied(done)
    tree = Drafting.parse_tree("6x3")
    found = figures(draft, texts, settings, trees=[tree])["small", TREES][0]
    assert found.steps.tolist() == [len(one.traces) for one in done]
    nodes = sum(trace.nodes for one in done for trace in one.traces)
    assert found.nodes_per_step * found.steps.sum() == pytest.approx(nodes)


FAULTS = {
    "each depth by itself": (
        lengths, "coverage", "np.logical_and.accumulate(ahead_TK < np.asarray(widths), axis=1)",
        "ahead_TK < np.asarray(widths)",
    ),
    "one child too many": (lengths, "coverage", "ahead_TK < np.asarray(widths)", "ahead_TK <= np.asarray(widths)"),
    "a tree has as many nodes as it is deep": (
        lengths, "expected_steps", "sizes_D = np.asarray(sizes or range(most + 1))", "sizes_D = np.arange(most + 1)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(pair, fault, monkeypatch):
    target, draft = pair
    tree = Drafting.parse_tree("3-2-1")
    done, texts = decode(target, FixedTree(draft, tree.widths, 15), WARM)
    nodes = sum(trace.nodes for one in done for trace in one.traces)

    def right():
        found = figures(draft, texts, WARM, trees=[tree])["small", TREES][0]
        same = found.steps.tolist() == [len(one.traces) for one in done]
        return same and found.nodes_per_step * found.steps.sum() == pytest.approx(nodes)

    assert right()
    module, name, sound, broken = FAULTS[fault]
    plant(monkeypatch, module, name, sound, broken)
    monkeypatch.setattr(forecast_module, name, getattr(module, name))
    assert not right()


def test_results_price_trees_by_their_levels_and_have_the_best_of_every_rule():
    rng = np.random.default_rng(0)
    texts = [DrawnText(str(i), [1, 2], rng.integers(300, size=12), rng.normal(-3, 1, 12)) for i in range(9)]
    costs = Costs({"target": PassCost([1, 64], [1.0, 4.0]), "small": PassCost([1, 101], [0.1, 10.1])}, 0.5)
    trees = [Drafting.parse_tree("3-2-1"), Drafting.parse_tree("4x2")]
    run = Forecast(texts, WARM, [1, 2], costs=costs, batch_sizes=[1, 4], trees=trees)
    found = run.results({"s": SmallLM(tiny_llama())})
    fixed, grown = found["trees"]["s"]
    assert (fixed["draft"], fixed["nodes"], fixed["depth"], fixed["by"]) == ("3-2-1", 15, 3, "ranks")
    assert (grown["draft"], grown["nodes"], grown["depth"], grown["by"]) == ("4x2", 4, 2, "replay")
    # Passes of 1, 3 and 6 tokens, the target's over 16, and the loop.
    assert fixed["predicted"][0]["step_s"] == pytest.approx(0.1 + 0.3 + 0.6 + 1 + 15 * 3 / 63 + 0.5)
    for batch, rows in zip(found["by_batch_size"], (1, 4)):
        assert batch["batch_size"] == rows
        assert batch["plain_tokens_per_s"] == pytest.approx(rows / (1 + (rows - 1) * 3 / 63))
        assert list(batch["rules"]) == ["token", "block", TREES]
        for cell in batch["rules"].values():
            assert cell["tokens_per_s"] == pytest.approx(cell["speedup"] * batch["plain_tokens_per_s"])
            low, high = cell["speedup_interval"]
            assert low <= cell["speedup"] <= high
    assert found["shapes"] == {"s": {"layers": 2, "width": 32, "heads": 4}}


def test_greedy_forecasts_have_one_rule_and_no_need_of_log_probabilities(pair):
    target, draft = pair
    drafter = SmallLM(draft, num_draft_tokens=2, top_k=1, min_confidence=0, costs="none", calibration="none")
    _, texts = decode(target, drafter, GREEDY)
    found = Forecast(texts, GREEDY, [2]).results({"s": SmallLM(draft)})
    assert list(found["drafters"]["s"]) == ["token"]
    assert (found["trees"], found["by_batch_size"], found["best"]) == ({}, [], None)


def test_trees_that_grow_need_a_draft_with_one_exit():
    texts = [DrawnText("a", [1], [1, 2, 3], np.zeros(3))]
    drafter = SD2(tiny_llama(num_hidden_layers=4), exits=[2, 4])
    with pytest.raises(ValueError, match=r"s has several exits.*\(6x3\).*4-2-1"):
        Forecast(texts, GREEDY, [1], trees=[Drafting.parse_tree("6x3")]).results({"s": drafter})
    found = Forecast(texts, GREEDY, [1], trees=[Drafting.parse_tree("3-1")]).results({"s": drafter})
    assert list(found["trees"]) == ["s:2", "s:4"]


@pytest.mark.parametrize("text", ["4", "x3", "0-1", "4-", "2x3", "4-0", "a-b", "-4"])
def test_what_is_no_tree_is_refused(text):
    with pytest.raises(ValueError, match="is no tree"):
        Drafting.parse_tree(text)


def test_a_drafting_is_found_again_by_its_name():
    for one in (Drafting.chain(4), Drafting.parse_tree("14x4"), Drafting.parse_tree("4-2-1")):
        assert Drafting.parse(one.name) == one
    assert Drafting.parse_tree("4-2-1") == Drafting("4-2-1", 20, 3, (1, 4, 8), tree=True, widths=(4, 2, 1))
