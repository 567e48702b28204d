"""Drafters against recorded answers: how much of what was said would they have drafted? No target is needed.

It is the same loop as decoding, with a recorded target. A step there costs nothing, so replay tells accepted_length,
hit_rate, nodes and the time to propose; what that is worth in seconds a latency table has to say. Exact for outright
drafts at any temperature (the target's draw is made first and looked up), for sampled ones at temperature 0 only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from draftsmith.infer.answers import last_answer
from draftsmith.infer.contract import Budget, Drafter
from draftsmith.infer.generate import BUDGET, generate
from draftsmith.infer.measure.bootstrap import ratio_interval
from draftsmith.infer.measure.metrics import trace_figures
from draftsmith.infer.record import Record
from draftsmith.infer.recorded_target import RecordedTarget
from draftsmith.infer.rendering import Template
from draftsmith.infer.row import Row, Stops
from draftsmith.infer.settings import Settings
from draftsmith.infer.trace import Generation


@dataclass(frozen=True, slots=True)
class Recording:
    """One answer that was given: the prompt as it was served, and the answer's token ids."""

    key: str
    category: str
    prompt: list[int]
    answer: list[int]


def recordings(records: Iterable[Record], template: Template) -> list[Recording]:
    """Every answered turn of every record; token ids of the record are used as they are."""
    found: list[Recording] = []
    for record in records:
        if record.token_ids:
            prompt = list(record.prompt_token_ids or ()) or template.prompt_ids(record.prompt)
            found.append(Recording(f"{record.source}:{record.row}", record.category, prompt, list(record.token_ids)))
            continue
        for turn, (before, said) in enumerate(record.exchanges()):
            prompt, answer = last_answer(template, [*before, said])
            if answer:
                found.append(Recording(f"{record.source}:{record.row}/{turn}", record.category, prompt, answer))
    if not found:
        raise ValueError("no record holds an answer to replay")
    return found


def replay(
    drafters: dict[str, Drafter],
    streams: Sequence[Recording],
    vocab_size: int,
    tokenizer: Any = None,
    *,
    temperature: float = 0.0,
    budget: Budget = BUDGET,
    seed: int = 0,
    progress: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """The figures of every drafter over all streams, as JSON."""
    for stream in streams:
        foreign = next((token for token in (*stream.prompt, *stream.answer) if not 0 <= token < vocab_size), None)
        if foreign is not None:
            raise ValueError(f"{stream.key} holds token id {foreign}, and the tokenizer ends at {vocab_size}")
    target = RecordedTarget({one.key: one.answer for one in streams}, vocab_size, tokenizer, sampled=temperature > 0)
    settings = Settings(temperature=temperature, seed=seed)
    results = {}
    for name, drafter in drafters.items():
        drafter.bind(target)
        done: list[Generation] = []
        for number, stream in enumerate(streams, start=1):
            row = Row(stream.key, list(stream.prompt), settings, Stops(len(stream.answer)))
            done += generate(target, drafter, [row], budget=budget)
            if progress is not None:
                progress(number, len(streams), name)
        results[name] = _figures(done, seed)
    return {
        "drafters": results,
        "streams": len(streams),
        "tokens": sum(len(one.answer) for one in streams),
        "temperature": temperature,
        "budget": {"nodes": budget.nodes, "depth": budget.depth},
    }


def _figures(done: Sequence[Generation], seed: int) -> dict[str, Any]:
    """What a replay can know of the figures of a benchmark, with the same names."""
    traces = [trace for generation in done for trace in generation.traces]
    known = trace_figures(traces)
    committed = [sum(trace.committed for trace in generation.traces) for generation in done]
    steps = [len(generation.traces) for generation in done]
    figures = {key: known[key] for key in ("accepted_length", "acceptance_rate", "hit_rate", "nodes_per_step")}
    figures["accepted_length_interval"] = ratio_interval(committed, steps, seed=seed)
    figures["by_depth"] = known["by_depth"]
    figures |= {"steps": sum(steps), "total": len(done)}
    times = sorted(trace.propose_s for trace in traces)
    figures["propose_p50_s"] = times[len(times) // 2]
    figures["propose_p99_s"] = times[int(len(times) * 0.99)]
    return figures
