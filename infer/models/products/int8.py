"""Weight-only int8 products for drafts on a CPU: a quarter of a float32 model's weights to read.

Each output's weights are rounded to 255 steps and scaled back after the product, which torch multiplies with bfloat16
activations. A draft in int8 proposes a little differently, and its draft_probs are those of the int8 model, so the
target's text stays what it was. Faster for few tokens only, and not on every processor: `int8: auto` times both, once
for a machine and a draft's shapes, since another outcome in the next run would be other drafts.

Legend: N tokens, I inputs, O outputs.
"""

from __future__ import annotations

import copy
import time
from typing import Any, Literal

import torch

from draftsmith.infer.costs.remembered import choice_path, remember, remembered
from draftsmith.infer.models.layers import weight_bytes
from draftsmith.infer.models.pass_timer import CLEARLY_LESS, SMALL, CachedPassTimer
from draftsmith.infer.models.runner.masks import MaskPlan
from draftsmith.infer.models.runner.model_runner import ModelRunner

Int8 = bool | Literal["auto"]
# Types that auto may replace: a float64 draft was asked for to be exact.
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Timed behind this context, this often after a warm-up.
CONTEXT, TRIES = 64, 5
STEPS = 127
# What a config says that is nothing of a model's shapes.
NAMES = ("_name_or_path", "transformers_version")
# torch's kernels read inputs in blocks without checking (33 inputs give garbage), and outputs in blocks on some
# processors: layers with other numbers of inputs keep their own products, outputs are padded.
INPUTS, OUTPUTS = 32, 32


def chosen(model: Any, plan: MaskPlan, int8: Int8, width: int) -> Any:
    """`model`, or its int8 copy where `int8` says so; auto: where passes over 1 and `width` tokens are faster so."""
    if int8 not in (True, False, "auto"):
        raise ValueError(f"int8 is auto, true or false, not {int8!r}")
    weight = next(model.parameters())
    if int8 is True and weight.device.type != "cpu":
        raise ValueError(f"int8 drafts run on a CPU, and this draft is on {weight.device.type}: leave int8 out")
    if int8 is True:
        return int8_copy(model)
    large = weight_bytes(model) >= SMALL
    if int8 is False or weight.device.type != "cpu" or weight.dtype not in DTYPES or not large:
        return model
    shapes = {name: value for name, value in model.config.to_dict().items() if name not in NAMES}
    attention, dtype = str(model.config._attn_implementation), str(weight.dtype)
    path = choice_path("int8", shapes, attention, weight_bytes(model), dtype, width)
    known = remembered(path).get("faster")
    if not isinstance(known, bool):
        other = int8_copy(model)
        known = is_faster(other, model, plan, width)
        remember(path, {"faster": known})
        return other if known else model
    return int8_copy(model) if known else model


@torch.inference_mode()
def int8_copy(model: Any) -> Any:
    """A copy with int8 products that shares all weights: `model`, which a target may be using, is left as it was."""
    memo: dict[int, Any] = {id(weight): weight for weight in (*model.parameters(), *model.buffers())}
    memo |= {id(own): own for layer in model.modules() if (own := layer.__dict__.get("forward")) is not None}
    made = copy.deepcopy(model, memo)
    linear = [layer for layer in made.modules() if type(layer) is torch.nn.Linear]
    layers: list[Any] = [layer for layer in linear if layer.in_features % INPUTS == 0]
    if not layers:
        raise ValueError(
            f"{model.config.model_type} has no linear layer whose inputs divide by {INPUTS}, as int8 products need: "
            "leave int8 out"
        )
    packed: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for layer in layers:
        if id(layer.weight) not in packed:
            packed[id(layer.weight)] = quantized(layer.weight)
        layer.forward = Int8Product(*packed[id(layer.weight)], layer)
    return made


def quantized(weight_OI: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[O, I] int8, and [O] what each output's steps are worth; outputs are padded to a multiple of OUTPUTS."""
    exact_OI = torch.nn.functional.pad(weight_OI.detach().float(), (0, 0, 0, -weight_OI.shape[0] % OUTPUTS))
    scale_O = (exact_OI.abs().amax(1) / STEPS).to(torch.bfloat16)
    step_O1 = scale_O.float().clamp_min(torch.finfo(torch.float32).tiny)[:, None]
    return (exact_OI / step_O1).round().clamp(-STEPS, STEPS).to(torch.int8), scale_O


class Int8Product:
    """Replaces a linear layer's forward. `saved_bytes`: how many fewer a pass reads than with the layer's weights."""

    def __init__(self, weight_OI: torch.Tensor, scale_O: torch.Tensor, layer: torch.nn.Linear) -> None:
        self.weight_OI, self.scale_O = weight_OI, scale_O
        self.bias_O, self.outputs = layer.bias, layer.out_features
        self.saved_bytes = layer.weight.nbytes - weight_OI.nbytes - scale_O.nbytes

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        x_NI = x.reshape(-1, x.shape[-1]).to(torch.bfloat16).contiguous()
        product_NO = torch.ops.aten._weight_int8pack_mm(x_NI, self.weight_OI, self.scale_O)
        product_NO = product_NO[:, : self.outputs].to(x.dtype)
        if self.bias_O is not None:
            product_NO = product_NO + self.bias_O
        return product_NO.reshape(*x.shape[:-1], -1)


def is_faster(one: Any, other: Any, plan: MaskPlan, width: int) -> bool:
    """Whether passes over 1 and `width` tokens together take clearly less time in `one` than in `other`."""
    timers = [CachedPassTimer(ModelRunner(model, plan)) for model in (one, other)]
    sizes = sorted({1, width})
    best = [[float("inf")] * len(sizes) for _ in timers]
    try:
        for timer in timers:
            timer.place(1, CONTEXT)
        for attempt in range(TRIES + 1):
            for timer, own in zip(timers, best):
                for i, tokens in enumerate(sizes):
                    began = time.perf_counter()
                    timer.run(tokens)
                    if attempt:  # the first round warms up
                        own[i] = min(own[i], time.perf_counter() - began)
    finally:
        for timer in timers:
            timer.close()
    return sum(best[0]) < CLEARLY_LESS * sum(best[1])
