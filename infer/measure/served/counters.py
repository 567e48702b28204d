"""What a server's `/metrics` says about its drafts: counters before and after a load, and their difference.

Known are Draftsmith's own server, vLLM and SGLang. vLLM counts drafts and accepted tokens, which makes accepted_length
1 + accepted / drafts. SGLang has a gauge of its latest steps, which is taken as it stands after the load.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from draftsmith.infer.measure.metrics import ratio

# The source of tokens that no draft proposed, in our own server's counters.
TARGET = "target"
DRAFTSMITH, VLLM, SGLANG = "draftsmith", "vllm", "sglang"
PREFIXES = {"draftsmith_": DRAFTSMITH, "vllm:": VLLM, "sglang:": SGLANG}
SAMPLES = {
    "draftsmith_steps_total": "steps",
    "draftsmith_committed_tokens_total": "committed",
    "draftsmith_drafted_tokens_total": "drafted",
    "draftsmith_generated_tokens_total": "tokens",
    "draftsmith_prompt_tokens_total": "prompt",
    "draftsmith_cached_tokens_total": "cached",
    "vllm:spec_decode_num_drafts_total": "steps",
    "vllm:spec_decode_num_accepted_tokens_total": "accepted",
    "vllm:spec_decode_num_draft_tokens_total": "drafted",
    "vllm:generation_tokens_total": "tokens",
    "vllm:prefix_cache_queries_total": "prompt",
    "vllm:prefix_cache_hits_total": "cached",
    "sglang:generation_tokens_total": "tokens",
    "sglang:prompt_tokens_total": "prompt",
    "sglang:cached_tokens_total": "cached",
}
GAUGES = {"sglang:spec_accept_length": "accepted_length", "sglang:spec_accept_rate": "acceptance_rate"}

# (what is counted, drafter); the drafter of vLLM's and SGLang's counters is the server itself.
Counted = dict[tuple[str, str], float]


@dataclass(frozen=True, slots=True)
class DraftCounts:
    """What a server counted during one load, or several. `kind` is "" where it shows no metrics that are known.

    `gauges`: SGLang's accepted_length and acceptance_rate after the last load.
    """

    kind: str = ""
    counted: Counted = field(default_factory=dict)
    gauges: dict[str, float] = field(default_factory=dict)
    problem: str = ""

    def __add__(self, other: DraftCounts) -> DraftCounts:
        keys = {*self.counted, *other.counted}
        total = {key: self.counted.get(key, 0.0) + other.counted.get(key, 0.0) for key in keys}
        return DraftCounts(other.kind or self.kind, total, other.gauges, self.problem or other.problem)

    def total(self, name: str) -> float | None:
        """Over all drafters; None if the server does not count it."""
        found = [value for (what, _), value in self.counted.items() if what == name]
        return sum(found) if found else None

    @property
    def cached_share(self) -> float | None:
        """The share of the prompts' tokens that the server had in its cache."""
        return ratio(self.total("cached"), self.total("prompt"))

    def drafters(self) -> dict[str, dict[str, Any]]:
        """Drafter -> accepted_length, acceptance_rate and steps; empty if nothing was drafted."""
        if self.kind == SGLANG:
            if self.gauges.get("accepted_length", 0.0) <= 0:
                return {}
            rate = self.gauges.get("acceptance_rate")
            return {SGLANG: {"accepted_length": self.gauges["accepted_length"], "acceptance_rate": rate, "steps": None}}
        found = {}
        for name in sorted({drafter for what, drafter in self.counted if what == "drafted"}):
            steps, drafted = self.counted.get(("steps", name), 0.0), self.counted["drafted", name]
            accepted = self.counted.get(("accepted", name), 0.0)
            if drafted > 0 and steps > 0:
                committed = self.counted.get(("committed", name), steps + accepted)
                found[name or self.kind] = {
                    "accepted_length": committed / steps,
                    "acceptance_rate": accepted / drafted,
                    "steps": int(steps),
                }
        return found


@dataclass(frozen=True, slots=True)
class ServerCounters:
    """The counters at one moment."""

    kind: str = ""
    counted: Counted = field(default_factory=dict)
    gauges: dict[str, float] = field(default_factory=dict)
    problem: str = ""

    @classmethod
    def read(cls, text: str | None) -> ServerCounters:
        """Those of a page in Prometheus' text format; None is a server without one."""
        from prometheus_client.parser import text_string_to_metric_families

        if text is None:
            return cls(problem="it has no /metrics")
        counted: Counted = {}
        gauges: dict[str, list[float]] = {}
        kinds = set()
        try:
            for family in text_string_to_metric_families(text):
                kinds |= {kind for prefix, kind in PREFIXES.items() if family.name.startswith(prefix)}
                for sample in family.samples:
                    # Older versions of vLLM leave the ending out.
                    name = sample.name if sample.name in SAMPLES else f"{sample.name}_total"
                    if name in SAMPLES:
                        _count(counted, SAMPLES[name], sample.labels, float(sample.value))
                    elif sample.name in GAUGES and sample.value > 0:
                        gauges.setdefault(GAUGES[sample.name], []).append(float(sample.value))
        except ValueError as problem:
            return cls(problem=f"its /metrics cannot be read ({problem})")
        if len(kinds) != 1:
            return cls(problem="its /metrics are not those of Draftsmith, vLLM or SGLang")
        # One gauge per rank of a server that is spread over several.
        return cls(kinds.pop(), counted, {name: sum(values) / len(values) for name, values in gauges.items()})

    def until(self, after: ServerCounters) -> DraftCounts:
        """What was counted between this moment and a later one."""
        if problem := self.problem or after.problem:
            return DraftCounts(problem=problem)
        counted = {key: value - self.counted.get(key, 0.0) for key, value in after.counted.items()}
        if any(value < 0 for value in counted.values()):
            return DraftCounts(self.kind, problem="its counters went down: it was started anew during the run")
        return DraftCounts(after.kind, counted, after.gauges)


def _count(counted: Counted, what: str, labels: Mapping[str, str], value: float) -> None:
    drafter = labels.get("drafter", "")
    counted[what, drafter] = counted.get((what, drafter), 0.0) + value
    if what == "committed" and labels.get("source") != TARGET:
        _count(counted, "accepted", {"drafter": drafter}, value)
