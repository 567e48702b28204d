"""Rows of uneven length take what they hold; what is shared is held once; what is stored survives every move."""

from __future__ import annotations

import random
from itertools import pairwise
from typing import Any

import pytest
import torch
from planted import plant

from draftsmith.infer.models.architectures import prepare
from draftsmith.infer.models.runner.arena import IDLE_SLOTS, SCRATCH, Arena, Region
from draftsmith.infer.models.runner.entries import Entries
from draftsmith.infer.models.runner.model_runner import ModelRunner


def stored(arena: Arena, region: Region, count: int) -> torch.Tensor:
    return arena.keys[0][0, region.start : region.start + count, 0]


@torch.inference_mode()
def check_storage() -> None:
    """Rows come, grow, share a prefix and leave; what each holds stays what was written."""
    rng = random.Random(0)
    arena, held = Arena(), dict[Region, list[float]]()
    written = 0.0
    for _ in range(300):
        action = rng.random()
        if action < 0.2 or not held:
            held[new_one := arena.region()] = []
            arena.ensure({new_one: rng.randrange(1, 60)})
        elif action < 0.3:
            arena.release(gone := rng.choice(list(held)))
            del held[gone]
        elif action < 0.35:
            source = rng.choice(list(held))
            if len(held[source]) > 1:
                at = len(held[source]) // 2
                head = arena.split(source, at)
                held[head], held[source] = held[source][:at], held[source][at:]
        else:
            growing = [one for one in rng.sample(list(held), rng.randrange(1, len(held) + 1)) if not one.fixed]
            new = {region: rng.randrange(1, 40) for region in growing}
            if not new:
                continue
            arena.ensure({region: len(held[region]) + count for region, count in new.items()})
            slots = [region.start + len(held[region]) + i for region, count in new.items() for i in range(count)]
            values = [written + i for i in range(len(slots))]
            written += len(slots)
            run = slots == list(range(slots[0], slots[0] + len(slots)))
            arena.begin(slots[0], len(slots), None if run else torch.tensor(slots))
            block = torch.tensor(values, dtype=torch.float64).view(1, 1, -1, 1)
            arena.update(block, -block, 0)
            arena.put_states(0, block[0, 0])
            assert torch.equal(arena.states_now(0), block[0, 0])
            at = 0
            for region, count in new.items():
                held[region] += values[at : at + count]
                at += count
        taken = sorted((region.start, region.start + region.size) for region in held if region.size)
        assert all(end <= start for (_, end), (start, _) in pairwise(taken)), "regions overlap"
        assert not taken or (taken[0][0] >= SCRATCH and taken[-1][1] <= arena.size)
        for region, values in held.items():
            if values:
                assert stored(arena, region, len(values)).tolist() == values
                assert arena.states[0][region.start : region.start + len(values), 0].tolist() == values
    assert arena.moved > 10
    for region in list(held):
        arena.release(region)
    assert arena.size <= SCRATCH + IDLE_SLOTS


def test_what_is_stored_survives_any_rows_that_come_grow_and_leave() -> None:
    check_storage()


@pytest.mark.parametrize(
    ("method", "sound", "fault"),
    [
        ("_settle", "copy_(old.narrow", "copy_(old.flip(dim).narrow"),
        ("_settle", "(self.values, 1), (self.states, 0)", "(self.values, 1)"),
        ("_lay_out", "end += size", "end += size - 1"),
        ("_place", "start - end >= wanted", "start - end >= wanted // 2"),
        ("split", "region.start + at, region.size - at", "region.start, region.size - at"),
        ("_write", "self._slots_N, new", "self._slots_N.flip(0), new"),
    ],
)
def test_planted_fault_of_storage_is_caught(
    monkeypatch: pytest.MonkeyPatch, method: str, sound: str, fault: str
) -> None:
    plant(monkeypatch, Arena, method, sound, fault)
    with pytest.raises((AssertionError, RuntimeError)):
        check_storage()


def test_uneven_rows_take_at_most_a_quarter_more_than_they_hold(make_model: Any) -> None:
    model = make_model("llama", max_position_embeddings=8192)
    lm = ModelRunner(model, prepare(model))
    rng = random.Random(1)
    lengths = {row: rng.choice([60, 150, 400, 900, 2000]) for row in range(16)}
    for row, length in lengths.items():
        lm.open(row, length)
    lm.prefill(list(lengths), [[3] * length for length in lengths.values()])
    slot_bytes = 2 * 2 * 2 * 8 * lm.dtype.itemsize  # keys and values, layers, heads, head size
    worst = 0.0
    for step in range(120):
        rows = list(lengths)
        sizes = [1 + rng.randrange(8) for _ in rows]
        lm.forward(rows, [Entries([5] * size, [-1] * size) for size in sizes])
        holds = sum(lm.length(row) + lm.uncommitted(row) for row in rows)
        worst = max(worst, lm.cache.nbytes() / (slot_bytes * holds))
        lm.commit(rows, [[0]] * len(rows))
        if step % 10 == 9:  # one leaves, and another comes
            leaving = rng.choice(rows)
            lm.close(leaving)
            del lengths[leaving]
            lengths[100 + step] = rng.choice([60, 400, 2000])
            lm.open(100 + step, lengths[100 + step])
            lm.prefill([100 + step], [[3] * lengths[100 + step]])
    assert 1.0 <= worst <= 1.25
    assert lm.cache.moved >= 3


def test_a_shared_prefix_is_held_once(make_model: Any) -> None:
    model = make_model("llama", max_position_embeddings=4096)
    lm = ModelRunner(model, prepare(model))
    lm.open("first", 1000)
    prompt = [3 + i % 50 for i in range(1000)]
    lm.prefill(["first"], [prompt])
    alone = lm.cache.nbytes()
    others = list(range(9))
    for row in others:
        lm.fork("first", row, 1000)
    rows = ["first", *others]
    found = [lm.forward(rows, [Entries.chain([3 + i]) for i, _ in enumerate(rows)]).logits_NV]
    lm.commit(rows, [[0]] * 10)
    assert lm.cache.nbytes() < 1.25 * alone
    lm.close("first")  # the others go on reading what it wrote
    found.append(lm.forward(others, [Entries.chain([9])] * 9).logits_NV)
    for i, row in enumerate(rows):
        with torch.inference_mode():
            wanted = model(torch.tensor([[*prompt, 3 + i, 9]])).logits[0, -2:]
        torch.testing.assert_close(found[0][i], wanted[0], rtol=0, atol=1e-9)
        if row != "first":
            torch.testing.assert_close(found[1][i - 1], wanted[1], rtol=0, atol=1e-9)
    lm.drop(others)
    # A row that goes on from the middle of what others share, and one from behind it.
    lm.fork(0, "early", 500)
    lm.fork(0, "late", 1001)
    assert lm.cache.nbytes() < 1.25 * alone
    found.append(lm.forward(["late", 3, "early"], [Entries.chain([9])] * 3).logits_NV)
    with torch.inference_mode():
        wanted = [model(torch.tensor([[*ids, 9]])).logits[0, -1] for ids in ([*prompt, 4], [*prompt, 7], prompt[:500])]
    torch.testing.assert_close(found[2], torch.stack(wanted), rtol=0, atol=1e-9)
    for row in [*others, "late", "early"]:
        lm.close(row)
    assert lm.cache.nbytes() <= alone


@pytest.mark.parametrize("context", [600, 1200])
def test_a_pass_allocates_the_same_whatever_the_context(make_model: Any, context: int) -> None:
    """Of a tree of 16 nodes: no mask, no expanded heads, no copy of keys or values as long as the context."""
    model = make_model("llama", max_position_embeddings=4096)
    lm = ModelRunner(model, prepare(model))
    lm.open("a", context + 64)
    lm.prefill(["a"], [[3] * context])

    def largest(tokens: int) -> int:
        with torch.profiler.profile(profile_memory=True) as profile:
            lm.forward(["a"], [Entries([5] * tokens, [-1] * tokens)])
        lm.drop(["a"])
        return sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())

    first = largest(16)
    assert first == largest(16)
    lm.prefill(["a"], [[3] * context])
    largest(16)  # the region may have moved
    assert largest(16) == first


@torch.inference_mode()
def test_a_lasting_arena_keeps_what_is_stored_and_where_its_buffers_lie() -> None:
    rng = random.Random(3)
    arena, held = Arena(lasting=True), dict[Region, list[float]]()
    written, generations, moved_within = 0.0, set[int](), 0
    for _ in range(300):
        if rng.random() < 0.2 or not held:
            held[new := arena.region()] = []
            arena.ensure({new: rng.randrange(1, 60)})
        elif rng.random() < 0.25 and len(held) > 2:
            arena.release(gone := rng.choice(list(held)))
            del held[gone]
        else:
            region = rng.choice(list(held))
            values = [written + i for i in range(rng.randrange(1, 40))]
            written += len(values)
            before, generation = region.start, arena.generation
            arena.ensure({region: len(held[region]) + len(values)})
            moved_within += region.start != before and bool(held[region]) and generation == arena.generation
            arena.begin(region.start + len(held[region]), len(values))
            block = torch.tensor(values, dtype=torch.float64).view(1, 1, -1, 1) + 1
            arena.update(block, -block, 0)
            held[region] += values
        generations.add(arena.generation)
        assert arena.size & (arena.size - 1) == 0 or (arena.size - 1) & (arena.size - 2) == 0
        taken = sorted((one.start, one.start + one.size) for one in held if one.size)
        assert all(end <= start for (_, end), (start, _) in pairwise(taken)), "regions overlap"
        for one, values in held.items():
            if values:
                assert (arena.keys[0][0, one.start : one.start + len(values), 0] - 1).tolist() == values
    assert moved_within >= 3
    assert len(generations) <= 12
    for region in list(held):
        before = region.start, region.size
        arena.release(region)
        assert not arena.keys[0][0, before[0] : before[0] + before[1]].any(), "a row left something behind"
