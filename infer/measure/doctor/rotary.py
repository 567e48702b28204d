"""Checks of rotary position embeddings: their frequencies, and the order of the rows of queries and keys.

transformers rotates the first half of a head against its second half; others rotate neighbours. Weights that were not
reordered on the way load without complaint, and attend to the wrong positions.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from draftsmith.infer.measure.doctor.finding import Finding
from draftsmith.infer.measure.doctor.weights import ROUNDING, Mend, MendTried, best_of, difference
from draftsmith.infer.models.layers import head_size

CHECK = "rotary"
# The usual bases, to be tried in place of a draft's own.
BASES = (10_000.0, 500_000.0, 1_000_000.0)
MEND = "reorder the rows of q_proj and k_proj within each head, as transformers' conversion scripts do"
# How the rows of a head are mended: by what they were not converted from, and to.
ORDERS = {
    "neighbours, not as halves": lambda rows: rows.unflatten(1, (-1, 2)).transpose(1, 2).flatten(1, 2),
    "halves of halves: converted twice": lambda rows: rows.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2),
}  # fmt: skip


def check_rotary(
    model: Any, config: Any, reference: Any | None, target_config: Any, trials: Sequence[MendTried]
) -> Finding:
    """`reference`: its model. `trials`: of bases and orders, where there is no reference."""
    own = rope_of(config)
    if not own:
        return Finding.ok(CHECK, "it has no rotary embedding")
    if reference is not None:
        wanted = rope_of(reference.config.get_text_config())
        if own != wanted:
            return Finding.wrong(
                CHECK,
                f"{shown(own)}, and the reference {shown(wanted)}",
                "copy rope_parameters of the reference's config",
            )
        return _order(model, reference) or Finding.ok(CHECK, f"{shown(own)}, and queries and keys, as the reference's")
    if (trial := best_of(trials)) is not None:
        return trial.finding(CHECK)
    theirs = rope_of(target_config)
    as_target = "the target's" if own == theirs else f"the target has {shown(theirs)}"
    if not trials:
        return Finding.unknown(CHECK, f"{shown(own)} ({as_target}); no fault could be tried", "give --reference")
    return Finding.ok(CHECK, f"{shown(own)} ({as_target}); {len(trials)} faults tried, none there")


def rope_of(config: Any) -> dict[str, Any]:
    """The rotary parameters of a text config; empty if it has none."""
    return dict(getattr(config, "rope_parameters", None) or {})


def shown(rope: dict[str, Any]) -> str:
    if not rope:
        return "no rope_parameters"
    if "rope_theta" not in rope:
        return f"rope_parameters of {', '.join(map(str, rope))}"
    scaled = "" if rope.get("rope_type", "default") == "default" else f" ({rope['rope_type']})"
    return f"rope_theta {rope['rope_theta']:g}{scaled}"


def suspects(model: Any, config: Any, bases: Sequence[float]) -> list[tuple[str, str, Mend]]:
    """What may be wrong, its mend, and the mend in memory. `bases`: of the target, to be tried as well."""
    found: list[tuple[str, str, Mend]] = []
    rope = rope_of(config)
    own = rope.get("rope_theta")
    if isinstance(own, int | float) and own > 1 and rope.get("rope_type", "default") == "default" and turning(model):
        for base in dict.fromkeys([*bases, *BASES]):
            if base != own:
                what = f"rope_theta {own:g}, where {base:g} fits"
                mend = f"write rope_theta {base:g} into config.json, if it was trained so"
                found.append((what, mend, partial(with_base, model, float(own), base)))
    if projections(model) and float(rope.get("partial_rotary_factor") or 1.0) == 1.0:
        for order in ORDERS:
            what = f"queries and keys are stored as {order}"
            found.append((what, MEND, partial(reordered, model, config, order)))
    return found


def projections(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The projections of queries and keys, where they are matrices of their own."""
    return [
        (name, one)
        for name, one in model.named_modules()
        if name.endswith(("q_proj", "k_proj")) and isinstance(one, nn.Linear)
    ]


@contextlib.contextmanager
def reordered(model: nn.Module, config: Any, order: str) -> Iterator[None]:
    """Inside, the rows of queries and keys are reordered within each head."""
    held = [(one, parameter, parameter.data) for _, one in projections(model) for parameter in one.parameters()]
    width = head_size(config)
    try:
        for _, parameter, before in held:
            parameter.data = in_order(before, width, order)
        yield
    finally:
        for _, parameter, before in held:
            parameter.data = before


def in_order(weight: torch.Tensor, width: int, order: str) -> torch.Tensor:
    """The rows of a projection, or its bias, mended from `order`; `width`: of a head."""
    by_head = weight.unflatten(0, (-1, width))
    return ORDERS[order](by_head).flatten(0, 1).contiguous()


@contextlib.contextmanager
def with_base(model: nn.Module, own: float, base: float) -> Iterator[None]:
    """Inside, positions rotate by frequencies of another base."""
    held = [(module, module.inv_freq) for module in turning(model)]
    try:
        for module, before in held:
            module.inv_freq = before ** (math.log(base) / math.log(own))
        yield
    finally:
        for module, before in held:
            module.inv_freq = before


def turning(model: nn.Module) -> list[Any]:
    """The modules that hold frequencies of rotations."""
    return [module for module in model.modules() if "inv_freq" in module._buffers]


def _order(model: Any, reference: Any) -> Finding | None:
    """Whether queries and keys are the reference's in another order, or other ones; None if they are the same."""
    width, theirs = head_size(model.config.get_text_config()), dict(projections(reference))
    for name, one in projections(model):
        if name not in theirs or theirs[name].weight.shape != one.weight.shape:
            continue
        wanted = theirs[name].weight
        if difference(one.weight, wanted) <= ROUNDING:
            continue
        for order in ORDERS:
            if difference(in_order(one.weight.data, width, order), wanted) <= ROUNDING:
                return Finding.wrong(CHECK, f"{name} is the reference's, stored as {order}", MEND)
        mine, other = (torch.sort(weight.detach().float().sum(1)).values for weight in (one.weight, wanted))
        if torch.allclose(mine, other, atol=1e-3):
            return Finding.wrong(CHECK, f"{name} has the reference's rows in another order", MEND)
        return Finding.unknown(CHECK, f"{name} differs from the reference's")
    return None
