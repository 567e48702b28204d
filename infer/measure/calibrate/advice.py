"""What to do with a calibration: use it, or leave drafting off, by acceptance and by the cost of passes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from draftsmith.infer.costs.pass_costs import Costs
from draftsmith.infer.measure.predicted import expected_length

LENGTHS = (1, 2, 3, 4, 6, 8, 12, 15)


def best_speedup(costs: Costs, acceptance: float, context: int) -> float:
    """The most that chains gain over plain decoding, drafted by the cheapest of the draft's passes.

    Every draft token is taken to be accepted as often as the likeliest candidates, so this is an upper estimate.
    """
    target = costs.passes["target"]
    own = [cost.even(1, 1, context) for name, cost in costs.passes.items() if name != "target"]
    drafting = min(own, default=0.0)
    plain = target.even(1, 1, context) + costs.overhead
    return max(
        expected_length((acceptance,), n) * plain / (n * drafting + target.even(1, n + 1, context) + costs.overhead)
        for n in LENGTHS
    )


def next_steps(report: Mapping[str, Any]) -> Iterator[str]:
    """A line on what pays, and the command that uses these files."""
    useful = []
    for label, one in report["drafters"].items():
        gain = one.get("best_speedup")
        if gain is not None and gain <= 1:
            yield (
                f"{label} does not pay here for one row: {gain:.2f}x at best. Decode without it, or make its passes "
                "cheaper (fewer layers)."
            )
        else:
            useful.append(label)
    if not useful:
        yield "Nothing pays at batch size 1: no drafter is worth its passes on this machine and these prompts."
        return
    target, specs = report.get("target", "TARGET"), report.get("specs", {})
    drafters = ",".join(specs.get(label, label) for label in useful)
    if any(report["drafters"][label].get("best_speedup") is None for label in useful):
        yield "Whether it pays is not known without the cost of passes: give --seconds 60 or more."
    yield (
        f"Use it: draftsmith bench --target {target} --drafters {drafters} --data QUESTIONS --out RUN. It "
        "finds these files by itself, and so does generate."
    )
