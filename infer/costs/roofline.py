"""Modelled pass costs: a roofline from a model's matrices and a machine's bandwidth, arithmetic and launch overhead.

A matrix product takes the longer of reading the weights and multiplying them with all tokens; every kernel adds its
launch; attention reads the cache of each committed token and multiplies it with each new one. A machine that was
measured has `products` instead of the first: seconds per weight by size of the matrix and number of tokens.

In layers of experts, n tokens that each choose k of E experts at random read E * (1 - (1 - k/E)^n) of them.

Legend: P points (numbers of tokens).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from draftsmith.infer.costs.pass_costs import PassCost
from draftsmith.infer.files.errors import first_line

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
# Kernels of a layer as transformers writes it: two norms, seven products, rotation, cache, attention, activation, sums.
KERNELS_PER_LAYER = 40
CPU = "cpu"
# The share of a machine's arithmetic that training is taken to reach.
TRAINING_SHARE = 0.4
NUMBERS = ("bandwidth", "memory", "launch")


@dataclass(frozen=True, slots=True)
class MachineFigures:
    """`flops` by dtype. `launch`: seconds per kernel; `layer` and `pass_s`: what a layer and a pass add, where they
    were measured. `products`: weights of a matrix -> tokens -> seconds per weight, of one dtype. `attention`: seconds
    per byte of cache and per FLOP, where they were measured."""

    name: str
    device: str
    bandwidth: float
    flops: Mapping[str, float]
    memory: float
    launch: float = 0.0
    article: str = ""
    sources: Mapping[str, str] = field(default_factory=dict)
    layer_s: float = 0.0
    pass_s: float = 0.0
    products: Mapping[int, Mapping[int, float]] = field(default_factory=dict)
    attention: tuple[float, float] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def rate(self, dtype: str) -> float:
        if dtype not in self.flops:
            known = ", ".join(self.flops)
            raise ValueError(
                f"{self.name} has no figure for {dtype}, only for {known}: give --dtype, or add it to a file"
            )
        return self.flops[dtype]

    def product_s(self, weights: int, itemsize: int, dtype: str, tokens_P: np.ndarray) -> np.ndarray:
        """[P] seconds of multiplying tokens with one matrix of this many weights."""
        if not self.products:
            return weights * np.maximum(itemsize / self.bandwidth, 2 * tokens_P / self.rate(dtype))
        sizes = sorted(self.products)
        curves = [
            np.interp(
                tokens_P, sorted(self.products[size]), [self.products[size][n] for n in sorted(self.products[size])]
            )
            * np.maximum(1.0, tokens_P / max(self.products[size]))
            for size in sizes
        ]
        place = float(np.interp(math.log(weights), [math.log(size) for size in sizes], range(len(sizes))))
        low = min(int(place), len(sizes) - 1)
        high, share = min(low + 1, len(sizes) - 1), place - low
        found_P: np.ndarray = weights * (curves[low] * (1 - share) + curves[high] * share)
        return found_P

    def describe(self, dtype: str) -> dict[str, Any]:
        """The `machine` of modelled costs, with the figures that they were modelled from."""
        figures = {"bandwidth": self.bandwidth, "flops": dict(self.flops), "memory": self.memory, "launch": self.launch}
        return {
            "device": self.device,
            "name": self.name,
            "article": self.article or f"a {self.name}",
            "dtype": dtype,
            **self.facts,
            "modelled": True,
            "figures": figures,
            "sources": dict(self.sources),
        }


@dataclass(frozen=True, slots=True)
class Work:
    """What a pass of a model multiplies and reads.

    `matrices`: weights of a matrix -> how many there are, head included, experts not. `expert_matrices`: the same for
    one expert of every layer; each token uses `active` of `experts`. `token_bytes`: cache of a token; `pair_flops`: of
    a new token attending to a committed one.
    """

    layers: int
    itemsize: int
    dtype: str
    matrices: Mapping[int, int]
    token_bytes: int
    pair_flops: int
    expert_matrices: Mapping[int, int] = field(default_factory=dict)
    experts: int = 0
    active: int = 0


def pass_cost(machine: MachineFigures, work: Work, tokens: Sequence[int] = TOKENS) -> PassCost:
    """The modelled costs of a model's passes."""
    if not machine.products:
        # The corner of the roofline, between whose sides costs are linear.
        corner = machine.rate(work.dtype) * work.itemsize / (2 * machine.bandwidth)
        tokens = sorted({*tokens, max(1, round(corner))})
    tokens_P = np.array(tokens, float)
    seconds_P = np.full(
        len(tokens), machine.pass_s + work.layers * (machine.layer_s + KERNELS_PER_LAYER * machine.launch)
    )
    for weights, count in work.matrices.items():
        seconds_P += count * machine.product_s(weights, work.itemsize, work.dtype, tokens_P)
    if work.experts:
        share = work.active / work.experts
        used_P = work.experts * (1 - (1 - share) ** tokens_P)
        each_P = tokens_P * work.active / used_P
        for weights, count in work.expert_matrices.items():
            seconds_P += count * used_P * machine.product_s(weights, work.itemsize, work.dtype, each_P)
    if machine.attention:
        per_byte, per_flop = machine.attention
    else:
        per_byte, per_flop = 1 / machine.bandwidth, 1 / machine.rate(work.dtype)
    # A pass is padded where more tokens are faster.
    seconds_P = np.minimum.accumulate(seconds_P[::-1])[::-1]
    return PassCost(list(tokens), seconds_P.tolist(), per_byte * work.token_bytes, per_flop * work.pair_flops)


def known_machines() -> dict[str, dict[str, Any]]:
    text = files("draftsmith.infer.costs").joinpath("machines.yaml").read_text(encoding="utf-8")
    found: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return found


def load_machine(name: str) -> MachineFigures:
    """A packaged machine by its name, or a YAML file with the same fields; not `cpu`, which is measured."""
    known = known_machines()
    if name in known:
        return _machine(known[name], name)
    path = Path(name).expanduser()
    if path.suffix not in (".yaml", ".yml"):
        raise ValueError(f"unknown machine {name!r}: {', '.join(known)}, {CPU} (this one), or a file FILE.yaml")
    if not path.is_file():
        raise ValueError(f"{name} does not exist: --machine takes {', '.join(known)}, {CPU} or a file")
    try:
        value = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as problem:
        raise ValueError(f"{name} is no YAML: {first_line(problem)}") from problem
    return _machine(value, str(path))


def _machine(value: Any, where: str) -> MachineFigures:
    """Check every field, since people write these files."""
    if not isinstance(value, dict):
        raise ValueError(f"{where}: a machine has the fields name, device, bandwidth, flops, memory, launch, sources")
    needed = {"name", "device", "bandwidth", "flops", "memory", "launch", "sources"}
    if missing := sorted(needed - set(value)):
        raise ValueError(f"{where}: {', '.join(missing)} missing")
    if unknown := sorted(set(value) - needed - {"article"}):
        raise ValueError(
            f"{where}: unknown field {', '.join(map(str, unknown))}; there are {', '.join(sorted(needed))}"
        )
    if value["device"] not in ("cuda", CPU):
        raise ValueError(f"{where}: device is cuda or cpu, not {value['device']!r}")
    numbers = {key: _number(value[key], f"{where}: {key}", zero=key == "launch") for key in NUMBERS}
    if not isinstance(value["flops"], dict) or not value["flops"]:
        raise ValueError(f"{where}: flops are FLOP/s by dtype, such as {{bfloat16: 312e+12}}")
    flops = {str(dtype): _number(rate, f"{where}: flops of {dtype}") for dtype, rate in value["flops"].items()}
    sources = value["sources"]
    without = sorted({*NUMBERS, "flops"} - set(sources if isinstance(sources, dict) else ()))
    if without:
        raise ValueError(f"{where}: sources has no line for {', '.join(without)}")
    return MachineFigures(
        name=str(value["name"]),
        device=str(value["device"]),
        article=str(value.get("article", "")),
        flops=flops,
        sources={str(key): str(line) for key, line in sources.items()},
        bandwidth=numbers["bandwidth"],
        memory=numbers["memory"],
        launch=numbers["launch"],
    )


def _number(value: Any, where: str, zero: bool = False) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number) or number < 0 or (number == 0 and not zero):
        raise ValueError(f"{where}: a number {'of at least' if zero else 'above'} 0 is needed, not {value!r}")
    return number
