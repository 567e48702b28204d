"""Forecast: the accepted_length of a draft's drawn chains of every length, by either rule, without decoding.

It takes texts drawn from the target with their log-probabilities (texts.py) and one pass of the draft over them
(drafts.py); lengths.py has the formulas. Measured pass costs turn lengths into speedups (predicted.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.costs.pass_costs import Costs
from draftsmith.infer.measure.bootstrap import ratio_interval
from draftsmith.infer.measure.forecast.drafts import DrawsChains, logprobs_ahead
from draftsmith.infer.measure.forecast.lengths import RULES, ExpectedSteps, RuleName, ahead, expected_steps
from draftsmith.infer.measure.forecast.texts import DrawnText
from draftsmith.infer.measure.predicted import BATCH_SIZES, predict

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, slots=True)
class ChainFigures:
    """What a forecast says of chains of one length: per text, the tokens and the expected steps, which make the
    accepted_length; the mean number of drafted tokens and of tokens before them per step."""

    length: int
    tokens: np.ndarray
    steps: np.ndarray
    nodes_per_step: float
    context: float

    @property
    def accepted_length(self) -> float:
        return float(self.tokens.sum() / self.steps.sum())

    def to_json(self, seed: int) -> dict[str, Any]:
        return {
            "length": self.length,
            "accepted_length": self.accepted_length,
            "accepted_length_interval": ratio_interval(self.tokens, self.steps, seed=seed),
            "nodes_per_step": self.nodes_per_step,
        }


@dataclass(frozen=True, slots=True)
class Forecast:
    """Args:
    texts: drawn from the target.
    settings: how they were drawn, and how the draft would draw.
    lengths: of the chains.
    rules: verification rules.
    max_new_tokens: the limit of an answer that drafts must fit; by default the longest answer.
    seed: of the intervals.
    costs: of a machine's passes, to predict speedups.
    batch_sizes: to predict speedups for.
    """

    texts: Sequence[DrawnText]
    settings: Settings
    lengths: Sequence[int]
    rules: Sequence[RuleName] = RULES
    max_new_tokens: int | None = None
    seed: int = 0
    costs: Costs | None = None
    batch_sizes: Sequence[int] = BATCH_SIZES

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 1:
            raise ValueError(f"the lengths of chains are numbers from 1 on, not {list(self.lengths)}")
        if self.limit < self._longest:
            raise ValueError(f"an answer has {self._longest} tokens, more than max_new_tokens, {self.limit}")

    @property
    def _longest(self) -> int:
        return max(len(text.answer) for text in self.texts)

    @property
    def limit(self) -> int:
        return self.max_new_tokens or self._longest

    def results(self, drafters: Mapping[str, DrawsChains], progress: Progress | None = None) -> dict[str, Any]:
        """The figures of every drafter, as JSON; a draft with several exits has a row for each."""
        found = {name: row for label, one in drafters.items() for name, row in self._rows(label, one, progress).items()}
        return {
            "drafters": found,
            "best": self._best(found),
            "texts": len(self.texts),
            "tokens": sum(len(text.answer) for text in self.texts),
            "sampling": self.settings.to_json(),
            "max_new_tokens": self.limit,
            "costs": self.costs.describe() if self.costs else None,
        }

    def figures(
        self, drafter: DrawsChains, progress: Callable[[int, int], None] | None = None
    ) -> dict[tuple[str, RuleName], list[ChainFigures]]:
        """By source and rule, the figures of each length."""
        sums: dict[tuple[str, RuleName], list[ExpectedSteps]] = {
            (source, rule): [] for source in drafter.exit_sources.values() for rule in self.rules
        }
        for number, text in enumerate(self.texts, start=1):
            depth = max(self.lengths)
            logs = logprobs_ahead(drafter, text.prompt, text.answer, self.settings, depth)
            for source, rule in sums:
                expected = expected_steps(
                    logs[source] - ahead(text.target_logprobs_T, depth),
                    self.lengths,
                    rule,
                    prompt_tokens=len(text.prompt),
                    max_new_tokens=self.limit,
                    max_positions=drafter.max_positions,
                )
                sums[source, rule].append(expected)
            if progress is not None:
                progress(number, len(self.texts))
        return {key: [_figures(some, i, length) for i, length in enumerate(self.lengths)] for key, some in sums.items()}

    def _rows(self, label: str, drafter: DrawsChains, progress: Progress | None) -> dict[str, Any]:
        report = None if progress is None else lambda done, total: progress(done, total, label)
        found = self.figures(drafter, report)
        rows: dict[str, Any] = {}
        sources = list(drafter.exit_sources.items())
        for at, (layers, source) in enumerate(sources):
            passes = [name for _, name in sources[: at + 1]]
            rows[label if len(sources) == 1 else f"{label}:{layers}"] = {
                rule: [
                    one.to_json(self.seed) | {"predicted": self._predicted(one, passes)} for one in found[source, rule]
                ]
                for rule in self.rules
            }
        return rows

    def _predicted(self, one: ChainFigures, passes: Sequence[str]) -> list[dict[str, Any]] | None:
        """By batch size. `passes`: of the draft, for one token; a chain makes them once for each of its tokens."""
        if self.costs is None:
            return None
        found = []
        for rows in self.batch_sizes:
            draft_s = sum(
                self.costs.of(name).even(rows, 1, one.context + depth) for name in passes for depth in range(one.length)
            )
            length = one.accepted_length
            predicted = predict(
                self.costs, rows, accepted_length=length, nodes=one.length, draft_s=draft_s, context=one.context
            )
            found.append(predicted.to_json())
        return found

    def _best(self, found: Mapping[str, Any]) -> list[dict[str, Any]] | None:
        """At each batch size the drafter, rule and length of the largest predicted speedup."""
        if self.costs is None:
            return None
        return [
            max(
                (
                    {"batch_size": rows, "drafter": name, "rule": rule, "length": one["length"]}
                    | {"speedup": one["predicted"][at]["speedup"]}
                    for name, by_rule in found.items()
                    for rule, lengths in by_rule.items()
                    for one in lengths
                ),
                key=lambda cell: float(cell["speedup"]),
            )
            for at, rows in enumerate(self.batch_sizes)
        ]


def _figures(texts: Sequence[ExpectedSteps], at: int, length: int) -> ChainFigures:
    steps = np.array([one.steps_L[at] for one in texts])
    return ChainFigures(
        length=length,
        tokens=np.array([one.tokens for one in texts]),
        steps=steps,
        nodes_per_step=float(sum(one.nodes_L[at] for one in texts) / steps.sum()),
        context=float(sum(one.context_L[at] for one in texts) / steps.sum()),
    )
