"""Numbers from traces and answers, each with one definition.

A step's seconds are shared by its `batch` rows: each row carries seconds / batch. Summed over the rows every step
counts once, and figures over some of the rows stay fair. `nodes` are a draft's candidate nodes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import numpy as np

from draftsmith.infer.contract.trace import Generation, StepTrace


def ratio(above: float | None, below: float | None) -> float | None:
    """above / below; None if either is None or there is nothing to divide by."""
    return None if above is None or below is None or below <= 0 else above / below


@dataclass(frozen=True, slots=True)
class Totals:
    """Sums over a set of traces; totals of two sets add up. Seconds are the rows' shares."""

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
        """committed / steps, prefill not counted."""
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
        """Decode tokens/s: committed tokens over the steps' wall time, prefill not counted."""
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
        """Bytes of weights read per second of decoding; `bench` divides it by the memory's bandwidth."""
        return ratio(self.bytes_moved, self.decode_s)

    @property
    def time_shares(self) -> dict[str, float | None]:
        """Shares of a step's time; they add up to one."""
        return {
            "target": ratio(self.target_s, self.decode_s),
            "draft": ratio(self.draft_s, self.decode_s),
            "overhead": self.overhead,
        }


def break_even(drafter: Totals, plain: Totals) -> float | None:
    """The accepted_length at which speedup is 1: the drafter's seconds per step over plain's seconds per token."""
    return ratio(ratio(drafter.decode_s, drafter.steps), ratio(plain.decode_s, plain.committed))


def step_quantile(traces: Iterable[StepTrace], share: float) -> float | None:
    """The step duration that `share` of all steps do not exceed (nearest rank; a step counts once for all its rows)."""
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
    """Acceptance by depth: the share of depth-d candidates reached that were accepted.

    Of drafts verified jointly (infer/rules/traversal.py) it says how far they came, and holds for drafts as deep only.
    """
    reached: Counter[tuple[int, str]] = Counter()
    accepted: Counter[tuple[int, str]] = Counter()
    for trace in traces:
        for trial in trace.tried:
            reached[trial.depth, trial.source] += 1
            accepted[trial.depth, trial.source] += trial.accepted
    rows = []
    for depth in sorted({depth for depth, _ in reached}):
        sources = sorted(source for at, source in reached if at == depth)
        total = _count(sum(reached[depth, s] for s in sources), sum(accepted[depth, s] for s in sources))
        each = {s: _count(reached[depth, s], accepted[depth, s]) for s in sources}
        rows.append({"depth": depth, **total, "by_source": each})
    return rows


def by_source(traces: Iterable[StepTrace]) -> dict[str, dict[str, Any]]:
    """Nodes proposed by each source, candidates reached, and candidates accepted.

    `also_named`: accepted tokens that the source named too, where another one is credited with the node."""
    nodes: Counter[str] = Counter()
    also: Counter[str] = Counter()
    tried: dict[str, list[bool]] = defaultdict(list)
    for trace in traces:
        also.update(trace.also_named)
        nodes.update(trace.nodes_by_source)
        for trial in trace.tried:
            tried[trial.source].append(trial.accepted)
    return {
        source: {
            "nodes": nodes[source],
            **_count(len(tried[source]), sum(tried[source])),
            "acceptance_rate": ratio(sum(tried[source]), nodes[source]),
            **({"also_named": also[source]} if source in also else {}),
        }
        for source in sorted({*nodes, *tried, *also})
    }


def by_exit(traces: Iterable[StepTrace]) -> dict[str, int]:
    """Nodes drafted from each exit; keys are numbers of layers as text, for JSON."""
    layers = Counter(layer for trace in traces for _, layer in trace.exits)
    return {str(layer): layers[layer] for layer in sorted(layers)}


def exits_by_depth(traces: Iterable[StepTrace]) -> list[dict[str, Any]]:
    """Nodes drafted from each exit, by depth: [{depth, exits: {layers: nodes}}]."""
    counted: dict[int, Counter[int]] = defaultdict(Counter)
    for trace in traces:
        for depth, layer in trace.exits:
            counted[depth][layer] += 1
    return [
        {"depth": depth, "exits": {str(layer): counted[depth][layer] for layer in sorted(counted[depth])}}
        for depth in sorted(counted)
    ]


def trace_figures(traces: Sequence[StepTrace]) -> dict[str, Any]:
    """All figures of one runner that follow from its traces alone."""
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
        "verified_jointly": ratio(sum(trace.jointly for trace in traces), totals.steps),
    }


def per_answer(done: Sequence[Generation]) -> tuple[list[int], list[int]]:
    """Committed tokens, and steps, of every answer."""
    committed = [sum(trace.committed for trace in generation.traces) for generation in done]
    return committed, [len(generation.traces) for generation in done]


def speed_figures(done: Sequence[Generation]) -> dict[str, Any]:
    """What one run says about speed: a speedup needs plain decoding beside it, which only a benchmark has."""
    totals = Totals.of(trace for generation in done for trace in generation.traces)
    return {
        "tokens": totals.committed,
        "tokens_per_s": totals.tokens_per_s,
        "accepted_length": totals.accepted_length,
        "acceptance_rate": totals.acceptance_rate,
        "prefill_s": sum(generation.prefill_s for generation in done),
        "decode_s": totals.decode_s,
    }


def propose_figures(traces: Sequence[StepTrace]) -> dict[str, Any]:
    """Median and 99th percentile of the milliseconds to propose, and the reliability of confidences.

    Reliability is given by tenths of confidence: the mean confidence (`said`) and the share accepted (`came`). Steps
    verified jointly are left out: there a token is not accepted for itself.
    """
    took = [1e3 * trace.propose_s for trace in traces] or [0.0]
    tried = [trial for trace in traces if not trace.jointly for trial in trace.tried]
    confidence_N, accepted_N = np.array([one.confidence for one in tried]), np.array([one.accepted for one in tried])
    tenth_N = np.minimum((confidence_N * 10).astype(int), 9)
    reliability = [
        {"said": float(confidence_N[here].mean()), "came": float(accepted_N[here].mean()), "tried": int(here.sum())}
        for here in (tenth_N == i for i in range(10))
        if here.any()
    ]
    return {
        "propose_ms_p50": float(np.quantile(took, 0.5)),
        "propose_ms_p99": float(np.quantile(took, 0.99)),
        "reliability": reliability,
    }


def distinct_share(turns: Iterable[Sequence[int]], length: int = 4) -> float:
    """Distinct n-grams over all n-grams in the token ids of a question's turns; low for a looping answer.

    A model that repeats itself is easy to draft for and flatters every drafter. N-grams do not reach across turns; the
    share is 1.0 if the answers are too short to repeat anything.
    """
    grams = [tuple(ids[start : start + length]) for ids in turns for start in range(len(ids) - length + 1)]
    return len(set(grams)) / len(grams) if grams else 1.0
