"""A target over two ranks decodes what it decodes on one: the same tokens and the same trees, for every drafter, with
rows that join and leave. Rank 0 is the process of the tests.

Every test asserts that its own run accepted deep, rejected, and varied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
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
from draftsmith.infer.drafters import SmallLM
from draftsmith.infer.drafters.controls import Empty
from draftsmith.infer.engine.engine import Engine
from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.infer.models.load import load_target

# Over gloo; two CUDA devices are tried in tests/infer/models/tensor_parallel/test_two_devices.py.
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="two ranks on the CPU: hide the CUDA devices")
KIND = "llama"
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
