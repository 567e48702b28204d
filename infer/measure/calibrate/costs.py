"""What passes cost on this machine, for calibration: the target's, and those of every drafter that lends its
pass_timers.

A drafter that runs passes says so by `pass_timers()`: name -> lab (measure/latency.py). All are timed next to one
another, so that their ratios hold on a busy machine. What drafters are is not known here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from draftsmith.infer.contract.protocols import Drafter, PassTimer, Target
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.costs.pass_costs import Costs
from draftsmith.infer.costs.timing import PassShape, fit, grid, left_out, machine, measure_together
from draftsmith.infer.engine.generate import generate
from draftsmith.infer.measure.calibrate.answers import Answered

ROWS = (1, 4)
TREE, BLOCK = (1, 2, 4, 8, 16, 32, 64), (1, 2, 4, 8, 16)
CONTEXTS = (64, 512)
# Steps for the time outside passes.
STEPS_OF, STEPS = 3, 24


def measure_costs(
    target: Target, drafters: Mapping[str, Drafter], answers: Sequence[Answered], *, seconds: float
) -> dict[str, tuple[Costs, dict[str, Any]]]:
    """Per drafter its costs, the target's passes among them, and how well the formula says passes that it was not
    fitted to. `seconds`: the time that the passes may take together."""
    pass_timers = {("", name): lab for name, lab in target.pass_timers().items()}
    for label, drafter in drafters.items():
        pass_timers |= {(label, name): lab for name, lab in drafter.pass_timers().items()}
    asks = {place: _asks(BLOCK if place[0] else TREE, target.max_positions) for place in pass_timers}
    jobs: dict[str, tuple[PassTimer, Sequence[PassShape]]] = {
        _key(*place): (lab, asks[place]) for place, lab in pass_timers.items()
    }
    points = measure_together(jobs, seconds=seconds)
    passes, errors = {}, {}
    for place, lab in pass_timers.items():
        passes[place] = fit(points[_key(*place)], lab.buckets)
        errors[place] = median(abs(error) for error in left_out(points[_key(*place)], lab.buckets))
    assert target.model is not None
    weight = next(target.model.parameters())
    here = machine(weight.device, weight.dtype)
    found = {}
    for label, drafter in drafters.items():
        own = [place for place in pass_timers if place[0] in ("", label)]
        costs = Costs({name: passes[_, name] for _, name in own}, overhead(target, drafter, answers), here)
        found[label] = (costs, {name: errors[_, name] for _, name in own})
    return found


def overhead(target: Target, drafter: Drafter, answers: Sequence[Answered]) -> float:
    """Seconds of a step outside all passes, one row at a time: the median over a few greedy answers."""
    seconds = []
    for one in answers[:STEPS_OF]:
        row = Row(one.key, list(one.prompt), Settings(), Stops(STEPS), target.tokenizer)
        for trace in generate(target, drafter, [row])[0].traces:
            seconds.append(trace.seconds - trace.target_forward_s - trace.draft_forward_s)
    return max(median(seconds), 0.0)


def _asks(tokens: Sequence[int], room: int) -> list[PassShape]:
    """One row in detail; several only as far as to tell their share."""
    contexts = [context for context in CONTEXTS if context + max(tokens) < room] or [1]
    asks = {*grid(ROWS[:1], tokens, contexts), *grid(ROWS[1:], tokens[::2], contexts)}
    return sorted(asks, key=lambda ask: (ask.rows * ask.tokens, ask.context, ask.rows))


def _key(label: str, name: str) -> str:
    return f"{label}/{name}"
