"""What `/metrics` shows, in Prometheus' text format, by a registry of this server's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from draftsmith.infer.contract.trace import StepTrace

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class ServerMetrics:
    """Counters and histograms since the server's start."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Gauge, Histogram
        from prometheus_client import Counter as Total

        self.registry = own = CollectorRegistry()
        self._requests = Total(
            "draftsmith_requests", "Requests, by endpoint and HTTP status.", ["endpoint", "status"], registry=own
        )
        self._errors = Total("draftsmith_errors", "Errors, by their code or type.", ["error"], registry=own)
        self._aborted = Total("draftsmith_aborted_rows", "Rows whose client went away.", registry=own)
        self._rows = Gauge("draftsmith_rows", "Rows that are read or decoded now.", registry=own)
        self._waiting = Gauge("draftsmith_waiting_rows", "Rows in the queue.", registry=own)
        self._kept = Gauge("draftsmith_prefix_cache_tokens", "Tokens of finished rows in the cache.", registry=own)
        self._prompt = Total("draftsmith_prompt_tokens", "Tokens of prompts.", registry=own)
        self._cached = Total("draftsmith_cached_tokens", "Those that were in the cache already.", registry=own)
        self._tokens = Total("draftsmith_generated_tokens", "Tokens of answers.", registry=own)
        self._first = Histogram(
            "draftsmith_ttft_seconds", "From a request's arrival to its first token.", buckets=SECONDS, registry=own
        )
        self._step = Histogram(
            "draftsmith_step_seconds", "One round of the engine.", buckets=STEP_SECONDS, registry=own
        )
        self._steps = Total("draftsmith_steps", "Steps of rows that have ended.", ["drafter"], registry=own)
        self._committed = Total(
            "draftsmith_committed_tokens",
            "Tokens that these steps committed, by the source that proposed them.",
            ["drafter", "source"],
            registry=own,
        )
        self._drafted = Total(
            "draftsmith_drafted_tokens", "Nodes that were verified, by source.", ["drafter", "source"], registry=own
        )
        self._length = Gauge(
            "draftsmith_accepted_length", "Committed tokens per step since the start.", ["drafter"], registry=own
        )
        self._share = Gauge(
            "draftsmith_accepted_length_by_source", "Each source's part of it.", ["drafter", "source"], registry=own
        )
        self._sums: Counter[str] = Counter()
        self._by_source: Counter[tuple[str, str]] = Counter()

    def text(self) -> bytes:
        from prometheus_client import generate_latest

        return generate_latest(self.registry)

    def request(self, endpoint: str, status: int, error: str = "") -> None:
        self._requests.labels(endpoint, str(status)).inc()
        if error:
            self._errors.labels(error).inc()

    def watch(self, active: Callable[[], int], waiting: Callable[[], int], kept_tokens: Callable[[], int]) -> None:
        """What to ask for the numbers of now, whenever they are shown."""
        self._rows.set_function(active)
        self._waiting.set_function(waiting)
        self._kept.set_function(kept_tokens)

    def aborted(self) -> None:
        self._aborted.inc()

    def first_token(self, seconds: float, prompt: int, cached: int) -> None:
        self._first.observe(seconds)
        self._prompt.inc(prompt)
        self._cached.inc(cached)

    def new_tokens(self, count: int) -> None:
        self._tokens.inc(count)

    def step_seconds(self, seconds: float) -> None:
        self._step.observe(seconds)

    def row_ended(self, drafter: str, traces: Sequence[StepTrace]) -> None:
        committed, drafted = Counter[str](), Counter[str]()
        for trace in traces:
            committed.update(trace.committed_sources)
            drafted.update(trace.nodes_by_source)
        self._steps.labels(drafter).inc(len(traces))
        for source, count in committed.items():
            self._committed.labels(drafter, source).inc(count)
        for source, count in drafted.items():
            self._drafted.labels(drafter, source).inc(count)
        self._sums[drafter] += len(traces)
        self._by_source.update({(drafter, source): count for source, count in committed.items()})
        if steps := self._sums[drafter]:
            for (whose, source), count in self._by_source.items():
                if whose == drafter:
                    self._share.labels(drafter, source).set(count / steps)
            total = sum(count for (whose, _), count in self._by_source.items() if whose == drafter)
            self._length.labels(drafter).set(total / steps)
