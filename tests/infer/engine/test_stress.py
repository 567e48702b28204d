"""Many requests of every kind through one engine: each finished one equals what it gives alone, and nothing is left."""

from __future__ import annotations

import gc
import random
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest

from draftsmith.infer.contract.protocols import Budget
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.drafters import SmallLM
from draftsmith.infer.engine.engine import Engine
from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.retrieval import PromptLookup

BATCH = 16
CONTEXT = 160
DRAFTERS: dict[str, Callable[[Any], Any]] = {
    "small": lambda model: SmallLM(model, num_draft_tokens=5, top_k=2, nodes=10, min_confidence=0.0, sample=False),
    "pld": lambda model: PromptLookup(),
    "none": lambda model: None,
}


@pytest.fixture(scope="module")
def pair(make_model: Any, shake: Any) -> tuple[Any, Any]:
    model = make_model("llama", max_position_embeddings=CONTEXT)
    return model, shake(model, 0.05)


def prompt(draw: random.Random) -> list[int]:
    ids = [draw.randrange(3, 61) for _ in range(draw.choice((1, 2, 9, 40, 120)))]
    return (ids + ids[: len(ids) // 2])[: CONTEXT - 2]


def request(number: int, draw: random.Random) -> Row:
    """One in ten has a prompt that the target cannot take; a third is sampled; lengths are uneven."""
    ids = prompt(draw)
    if number % 20 == 7:
        ids = [5] * (CONTEXT + number % 3)
    elif number % 20 == 13:
        ids[-1] = 61 + number
    settings = Settings(temperature=0.8, top_p=0.95, seed=number) if number % 3 == 0 else Settings()
    return Row(str(number), ids, settings, Stops(draw.randrange(1, 25)))


def wrong(row: Row) -> bool:
    return len(row.ids) >= CONTEXT or max(row.ids) > 60


def check_stress(pair: tuple[Any, Any], name: str, requests: int, watch: bool = False, seed: int = 0) -> list[int]:
    """Rows come at random moments, some are aborted; returns the bytes that Python held at each tenth (`watch`)."""
    draw = random.Random(seed)
    target, drafter = HFTarget(pair[0]), DRAFTERS[name](pair[1])
    if drafter is not None:
        drafter.bind(target)
    engine = Engine(target, drafter, batch_size=BATCH, budget=Budget(12, 6), chunk=64)
    alone = Engine(HFTarget(pair[0]))
    rows: list[Row] = []
    ended = {"aborted": 0, "error": 0, "done": 0}
    deep, held = 0, []
    if watch:
        tracemalloc.start()
    while len(rows) < requests or engine.busy:
        for _ in range(draw.randrange(4)):
            if len(rows) < requests:
                rows.append(request(len(rows), draw))
                with pytest.raises(ValueError, match=r"is empty"):
                    Row("nothing", [])
                if wrong(rows[-1]):
                    with pytest.raises(ValueError, match=r"context ends at 160|vocabulary of 61"):
                        engine.add(rows[-1])
                    rows[-1].stop = "error"
                    ended["error"] += 1
                else:
                    engine.add(rows[-1])
                if watch and len(rows) % (requests // 10) == 0:
                    gc.collect()
                    held.append(tracemalloc.get_traced_memory()[0])
        present = [row for row in rows[-40:] if row in engine]
        if present and draw.random() < 0.06:
            engine.abort(draw.choice(present))
        for event in engine.step():
            if event.done is not None:
                assert not event.done.error
                ended["aborted" if event.done.stop == "aborted" else "done"] += 1
                deep = max([deep, *(trace.accepted for trace in event.done.traces)])
    tracemalloc.stop()
    assert sum(ended.values()) == requests
    assert min(ended.values()) > requests // 50
    assert deep >= (2 if drafter is not None else 0)
    assert len(engine) == 0
    assert not target._features
    assert not any(target.lm.has(row) for row in rows)
    for inner in ("_rows", "_indexes", "_states"):
        assert not getattr(drafter, inner, None)
    assert len({token for row in rows for token in row.new_ids}) >= 8
    for row in rows:
        if row.stop == "error":
            continue
        (whole,) = alone.run([Row(row.key, row.ids[: row.prompt_tokens], row.settings, row.stops)])
        assert row.new_ids == whole.token_ids[: len(row.new_ids)]
        assert row.stop == "aborted" or len(row.new_ids) == len(whole.token_ids)
    return held


@pytest.mark.parametrize("name", DRAFTERS)
def test_sixty_requests_of_every_kind(pair: tuple[Any, Any], name: str) -> None:
    check_stress(pair, name, 60)


@pytest.mark.slow
@pytest.mark.parametrize("name", DRAFTERS)
def test_a_thousand_requests_of_every_kind(pair: tuple[Any, Any], name: str) -> None:
    held = check_stress(pair, name, 1000, watch=True)
    # The rows themselves are kept by the test: about 2 KB each.
    assert held[-1] - held[2] < 700 * 8_000
