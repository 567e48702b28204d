"""Numbers from traces, each with one definition. Nothing here knows which drafter or target left them.

A step's seconds are shared by its `batch` rows, so a row carries seconds / batch of it: summed over the rows, every
step counts once, and figures over some of the rows are still fair. `nodes` are a draft's candidate nodes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

from draftsmith.infer.contract.trace import StepTrace


def ratio(above: float, below: float) -> float | None:
    """above / below; None where there is nothing to divide by, because no number would be true."""
    return above / below if below > 0 else None


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over a set of traces; the totals of two sets add. Seconds are the rows' shares."""

    steps: int = 0
    committed: int = 0
    accepted: int = 0
    nodes: int = 0
    hits: int = 0
    passes: float = 0.0
    decode_s: float = 0.0
    target_s: float = 0.0
    draft_s: float = 0.0
    bytes_moved: float = 0.0

    def __add__(self, other: Totals) -> Totals:
        return Totals(*(mine + theirs for mine, theirs in zip(astuple(self), astuple(other))))

    @classmethod
    def of(cls, traces: Iterable[StepTrace]) -> Totals:
        traces = list(traces)
        return cls(
            steps=len(traces),
            committed=sum(trace.committed for trace in traces),
            accepted=sum(trace.accepted for trace in traces),
            nodes=sum(trace.nodes for trace in traces),
            hits=sum(trace.nodes > 0 for trace in traces),
            passes=sum(1 / trace.batch for trace in traces),
            decode_s=sum(trace.seconds / trace.batch for trace in traces),
            target_s=sum(trace.target_forward_s / trace.batch for trace in traces),
            draft_s=sum(trace.draft_forward_s / trace.batch for trace in traces),
            bytes_moved=sum(trace.bytes_moved / trace.batch for trace in traces),
        )

    @property
    def accepted_length(self) -> float | None:
        """committed / steps; prefill is no step."""
        return ratio(self.committed, self.steps)

    @property
    def acceptance_rate(self) -> float | None:
        """accepted / candidate nodes, a ratio of sums."""
        return ratio(self.accepted, self.nodes)

    @property
    def hit_rate(self) -> float | None:
        """The share of steps with a non-empty draft."""
        return ratio(self.hits, self.steps)

    @property
    def nodes_per_step(self) -> float | None:
        return ratio(self.nodes, self.steps)

    @property
    def tokens_per_s(self) -> float | None:
        """Decode tokens/s: the rows' tokens over the steps' wall time, prefill apart."""
        return ratio(self.committed, self.decode_s)

    @property
    def step_s(self) -> float | None:
        """The mean duration of a step, however many rows shared it."""
        return ratio(self.decode_s, self.passes)

    @property
    def overhead(self) -> float | None:
        """The share of a step outside the target's and the draft model's forward passes."""
        inside = ratio(self.target_s + self.draft_s, self.decode_s)
        return None if inside is None else 1 - inside

    @property
    def bytes_per_s(self) -> float | None:
        """Bytes of weights read per second of decoding; over the memory's bandwidth, the share of the limit reached."""
        return ratio(self.bytes_moved, self.decode_s)

    @property
    def time_shares(self) -> dict[str, float | None]:
        """Where a step's time goes; the three add up to one."""
        return {
            "target": ratio(self.target_s, self.decode_s),
            "draft": ratio(self.draft_s, self.decode_s),
            "overhead": self.overhead,
        }


def break_even(drafter: Totals, plain: Totals) -> float | None:
    """The accepted_length at which the drafter is as fast as plain decoding.

    What a row's step costs with the drafter, in plain tokens; speedup = accepted_length / break_even.
    """
    per_step, per_token = ratio(drafter.decode_s, drafter.steps), ratio(plain.decode_s, plain.committed)
    return None if per_step is None or per_token is None else ratio(per_step, per_token)


def step_quantile(traces: Iterable[StepTrace], share: float) -> float | None:
    """The step duration that `share` of all steps do not exceed (nearest rank; the rows of a step count as one)."""
    timed = sorted((trace.seconds, 1 / trace.batch) for trace in traces)
    if not timed:
        return None
    goal = share * sum(weight for _, weight in timed)
    reached = 0.0
    for seconds, weight in timed:
        reached += weight
        if reached >= goal - 1e-9:
            return seconds
    return timed[-1][0]


def _count(reached: int, accepted: int) -> dict[str, Any]:
    return {"reached": reached, "accepted": accepted, "share": ratio(accepted, reached)}


def by_depth(traces: Iterable[StepTrace]) -> list[dict[str, Any]]:
    """Acceptance by depth: of the candidates that the verifier reached at each depth, the share that it accepted."""
    reached: Counter[tuple[int, str]] = Counter()
    accepted: Counter[tuple[int, str]] = Counter()
    for trace in traces:
        for trial in trace.tried:
            reached[trial.depth, trial.source] += 1
            accepted[trial.depth, trial.source] += trial.accepted
    rows = []
    for depth in sorted({depth for depth, _ in reached}):
        sources = sorted(source for at, source in reached if at == depth)
        row: dict[str, Any] = {"depth": depth}
        row |= _count(sum(reached[depth, s] for s in sources), sum(accepted[depth, s] for s in sources))
        row["by_source"] = {s: _count(reached[depth, s], accepted[depth, s]) for s in sources}
        rows.append(row)
    return rows


def by_source(traces: Iterable[StepTrace]) -> dict[str, dict[str, Any]]:
    """What each source proposed, what was reached of it, and what was accepted."""
    nodes: Counter[str] = Counter()
    tried: dict[str, list[bool]] = defaultdict(list)
    for trace in traces:
        nodes.update(trace.nodes_by_source)
        for trial in trace.tried:
            tried[trial.source].append(trial.accepted)
    return {
        source: {
            "nodes": nodes[source],
            **_count(len(tried[source]), sum(tried[source])),
            "acceptance_rate": ratio(sum(tried[source]), nodes[source]),
        }
        for source in sorted({*nodes, *tried})
    }


def by_exit(traces: Iterable[StepTrace]) -> dict[str, int]:
    """How many nodes were drafted from each exit; keys are layers, as text, because JSON has no other keys."""
    layers = Counter(layer for trace in traces for _, layer in trace.exits)
    return {str(layer): layers[layer] for layer in sorted(layers)}


def exits_by_depth(traces: Iterable[StepTrace]) -> list[dict[str, Any]]:
    """The same per depth of the nodes that were drafted: [{depth, exits: {layers: nodes}}]."""
    counted: dict[int, Counter[int]] = defaultdict(Counter)
    for trace in traces:
        for depth, layer in trace.exits:
            counted[depth][layer] += 1
    return [
        {"depth": depth, "exits": {str(layer): counted[depth][layer] for layer in sorted(counted[depth])}}
        for depth in sorted(counted)
    ]


def trace_figures(traces: Sequence[StepTrace]) -> dict[str, Any]:
    """All that traces alone tell about one runner."""
    totals = Totals.of(traces)
    return {
        "tokens_per_s": totals.tokens_per_s,
        "accepted_length": totals.accepted_length,
        "acceptance_rate": totals.acceptance_rate,
        "hit_rate": totals.hit_rate,
        "nodes_per_step": totals.nodes_per_step,
        "overhead": totals.overhead,
        "time_shares": totals.time_shares,
        "bytes_per_s": totals.bytes_per_s,
        "step_s": totals.step_s,
        "p50_step_s": step_quantile(traces, 0.50),
        "p95_step_s": step_quantile(traces, 0.95),
        "steps": totals.steps,
        "by_depth": by_depth(traces),
        "by_source": by_source(traces),
        "by_exit": by_exit(traces),
        "exits_by_depth": exits_by_depth(traces),
    }
