"""A target over two ranks decodes what it decodes on one: the same tokens and the same trees, for every drafter, with
rows that join and leave. Rank 0 is the process of the tests.

Every test asserts that its own run accepted deep, rejected, and varied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import test_lossless
import torch
from over_ranks import saved
from test_eagle_lossless import MAKE, head_of
from test_lossless import (
    COUPLED,
    DRAFTERS,
    EITHER,
    assert_tried_hard,
    decode,
    make_rows,
    models,
    plain_tokens,
    retrieved,
    spread,
    tokens,
)

from draftsmith.infer.contract.protocols import Drafter
from draftsmith.infer.contract.row import Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.contract.trace import Generation
from draftsmith.infer.drafters import SD2, SmallLM
from draftsmith.infer.drafters.controls import Empty
from draftsmith.infer.drafters.registry import load_drafter
from draftsmith.infer.engine.engine import Engine
from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.infer.models.load import load_target

# Over gloo; two CUDA devices are tried in tests/infer/models/tensor_parallel/test_two_devices.py.
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="two ranks on the CPU: hide the CUDA devices")
KIND = "llama"
# Of what `trees` gives of a step: the trials that were tried, with their confidences.
TRIED = 5
# Drafters whose draft models may be split.
SPLIT = ("tree", "unsure chain", "sd2", "sd2 by cost", "mixed", "mixed by cost")
OUTRIGHT = ("tree", "sd2", "sd2 by cost", "pld", "recycle", "lookahead", "mixed", "mixed by cost")


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> HFTarget:
    return HFTarget(models(KIND)[0])


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Iterator[HFTarget]:
    """The same target over two ranks."""
    target = load_target(saved(tmp_path_factory.mktemp("target"), models(KIND)[0]), tp=2)
    target.tokenizer = None  # as the one that it is compared with
    yield target
    target.close()


def trees(generations: Sequence[Generation]) -> list[list[tuple[Any, ...]]]:
    """Of every step what was drafted, tried and kept, and where it came from."""
    return [
        [
            (trace.nodes, trace.trials, trace.depth, trace.accepted, trace.committed, trace.tried, trace.exits,
             trace.nodes_by_source, trace.committed_sources, trace.context)
            for trace in generation.traces
        ]
        for generation in generations
    ]  # fmt: skip


def check_same(
    one: HFTarget, two: HFTarget, make: Callable[[HFTarget], Drafter], settings: Settings, plain: bool, deep: int = 2
) -> None:
    """`plain`: the tokens are those of plain decoding on one rank."""
    found = [decode(target, make(target), make_rows(settings), 3) for target in (one, two)]
    assert tokens(found[1]) == tokens(found[0])
    assert trees(found[1]) == trees(found[0])
    if plain:
        assert tokens(found[1]) == plain_tokens(KIND, settings)
    assert_tried_hard(found[1], deep)


def test_the_shares_are_halves_and_the_whole_is_known(one: HFTarget, two: HFTarget) -> None:
    own = {name: tuple(one.shape) for name, one in two.model.named_parameters()}
    assert own["model.layers.0.self_attn.k_proj.weight"] == (8, 32)
    assert own["model.layers.0.self_attn.o_proj.weight"] == (32, 16)
    assert own["model.layers.1.mlp.gate_proj.weight"] == (24, 32)
    assert own["model.embed_tokens.weight"] == own["lm_head.weight"] == (61, 32)
    assert (two.ranks, two.parameters, two.fingerprint()) == (2, one.parameters, one.fingerprint())
    assert two.lm.weight_bytes < one.lm.weight_bytes


@pytest.mark.parametrize(("name", "settings"), spread(2, OUTRIGHT, EITHER))
def test_outright_drafts(one: HFTarget, two: HFTarget, name: str, settings: Settings) -> None:
    deep = 2 if settings.greedy else 1
    check_same(one, two, lambda target: DRAFTERS[name](models(KIND)[1]), settings, plain=True, deep=deep)


@pytest.mark.parametrize("name", ["coupled", pytest.param("coupled sd2 by cost", marks=pytest.mark.slow)])
def test_coupled_drafts(one: HFTarget, two: HFTarget, name: str) -> None:
    check_same(one, two, lambda target: COUPLED[name](models(KIND)[1]), EITHER["sampled"], plain=True)


@pytest.mark.parametrize("rule", ["token", pytest.param("block", marks=pytest.mark.slow), "traversal"])
def test_drawn_drafts(one: HFTarget, two: HFTarget, rule: str) -> None:
    """Their tokens are others than plain decoding's, and the same for any number of ranks."""
    found = []
    for target in (one, two):
        drafter = SmallLM(models(KIND)[1], num_draft_tokens=4, top_k=2, nodes=9, sample="drawn")
        found.append(decode(target, drafter, make_rows(EITHER["sampled"]), 3, rule))
    assert tokens(found[1]) == tokens(found[0]) != plain_tokens(KIND, EITHER["sampled"])
    assert trees(found[1]) == trees(found[0])
    assert_tried_hard(found[1])


@pytest.mark.parametrize(("name", "settings"), spread(2, [*MAKE], EITHER))
def test_an_eagle_head_on_the_targets_states(one: HFTarget, two: HFTarget, name: str, settings: Settings) -> None:
    check_same(one, two, lambda target: MAKE[name](head_of(KIND)), settings, plain=True)


@pytest.mark.parametrize(("name", "settings"), spread(2, ["rest", "dresd"], EITHER))
def test_retrieved_drafts(one: HFTarget, two: HFTarget, name: str, settings: Settings, tmp_path: Path) -> None:
    """The dense store is built with the states of each target itself."""
    answered = make_rows(settings)
    decode(one, Empty(), answered, 8)
    check_same(one, two, lambda target: retrieved(name, target, answered, tmp_path / str(target.ranks)), settings, True)


@pytest.fixture(scope="module")
def draft(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The draft model in a folder."""
    return saved(tmp_path_factory.mktemp("draft"), models(KIND)[1])


@pytest.fixture
def splitting(monkeypatch: pytest.MonkeyPatch) -> Callable[[HFTarget], None]:
    """Lets the drafters of the lossless matrix split their draft models over a target's ranks."""

    def over(target: HFTarget) -> None:
        monkeypatch.setattr(test_lossless, "SmallLM", partial(SmallLM, tp=target.ranks))
        monkeypatch.setattr(test_lossless, "SD2", partial(SD2, tp=target.ranks))

    return over


def rounded(steps: list[list[tuple[Any, ...]]], digits: int = 9) -> list[Any]:
    """Trees with rounded confidences: those of a draft that is split round otherwise."""
    return [
        [
            [
                [one._replace(confidence=round(one.confidence, digits)) for one in part] if i == TRIED else part
                for i, part in enumerate(step)
            ]
            for step in row
        ]
        for row in steps
    ]


def check_split(
    one: HFTarget, two: HFTarget, make: Callable[[HFTarget], Drafter], settings: Settings, deep: int
) -> None:
    """A draft over two ranks behind a target over two against both whole."""
    found = [decode(target, make(target), make_rows(settings), 3) for target in (one, two)]
    assert tokens(found[1]) == tokens(found[0])
    assert rounded(trees(found[1])) == rounded(trees(found[0]))
    assert_tried_hard(found[1], deep)


@pytest.mark.parametrize(("name", "settings"), spread(4, SPLIT, EITHER))
def test_drafts_split_over_the_ranks(
    one: HFTarget, two: HFTarget, draft: str, splitting: Any, name: str, settings: Settings
) -> None:
    def make(target: HFTarget) -> Drafter:
        splitting(target)
        return DRAFTERS[name](draft)

    check_split(one, two, make, settings, 2 if settings.greedy else 1)


@pytest.mark.parametrize("name", ["coupled sd2", pytest.param("coupled by cost", marks=pytest.mark.slow)])
def test_coupled_drafts_split_over_the_ranks(
    one: HFTarget, two: HFTarget, draft: str, splitting: Any, name: str
) -> None:
    def make(target: HFTarget) -> Drafter:
        splitting(target)
        return COUPLED[name](draft)

    check_split(one, two, make, EITHER["sampled"], 2)


@pytest.mark.parametrize("eager", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_drawn_drafts_split_over_the_ranks(one: HFTarget, two: HFTarget, draft: str, eager: bool) -> None:
    def make(target: HFTarget) -> Drafter:
        sizes: dict[str, Any] = {"num_draft_tokens": 4, "top_k": 2, "nodes": 9, "sample": "drawn", "tp": target.ranks}
        return SD2(draft, [1, 2], "threshold", thresholds=[0.5, 0], eager=eager, **sizes)

    check_split(one, two, make, EITHER["sampled"], 2)


def test_a_split_draft_holds_halves_is_loaded_once_and_can_be_timed(two: HFTarget, draft: str) -> None:
    drafter = SD2(draft, [1, 2], tp=2)
    assert [*drafter.pass_timers()] == ["sd2:1", "sd2:2"]  # before it is loaded
    assert (drafter.forward_seconds, drafter.bytes_moved) == (0, 0)
    drafter.bind(two)
    model, own = drafter.model, {name: tuple(one.shape) for name, one in drafter.model.named_parameters()}
    assert own["model.layers.0.self_attn.k_proj.weight"] == (8, 32)
    assert own["model.embed_tokens.weight"] == (61, 32)
    assert next(model.parameters()).dtype == torch.float64
    drafter.bind(two)
    assert drafter.model is model
    for timer in drafter.pass_timers().values():
        timer.place(2, 16)
        timer.run(3)
        timer.close()
    assert drafter.forward_seconds > 0
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = models(KIND)[1](input_ids=ids, use_cache=False).logits
    assert torch.allclose(model(input_ids=ids, use_cache=False).logits, expected, atol=1e-12)
    assert tokens(decode(two, Empty(), make_rows(Settings()), 8)) == plain_tokens(KIND, Settings())


def test_a_draft_over_other_ranks_than_its_target(one: HFTarget, two: HFTarget, draft: str) -> None:
    with pytest.raises(ValueError, match=r"\[tp=2\] is to be split over the ranks of its target, which has 1: "):
        SmallLM(draft, tp=2).bind(one)
    with pytest.raises(ValueError, match="num_key_value_heads=2, fewer than ranks"):
        SmallLM(draft, tp=4)
    with pytest.raises(ValueError, match="give its folder or Hub name"):
        SmallLM(models(KIND)[1], tp=2)
    with pytest.raises(ValueError, match="int8 drafts are not split"):
        SmallLM(draft, tp=2, int8=True)
    with pytest.raises(ValueError, match="tp must be at least 1, not 0"):
        SD2(draft, [1, 2], tp=0)
    with pytest.raises(ValueError, match="'eagle' has no argument 'tp'"):
        load_drafter(f"eagle:{draft}[tp=2]", two)


def test_rows_join_leave_and_are_aborted_at_the_same_rounds(one: HFTarget, two: HFTarget) -> None:
    """Rows are added while others decode, one is aborted while it is read and one while it decodes, and a kept row goes
    on with a second turn."""
    seen = []
    for target in (one, two):
        rows, events = make_rows(Settings()), []
        drafter = DRAFTERS["mixed"](models(KIND)[1])
        drafter.bind(target)
        with Engine(target, drafter, batch_size=3, chunk=8) as engine:
            waiting = list(rows)
            for at in range(400):
                if waiting and at % 2 == 0:
                    engine.add(waiting.pop(0), keep=len(waiting) == 4)
                if at in (5, 12):
                    live = [row for row in rows if row in engine and not row.stop]
                    engine.abort(live[-1] if at == 5 else live[0])
                events.append([(event.row.key, event.tokens, event.done is not None) for event in engine.step()])
                if rows[3].stop == "max_new_tokens" and rows[3].stops.max_new_tokens != 6:
                    engine.resume(rows[3], [7, 8, 9], Stops(6))
                if not engine.busy and not waiting:
                    break
        seen.append((events, [(row.ids, row.stop) for row in rows]))
    assert seen[1] == seen[0]
    assert [row[1] for row in seen[1][1]].count("aborted") == 2
    assert len(seen[1][0]) < 400


def test_passes_over_ranks_can_be_timed(two: HFTarget) -> None:
    timer = two.pass_timers()["target"]
    before = two.forward_seconds, two.bytes_moved
    for rows, context in ((1, 16), (3, 40)):
        timer.place(rows, context)
        timer.run(4)
    timer.close()
    assert two.forward_seconds > before[0]
    assert two.bytes_moved == before[1] + 2 * two.lm.weight_bytes
    assert tokens(decode(two, Empty(), make_rows(Settings()), 8)) == plain_tokens(KIND, Settings())


def test_the_model_itself_is_called_on_all_ranks_and_not_with_a_cache(one: HFTarget, two: HFTarget) -> None:
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = one.model(input_ids=ids, use_cache=False).logits
    assert torch.allclose(two.model(input_ids=ids, use_cache=False).logits, expected, atol=1e-12)
    with pytest.raises(ValueError, match="cannot be called with a cache of keys and values"):
        two.model.generate(ids, max_new_tokens=2)
    assert tokens(decode(two, Empty(), make_rows(Settings()), 8)) == plain_tokens(KIND, Settings())
