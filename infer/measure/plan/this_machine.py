"""The constants of this machine's CPU for modelled passes, measured in seconds: products, attention, a layer's calls.

Weights are read from memory in a pass, so each size of matrix is multiplied in a group that exceeds the caches.

Legend: T tokens, I inputs, O outputs, H heads, K cached tokens, D head size.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from draftsmith.infer.costs.identity import machine
from draftsmith.infer.costs.roofline import CPU, MachineFigures
from draftsmith.infer.costs.timing import Clock, PassShape, visit
from draftsmith.infer.measure.plan.shapes import CandidateShape, random_model, shaped_config
from draftsmith.infer.models.architectures import prepare
from draftsmith.infer.models.layers import head_size
from draftsmith.infer.models.pass_timer import CachedPassTimer
from draftsmith.infer.models.products.prepack import total_memory
from draftsmith.infer.models.products.replace import replace_products
from draftsmith.infer.models.runner.attention import Shaping, attend_piece
from draftsmith.infer.models.runner.model_runner import ModelRunner

# Inputs and outputs of the matrices that are multiplied, and the bytes of a group.
MATRICES = ((256, 256), (512, 512), (1024, 1024), (1024, 2816), (1024, 16384))
GROUP_BYTES = 96 << 20
TOKENS = (1, 2, 4, 8, 16, 32, 64)
TRIES = 5
# Layers of the two small models whose difference is what a layer's calls take.
FEW, MANY = 2, 10
CACHED, HEADS, QUERIES = 4096, 8, (1, 16)
SOURCE = "measured here"


def this_machine(
    config: Any, dtype: torch.dtype, clock: Clock = time.perf_counter, group_bytes: int = GROUP_BYTES
) -> MachineFigures:
    """This CPU, for models of the family of `config`."""
    kind = str(dtype).removeprefix("torch.")
    products = {
        inputs * outputs: products_s(inputs, outputs, dtype, clock, group_bytes) for inputs, outputs in MATRICES
    }
    layer_s, pass_s = calls_s(config, dtype, clock)
    large = products[max(products)]
    facts = machine(torch.device(CPU), dtype)
    bandwidth = dtype.itemsize / min(curve[1] for curve in products.values())
    return MachineFigures(
        name=facts["name"],
        article="this CPU",
        device=CPU,
        bandwidth=bandwidth,
        flops={kind: 2 * max(TOKENS) / large[max(TOKENS)]},
        memory=float(total_memory()),
        layer_s=layer_s,
        pass_s=pass_s,
        products=products,
        attention=attention_s(head_size(config.get_text_config()), dtype, clock),
        facts={key: facts[key] for key in ("cores", "threads", "torch")},
        sources=dict.fromkeys(("bandwidth", "flops", "memory", "launch"), SOURCE),
    )


@torch.inference_mode()
def products_s(
    inputs: int, outputs: int, dtype: torch.dtype, clock: Clock, group_bytes: int = GROUP_BYTES
) -> dict[int, float]:
    """Seconds per weight of multiplying each of TOKENS with a matrix, as the layers of a loaded model do."""
    count = max(1, group_bytes // (inputs * outputs * dtype.itemsize))
    layers = torch.nn.ModuleList(torch.nn.Linear(inputs, outputs, bias=False, dtype=dtype) for _ in range(count))
    replace_products(layers)
    found = {}
    for tokens in TOKENS:
        x_TI = torch.ones((tokens, inputs), dtype=dtype)

        def run(x_TI: torch.Tensor = x_TI) -> None:
            for layer in layers:
                layer(x_TI)

        found[tokens] = seconds_of(run, clock) / (count * inputs * outputs)
    return found


def calls_s(config: Any, dtype: torch.dtype, clock: Clock) -> tuple[float, float]:
    """Seconds that a layer and a pass take beside products: those of one-token passes of narrow models."""
    size = head_size(config.get_text_config())
    seconds = {}
    for layers in (FEW, MANY):
        model = random_model(shaped_config(config, CandidateShape(layers, size)), dtype, torch.device(CPU))
        timer = CachedPassTimer(ModelRunner(model, prepare(model)))
        seconds[layers] = median(visit(timer, PassShape(1, 1, 0), clock) for _ in range(2 * TRIES))
        timer.close()
    layer_s = max(0.0, (seconds[MANY] - seconds[FEW]) / (MANY - FEW))
    return layer_s, max(0.0, seconds[FEW] - FEW * layer_s)


@torch.inference_mode()
def attention_s(size: int, dtype: torch.dtype, clock: Clock) -> tuple[float, float]:
    """Seconds per byte of cache and per FLOP of attending to it."""
    keys, values = (torch.randn((HEADS, CACHED, size)).to(dtype) for _ in range(2))
    seconds = []
    for queries in QUERIES:
        query = torch.randn((HEADS, queries, size)).to(dtype)

        def run(query: torch.Tensor = query) -> None:
            for _ in range(4):
                attend_piece(query, keys, values, None, Shaping(size**-0.5))

        seconds.append(seconds_of(run, clock) / 4)
    each = max(0.0, (seconds[1] - seconds[0]) / (QUERIES[1] - QUERIES[0]))
    flops = 4 * HEADS * size * CACHED
    per_byte = max(0.0, seconds[0] - each) / (keys.nbytes + values.nbytes)
    return per_byte, each / flops


def seconds_of(run: Callable[[], None], clock: Clock) -> float:
    """The median, after a first call that warms up."""
    taken = []
    for _ in range(TRIES + 1):
        began = clock()
        run()
        taken.append(clock() - began)
    return median(taken[1:])
