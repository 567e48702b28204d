"""Measured costs of the target's passes and of the drafters', and the time of a step outside them.

All passes are timed interleaved, so that their ratios hold on a busy machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from statistics import fmean, median
from typing import Any

from draftsmith.infer.contract.draft import Draft
from draftsmith.infer.contract.protocols import Budget, Drafter, Target, Verdict, ranks_of
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.contract.trace import StepTrace
from draftsmith.infer.costs.identity import TargetIdentity, machine
from draftsmith.infer.costs.pass_costs import Costs, PassCost
from draftsmith.infer.costs.policy import Policy
from draftsmith.infer.costs.timing import PassShape, fit, grid, left_out, measure_together
from draftsmith.infer.drafters.controls import Empty
from draftsmith.infer.engine.engine import BUDGET, Engine
from draftsmith.infer.measure.calibrate.answers import Answered
from draftsmith.infer.text.tokenizer import tokenizer_fingerprint

ROWS = (1, 4)
TREE, BLOCK = (1, 2, 4, 8, 16, 32, 64), (1, 2, 4, 8, 16)
CONTEXTS = (64, 512)
# Answers, and tokens of each, that the time outside passes is taken from.
STEPS_OF, STEPS = 3, 24
# How far these steps draft: about where drafting one token more is a close call.
DEPTH = 3
# The share of these steps, fastest first, that the mean time of a proposal is taken from.
COUNTED = 0.95


def measure_costs(
    target: Target, drafters: Mapping[str, Drafter], answers: Sequence[Answered], *, seconds: float, name: str = ""
) -> dict[str, tuple[Costs, dict[str, Any]]]:
    """Per drafter: its costs, the target's passes included, and the median error of the fit on passes left out of it.

    `seconds`: the time that all passes may take together. `name`: the target's, as it was loaded.
    """
    timers = {("", name): timer for name, timer in target.pass_timers().items()}
    for label, drafter in drafters.items():
        timers |= {(label, name): timer for name, timer in drafter.pass_timers().items()}
    jobs = {
        "/".join(place): (timer, _shapes(BLOCK if place[0] else TREE, timer.max_positions))
        for place, timer in timers.items()
    }
    points = measure_together(jobs, seconds=seconds)
    passes, errors = {}, {}
    for place, timer in timers.items():
        timed = points["/".join(place)]
        passes[place] = fit(timed, timer.buckets)
        errors[place] = median(abs(error) for error in left_out(timed, timer.buckets))
    assert target.model is not None
    weight = next(target.model.parameters())
    here = machine(weight.device, weight.dtype, ranks_of(target))
    tokenizer = tokenizer_fingerprint(target.tokenizer) if target.tokenizer is not None else ""
    identity = TargetIdentity.of(name, target, tokenizer)
    found, idle = {}, overhead(target, answers)
    for label, drafter in drafters.items():
        own = [place for place in timers if place[0] in ("", label)]
        costs = Costs({place[1]: passes[place] for place in own}, idle, here, identity)
        if drafter.pass_timers():
            more = around(target, drafter, answers, costs)
            slower = {name: cost if name == "target" else _slower(cost, more) for name, cost in costs.passes.items()}
            costs = replace(costs, passes=slower, asking=asking(target, drafter, answers, _never_pays(costs)))
        else:
            costs = replace(costs, asking=asking(target, drafter, answers, costs))
        found[label] = (costs, {place[1]: errors[place] for place in own})
    return found


def overhead(target: Target, answers: Sequence[Answered]) -> float:
    """Seconds of a step outside all passes, one row at a time, if nothing is drafted: the median over a few greedy
    answers."""
    return max(median(map(_outside, _traces(Engine(target), answers))), 0.0)


def around(target: Target, drafter: Drafter, answers: Sequence[Answered], costs: Costs) -> float:
    """Seconds that a step of one row spends around each pass of the draft, pricing included: the median over steps that
    draft as far as DEPTH."""
    policy = _CountsPasses(_always_pays(costs))
    engine = Engine(target, drafter, policy=policy, budget=Budget(BUDGET.nodes, DEPTH))
    traces = [trace for trace in _traces(engine, answers) if trace.nodes]
    found = [(_outside(trace) - costs.overhead) / count for trace, count in zip(traces, policy.passes, strict=True)]
    return max(median(found), 0.0) if found else 0.0


class _CountsPasses(Policy):
    """`passes`: of the draft, in each step with one."""

    def __init__(self, costs: Costs) -> None:
        super().__init__(costs)
        self.passes: list[int] = []
        self._run = 0

    def begin(self, rows: Sequence[Row]) -> None:
        super().begin(rows)
        self._run = 0

    def charge(self, name: str, tokens: Mapping[Row, int], entering: bool = True) -> None:
        super().charge(name, tokens, entering)
        self._run += 1

    def settle(self, rows: Sequence[Row], drafts: Sequence[Draft], verdicts: Sequence[Verdict]) -> None:
        super().settle(rows, drafts, verdicts)
        if any(map(len, drafts)):
            self.passes.append(max(self._run, 1))


def _always_pays(costs: Costs) -> Costs:
    """With these drafting always pays: the target's passes take much longer, whatever goes through them."""
    slow = PassCost([1.0], [100 * costs.of("target")(1.0)])
    return replace(costs, passes={**costs.passes, "target": slow})


def _never_pays(costs: Costs) -> Costs:
    """With these drafting never pays: the target's passes take no time."""
    return replace(costs, passes={**costs.passes, "target": PassCost([1.0], [0.0])}, overhead=0.0)


def _slower(cost: PassCost, seconds: float) -> PassCost:
    return replace(cost, seconds=[one + seconds for one in cost.seconds])


def _outside(trace: StepTrace) -> float:
    return trace.seconds - trace.target_forward_s - trace.draft_forward_s


def asking(target: Target, drafter: Drafter, answers: Sequence[Answered], costs: Costs) -> float:
    """Seconds to propose for one row and to cut the draft with these costs, more than an empty drafter takes: means,
    because steps without a match are cheap; the slowest steps, which something else interrupted, do not count."""
    means = []
    for one in (drafter, Empty()):
        engine = Engine(target, one, policy=Policy.of(target, one, costs=costs))
        took = sorted(trace.propose_s for trace in _traces(engine, answers))
        means.append(fmean(took[: max(int(COUNTED * len(took)), 1)]))
    return max(means[0] - means[1], 0.0)


def _traces(engine: Engine, answers: Sequence[Answered]) -> list[StepTrace]:
    """Of a few greedy answers, one after the other."""
    rows = [
        Row(one.key, list(one.prompt), Settings(), Stops(STEPS), engine.target.tokenizer) for one in answers[:STEPS_OF]
    ]
    return [trace for row in rows for trace in engine.run([row], strict=True)[0].traces]


def _shapes(tokens: Sequence[int], max_positions: int) -> list[PassShape]:
    """The passes to time: all lengths for one row, every other length for several."""
    contexts = [context for context in CONTEXTS if context + max(tokens) < max_positions] or [1]
    shapes = {*grid(ROWS[:1], tokens, contexts), *grid(ROWS[1:], tokens[::2], contexts)}
    return sorted(shapes, key=lambda shape: (shape.rows * shape.tokens, shape.context, shape.rows))
