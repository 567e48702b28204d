"""What a draft of a shape that was not measured would cost: between shapes that were, pass costs add up.

A pass reads a head once and its layers one after another, and every layer costs something whatever its width: so f is
`fixed + per_layer * layers + per_byte * layer bytes + per_head_byte * head bytes` at each number of tokens, and what
the context adds grows with layers and with what a token's keys take. Fitted with no coefficient negative, f relative
to what was measured. It knows sizes and costs, no models.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from draftsmith.infer.costs.pass_costs import PassCost
from draftsmith.infer.costs.timing import non_negative_fit
from draftsmith.infer.measure.plan.shapes import Size

LEAST = 3


def estimate(measured: Sequence[tuple[Size, PassCost]], wanted: Size) -> PassCost:
    """The costs of a shape of size `wanted` from those of at least three others, measured with the same knots."""
    check_enough(len(measured))
    tokens = list(measured[0][1].tokens)
    assert all(list(cost.tokens) == tokens for _, cost in measured), "shapes were measured at different passes"
    sizes = [size for size, _ in measured]
    seconds = [
        _at([cost.seconds[i] for _, cost in measured], [_weights(size) for size in sizes], _weights(wanted))
        for i in range(len(tokens))
    ]
    seen = [_context(size) for size in sizes]
    return PassCost(
        tokens,
        np.maximum.accumulate(seconds).tolist(),
        _at([cost.per_seen for _, cost in measured], seen, _context(wanted), relative=False),
        _at([cost.per_pair for _, cost in measured], seen, _context(wanted), relative=False),
        measured[0][1].buckets,
    )


def check_enough(shapes: int) -> None:
    if shapes < LEAST:
        raise ValueError(f"costs are estimated from {LEAST} measured shapes or more, and there are {shapes}")


def left_out(measured: Sequence[tuple[Size, PassCost]], rows: int, context: int) -> list[float]:
    """The relative error of shapes' one-token passes, each estimated from the others. Left in are shapes without which
    the others could not tell layers, widths and heads apart: nothing is estimated from so little."""
    design_MN = np.array([_weights(size) for size, _ in measured])
    design_MN /= design_MN.max(0, initial=1e-300)
    errors = []
    for i, (size, cost) in enumerate(measured):
        others = [*measured[:i], *measured[i + 1 :]]
        if len(others) < LEAST or _rank(np.delete(design_MN, i, 0)) < _rank(design_MN):
            continue
        errors.append(estimate(others, size)(rows, 1, context) / cost(rows, 1, context) - 1)
    return errors


def _rank(design_MN: np.ndarray) -> int:
    return int(np.linalg.matrix_rank(design_MN, tol=1e-6))


def _weights(size: Size) -> list[float]:
    return [1.0, size.layers, size.layer_bytes, size.head_bytes]


def _context(size: Size) -> list[float]:
    return [size.layers, size.token_bytes]


def _at(
    values: Sequence[float], features: Sequence[Sequence[float]], wanted: Sequence[float], relative: bool = True
) -> float:
    values_M = np.array(values)
    # What the context adds may be told as nothing for one shape, by chance: no share of nothing is to be kept to.
    weight_M = 1.0 / values_M if relative else np.ones(len(values))
    found_N = non_negative_fit(np.array(features) * weight_M[:, None], values_M * weight_M)
    return float(found_N @ np.array(wanted))
