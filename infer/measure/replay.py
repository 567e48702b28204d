"""Drafters against recorded answers: how much of what was said would they have drafted? No target is needed.

It is the same loop as decoding, with a recorded target. A step there costs nothing, so replay tells accepted_length,
hit_rate, nodes and the time to propose; what that is worth in seconds a costs file says (worth.py). Exact for outright
drafts at any temperature (the target's draw is made first and looked up), for sampled ones at temperature 0 only.

A drafter that can take in documents is given every answer once it has been replayed, if that is asked for: so it drafts
as it would have done when the answers arrived.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

from draftsmith.infer.contract.protocols import Budget, DocumentLearner, Drafter
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.contract.trace import Generation, StepTrace
from draftsmith.infer.costs.pass_costs import Costs
from draftsmith.infer.engine.generate import BUDGET, generate
from draftsmith.infer.measure.bootstrap import ratio_interval
from draftsmith.infer.measure.leakage import Holder, leakage, said
from draftsmith.infer.measure.metrics import trace_figures
from draftsmith.infer.measure.predicted import BATCH_SIZES
from draftsmith.infer.measure.recording import Recording, recordings
from draftsmith.infer.measure.worth import worth
from draftsmith.infer.models.recorded_target import RecordedTarget

__all__ = ["Recording", "Replayed", "recordings", "replay", "replay_streams", "stream_figures"]


class ReplayProgress(Protocol):
    def __call__(self, done: int, total: int, name: str) -> None: ...


@dataclass(slots=True)
class Replayed:
    """One drafter's generations, and which of the answers it held beforehand (nothing where it holds no texts)."""

    done: list[Generation] = field(default_factory=list)
    held: list[bool] = field(default_factory=list)

    @property
    def traces(self) -> list[StepTrace]:
        return [trace for generation in self.done for trace in generation.traces]


def replay(
    drafters: dict[str, Drafter],
    streams: Sequence[Recording],
    vocab_size: int,
    tokenizer: Any = None,
    *,
    temperature: float = 0.0,
    budget: Budget = BUDGET,
    seed: int = 0,
    arrival: bool = False,
    costs: Costs | None = None,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    progress: ReplayProgress | None = None,
) -> dict[str, Any]:
    """The figures of every drafter over all streams, in their order, as JSON.

    Args:
        drafters: by the name that they are to have.
        streams: what was said.
        vocab_size: ids from here on are refused.
        tokenizer: whose special tokens end an answer; stores are held against it.
        temperature: that the answers were sampled at.
        budget: of a draft.
        seed: of the intervals.
        arrival: hand every answer, once replayed, to the drafters that can take it in.
        costs: of the passes of a machine; with them, speedups are predicted.
        batch_sizes: for which.
        progress: told after every stream: (done, all, the drafter's name).
    """
    if costs is not None and (not batch_sizes or min(batch_sizes) < 1):
        raise ValueError("batch_sizes must be numbers of rows, 1 or more")
    found = replay_streams(
        drafters,
        streams,
        vocab_size,
        tokenizer,
        temperature=temperature,
        budget=budget,
        seed=seed,
        arrival=arrival,
        progress=progress,
    )
    results = {name: stream_figures(one, streams, seed) for name, one in found.items()}
    for name, one in found.items():
        results[name]["predicted"] = None if costs is None else worth(one.traces, costs, batch_sizes)
    return {
        "drafters": results,
        "streams": len(streams),
        "tokens": sum(len(one.answer) for one in streams),
        "temperature": temperature,
        "budget": {"nodes": budget.nodes, "depth": budget.depth},
        "arrival": arrival,
    }


def replay_streams(
    drafters: dict[str, Drafter],
    streams: Sequence[Recording],
    vocab_size: int,
    tokenizer: Any = None,
    *,
    temperature: float = 0.0,
    budget: Budget = BUDGET,
    seed: int = 0,
    arrival: bool = False,
    progress: ReplayProgress | None = None,
) -> dict[str, Replayed]:
    """What every drafter made of the streams; the arguments are those of `replay`."""
    for stream in streams:
        foreign = next((token for token in (*stream.prompt, *stream.answer) if not 0 <= token < vocab_size), None)
        if foreign is not None:
            raise ValueError(f"{stream.key} holds token id {foreign}, and the tokenizer ends at {vocab_size}")
    if arrival and not any(isinstance(drafter, DocumentLearner) for drafter in drafters.values()):
        raise ValueError(f"none of {', '.join(drafters)} can take in answers as they arrive; rest:STORE can")
    answers = {one.key: one.answer for one in streams}
    target = RecordedTarget(answers, vocab_size, tokenizer, sampled=temperature > 0)
    settings = Settings(temperature=temperature, seed=seed)
    found = {}
    for name, drafter in drafters.items():
        drafter.bind(target)
        told = None if progress is None else partial(progress, name=name)
        found[name] = _replay(drafter, target, streams, settings, budget, arrival, told)
    return found


def _replay(
    drafter: Drafter,
    target: RecordedTarget,
    streams: Sequence[Recording],
    settings: Settings,
    budget: Budget,
    arrival: bool,
    progress: Callable[[int, int], None] | None,
) -> Replayed:
    """One stream after another; what arrives is known to those that come later."""
    found = Replayed()
    ends = set() if target.tokenizer is None else set(target.tokenizer.all_special_ids)
    for number, stream in enumerate(streams, start=1):
        if isinstance(drafter, Holder):
            found.held.append(drafter.holds(said(stream.answer, ends)))
        row = Row(stream.key, list(stream.prompt), settings, Stops(len(stream.answer)))
        found.done += generate(target, drafter, [row], budget=budget)
        if arrival and isinstance(drafter, DocumentLearner):
            drafter.add_document(stream.answer)
        if progress is not None:
            progress(number, len(streams))
    return found


def stream_figures(found: Replayed, streams: Sequence[Recording], seed: int) -> dict[str, Any]:
    """What a replay can know of the figures of a benchmark, with the same names; with and without leaked answers."""
    figures = _counts(found.done, seed)
    times = sorted(trace.propose_s for trace in found.traces)
    figures["propose_p50_s"] = times[len(times) // 2]
    figures["propose_p99_s"] = times[int(len(times) * 0.99)]
    figures["leakage"] = None
    if found.held:
        clean = [generation for generation, held in zip(found.done, found.held) if not held]
        told = leakage([one.answer for one in streams], found.held)
        figures["leakage"] = told | {"without": _counts(clean, seed) if clean else None}
    return figures


def _counts(done: Sequence[Generation], seed: int) -> dict[str, Any]:
    known = trace_figures([trace for generation in done for trace in generation.traces])
    committed = [sum(trace.committed for trace in generation.traces) for generation in done]
    steps = [len(generation.traces) for generation in done]
    figures = {key: known[key] for key in ("accepted_length", "acceptance_rate", "hit_rate", "nodes_per_step")}
    figures["accepted_length_interval"] = ratio_interval(committed, steps, seed=seed)
    figures["by_depth"] = known["by_depth"]
    return figures | {"steps": sum(steps), "total": len(done)}
