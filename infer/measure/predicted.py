"""From accepted_length to speedup, before anything is decoded: what drafts are worth where passes cost so much.

A plain step commits one token; a step with drafts commits accepted_length of them. So

    speedup = accepted_length * t_target(1) / (t_draft + t_target(nodes + 1) + overhead)

and break-even, the accepted_length at which speedup is 1, is the ratio of the two steps' seconds. Rows of one batch are
padded to the largest of their trees: where trees differ in size, the step costs what the largest of as many drawn ones
costs. Plain decoding is given no overhead, so the figures are on the cautious side.

Where an accepted_length comes from (a replay, a curve of acceptance, a wish) is not known here, nor how costs are
measured (infer/costs/pass_costs.py says what they are).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from draftsmith.infer.costs.pass_costs import Costs

BATCH_SIZES = (1, 4, 8, 16, 32)
TARGET = "target"


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds of a plain step and of a step with drafts, both of `batch_size` rows."""

    batch_size: int
    accepted_length: float
    plain_s: float
    step_s: float

    @property
    def break_even(self) -> float:
        """The accepted_length at which drafting is as fast as plain decoding."""
        return self.step_s / self.plain_s

    @property
    def speedup(self) -> float:
        return self.accepted_length / self.break_even

    @property
    def pays(self) -> bool:
        return self.speedup > 1

    def to_json(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "speedup": self.speedup,
            "break_even": self.break_even,
            "pays": self.pays,
            "plain_step_s": self.plain_s,
            "step_s": self.step_s,
        }


def predict(
    costs: Costs,
    batch_size: int,
    *,
    accepted_length: float,
    nodes: int | Sequence[int],
    draft_s: float,
    context: float = 0.0,
) -> Prediction:
    """One batch size.

    Args:
        costs: of this machine, the target's passes among them.
        batch_size: rows per step.
        accepted_length: committed tokens per row and step.
        nodes: of every draft; or those of many, each as likely.
        draft_s: seconds to draft for all rows of a step.
        context: committed tokens of a row.
    """
    if batch_size < 1:
        raise ValueError(f"a batch size is at least 1, not {batch_size}")
    target = costs.of(TARGET)
    sizes = [nodes] if isinstance(nodes, int) else nodes
    verify_s = sum(share * target(batch_size, size + 1, context) for size, share in largest(sizes, batch_size))
    return Prediction(batch_size, accepted_length, target(batch_size, 1, context), draft_s + verify_s + costs.overhead)


def largest(sizes: Sequence[int], draws: int) -> list[tuple[int, float]]:
    """(size, probability that it is the largest of `draws` independent draws from `sizes`), ascending."""
    if not sizes:
        raise ValueError("there is no step to predict anything from")
    ordered = sorted(sizes)
    upto = {size: (place / len(ordered)) ** draws for place, size in enumerate(ordered, start=1)}
    below = 0.0
    found = []
    for size, share in upto.items():
        found.append((size, share - below))
        below = share
    return found


def largest_that_pays(at: Callable[[int], Prediction], upto: int) -> int:
    """The batch size above which drafting is to be off: it pays at 1, 2, ... up to this one. 0: at none."""
    for batch_size in range(1, upto + 1):
        if not at(batch_size).pays:
            return batch_size - 1
    return upto


def measured_rows(costs: Costs, nodes: int) -> int:
    """The largest batch whose passes over `nodes` + 1 tokens a row lie within what was measured; 0: none does."""
    return int(max(costs.of(TARGET).tokens)) // (nodes + 1)
