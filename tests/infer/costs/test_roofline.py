"""Modelled costs are what the figures say: weights over bandwidth, FLOPs over arithmetic, launches, experts."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import yaml

from draftsmith.infer.costs.identity import machine_text, same_machine
from draftsmith.infer.costs.roofline import (
    KERNELS_PER_LAYER,
    NUMBERS,
    MachineFigures,
    Work,
    known_machines,
    load_machine,
    pass_cost,
)

# 1 GB/s and 1 TFLOP/s: a float32 weight takes 4 ns to read and 2 ps to multiply, so the corner is at 2000 tokens.
PLAIN = MachineFigures("plain", "cuda", bandwidth=1e9, flops={"float32": 1e12}, memory=1e12)
WORK = Work(layers=3, itemsize=4, dtype="float32", matrices={1000: 6, 4000: 1}, token_bytes=96, pair_flops=480)
FIELDS = {
    "name": "mine",
    "device": "cuda",
    "bandwidth": 1e9,
    "flops": {"float32": 1e12},
    "memory": 1e10,
    "launch": 0,
    "sources": {"bandwidth": "x", "flops": "x", "memory": "x", "launch": "x"},
}


def test_few_tokens_take_as_long_as_reading_the_weights_and_many_as_long_as_multiplying_them():
    cost = pass_cost(PLAIN, WORK)
    read = 10_000 * 4 / 1e9
    assert cost(1) == cost(64) == pytest.approx(read)
    assert cost(2000) == pytest.approx(read)
    assert cost(4000) == pytest.approx(2 * read)
    assert cost(4000) == pytest.approx(10_000 * 2 * 4000 / 1e12)


def test_each_layer_adds_the_launches_of_its_kernels():
    cost = pass_cost(replace(PLAIN, launch=1e-6), WORK)
    assert cost(1) - pass_cost(PLAIN, WORK)(1) == pytest.approx(3 * KERNELS_PER_LAYER * 1e-6)


def test_context_is_read_once_per_row_and_multiplied_with_each_new_token():
    cost = pass_cost(PLAIN, WORK)
    assert cost.even(2, 5, 100) - cost(10) == pytest.approx(200 * 96 / 1e9 + 1000 * 480 / 1e12)


def test_tokens_read_only_the_experts_that_they_choose():
    experts = replace(WORK, matrices={}, expert_matrices={1000: 3}, experts=8, active=2)
    cost, one = pass_cost(PLAIN, experts), 3 * 1000 * 4 / 1e9
    assert cost(1) == pytest.approx(2 * one)
    assert cost(2) == pytest.approx(8 * (1 - 0.75**2) * one)
    assert cost(256) == pytest.approx(8 * one)
    # All experts together multiply each token twice, not eight times.
    work = 3 * 1000 * 2 * 2
    assert pass_cost(replace(PLAIN, bandwidth=1e15), experts)(4096) == pytest.approx(4096 * work / 1e12)


def test_measured_products_replace_the_roofline_and_a_slower_smaller_pass_is_padded():
    curves = {100: {1: 1e-9, 2: 5e-9, 4: 3e-9}, 10_000: {1: 2e-9, 2: 10e-9, 4: 6e-9}}
    machine = replace(PLAIN, products=curves, layer_s=1e-6, pass_s=5e-6, attention=(1e-9, 1e-12))
    of_100 = pass_cost(machine, replace(WORK, matrices={100: 1}), (1, 2, 4, 8))
    assert np.array(of_100.seconds) - 8e-6 == pytest.approx([1e-7, 3e-7, 3e-7, 6e-7])
    between = pass_cost(machine, replace(WORK, matrices={1000: 1}), (1,))
    assert between(1) - 8e-6 == pytest.approx(1000 * 1.5e-9)
    assert (between.per_seen, between.per_pair) == pytest.approx((96e-9, 480e-12))


@pytest.mark.parametrize("name", list(known_machines()))
def test_every_packaged_figure_has_its_source(name):
    machine = load_machine(name)
    assert set(machine.sources) == {*NUMBERS, "flops"}
    assert all(len(line) > 20 for line in machine.sources.values())
    assert {"bfloat16", "float16", "float32"} <= set(machine.flops)
    facts = machine.describe("bfloat16")
    assert f"modelled on {machine.article}" in machine_text(facts)
    assert not same_machine(facts, facts)


def test_a_machine_comes_from_a_file(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(FIELDS))
    assert pass_cost(load_machine(str(path)), WORK) == pass_cost(PLAIN, WORK)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"bandwidth": "fast"}, "bandwidth: a number above 0"),
        ({"memory": 0}, "memory: a number above 0"),
        ({"launch": -1}, "launch: a number of at least 0"),
        ({"flops": {"float32": None}}, "flops of float32"),
        ({"flops": 3}, "FLOP/s by dtype"),
        ({"sources": {"flops": "x"}}, "no line for bandwidth, launch, memory"),
        ({"price": 3}, "unknown field price"),
        ({"name": ...}, "name missing"),
        ({"device": "tpu"}, "device is cuda or cpu"),
    ],
)
def test_a_wrong_file_is_refused_by_field(tmp_path, change, expected):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in (FIELDS | change).items() if value is not ...}))
    with pytest.raises(ValueError, match=expected):
        load_machine(str(path))


def test_a_dtype_without_a_figure_is_refused():
    with pytest.raises(ValueError, match="no figure for bfloat16, only for float32"):
        pass_cost(PLAIN, replace(WORK, dtype="bfloat16"))
