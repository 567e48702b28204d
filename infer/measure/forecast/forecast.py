"""Forecast: the accepted_length of a draft model's drafts along texts that the target wrote, without decoding.

Drawn chains of every length, by either rule, need texts drawn from the target with their log-probabilities (texts.py)
and one pass of the draft over them (drafts.py); lengths.py has the formulas. At temperature 0 chains are the likeliest
tokens, and any text of the target will do. Trees of likeliest tokens are forecast at any temperature: those of a fixed
shape from the same pass, those that grow best first by replay (trees.py). Drawn trees are not: they need the target's
whole distributions.

Pass costs turn all of them into speedups by batch size (drafting.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.costs.identity import modelled_on
from draftsmith.infer.costs.pass_costs import Costs
from draftsmith.infer.drafters.draft_reader import TextReader
from draftsmith.infer.measure.bootstrap import ratio_interval
from draftsmith.infer.measure.forecast.drafting import Drafting, step_seconds
from draftsmith.infer.measure.forecast.drafts import DrawsChains, TokenScores, draft_scores
from draftsmith.infer.measure.forecast.lengths import (
    RULES,
    ExpectedSteps,
    RuleName,
    ahead,
    coverage,
    expected_steps,
    survival,
)
from draftsmith.infer.measure.forecast.outlook import FORMAT, KIND, TREES, fastest, outlook
from draftsmith.infer.measure.forecast.texts import DrawnText
from draftsmith.infer.measure.forecast.trees import check_grown, replayed_steps
from draftsmith.infer.measure.predicted import BATCH_SIZES, TARGET, Prediction

Progress = Callable[[int, int, str], None]
Key = tuple[str, str]


@dataclass(frozen=True, slots=True)
class DraftFigures:
    """What a forecast says of one way to draft: per text, the tokens and the expected steps, which make the
    accepted_length; the mean number of drafted tokens and of tokens before them per step. `covered`: of a tree with a
    fixed shape, the share of the texts' tokens from which on it holds the next 1, 2, ... tokens."""

    drafting: Drafting
    tokens: np.ndarray
    steps: np.ndarray
    nodes_per_step: float
    context: float
    covered: Sequence[float] = ()

    @property
    def accepted_length(self) -> float:
        return float(self.tokens.sum() / self.steps.sum())

    def to_json(self, seed: int) -> dict[str, Any]:
        drafting = self.drafting
        size = {"draft": drafting.name, "nodes": drafting.nodes, "depth": drafting.depth}
        by = {"by": "ranks" if drafting.widths else "replay", "covered": list(self.covered)}
        return (size | by if drafting.tree else {"draft": drafting.name, "length": drafting.depth}) | {
            "accepted_length": self.accepted_length,
            "accepted_length_interval": ratio_interval(self.tokens, self.steps, seed=seed),
            "nodes_per_step": self.nodes_per_step,
            "context": self.context,
        }


@dataclass(frozen=True, slots=True)
class Forecast:
    """Args:
    texts: written by the target.
    settings: how they were drawn, and how the draft would draw.
    lengths: of the chains.
    rules: verification rules; at temperature 0 they are all the same.
    max_new_tokens: the limit of an answer that drafts must fit; by default the longest answer.
    seed: of the intervals.
    costs: of a machine's passes, to predict speedups.
    batch_sizes: to predict speedups for.
    trees: of likeliest tokens.
    """

    texts: Sequence[DrawnText]
    settings: Settings
    lengths: Sequence[int]
    rules: Sequence[RuleName] = RULES
    max_new_tokens: int | None = None
    seed: int = 0
    costs: Costs | None = None
    batch_sizes: Sequence[int] = BATCH_SIZES
    trees: Sequence[Drafting] = ()

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

    @property
    def _rules(self) -> Sequence[RuleName]:
        return self.rules[:1] if self.settings.greedy else self.rules

    def results(self, drafters: Mapping[str, DrawsChains], progress: Progress | None = None) -> dict[str, Any]:
        """The figures of every drafter, as JSON; a draft with several exits has a row for each."""
        for label, one in drafters.items():
            self._check(label, one)
        found: dict[str, Any] = {}
        trees: dict[str, Any] = {}
        shapes: dict[str, Any] = {}
        for label, one in drafters.items():
            report = None if progress is None else lambda done, total, label=label: progress(done, total, label)
            figures = self.figures(one, report)
            sources = list(one.exit_sources.items())
            for at, (layers, source) in enumerate(sources):
                name = label if len(sources) == 1 else f"{label}:{layers}"
                passes = _passes(one, [entry for _, entry in sources[: at + 1]])
                found[name] = {rule: self._rows(figures[source, rule], passes) for rule in self._rules}
                trees |= {name: self._rows(figures[source, TREES], passes)} if self.trees else {}
                shapes[name] = _shape(one, layers)
        results: dict[str, Any] = {
            "format": FORMAT,
            "kind": KIND,
            "drafters": found,
            "trees": trees,
            "shapes": shapes,
            "best": None,
            "by_batch_size": [],
            "texts": len(self.texts),
            "tokens": sum(len(text.answer) for text in self.texts),
            "sampling": self.settings.to_json(),
            "max_new_tokens": self.limit,
            "costs": self.costs.describe() if self.costs else None,
            "modelled": modelled_on(self.costs.machine) if self.costs else "",
        }
        if self.costs is not None:
            batches = outlook(results, self.batch_sizes)
            results |= {"best": fastest(batches), "by_batch_size": batches}
        return results

    def _check(self, label: str, drafter: DrawsChains) -> None:
        """ValueError for trees that this drafter cannot be forecast with, and if no chain is short enough for it."""
        check_grown(label, drafter, self.trees)
        deepest = drafter.reader.max_depth
        deeper = [tree.name for tree in self.trees if tree.depth > deepest]
        if deeper or not self._lengths(drafter):
            what = f"trees {', '.join(deeper)} are" if deeper else f"chains of {min(self.lengths)} are"
            raise ValueError(f"{label} drafts {deepest} tokens deep, one with each head, and {what} deeper")

    def _lengths(self, drafter: DrawsChains) -> list[int]:
        """Those that the drafter can draft."""
        return [length for length in self.lengths if length <= drafter.reader.max_depth]

    def figures(
        self, drafter: DrawsChains, progress: Callable[[int, int], None] | None = None
    ) -> dict[Key, list[DraftFigures]]:
        """By source and rule (TREES for trees), the figures of each chain or tree."""
        fixed = [tree for tree in self.trees if tree.widths]
        most = max((width for tree in fixed for width in tree.widths), default=1)
        lengths = self._lengths(drafter)
        deepest = max(*lengths, *(tree.depth for tree in fixed), 1)
        chains: dict[Key, list[ExpectedSteps]] = {}
        held: dict[Key, list[tuple[ExpectedSteps, np.ndarray]]] = {}
        for number, text in enumerate(self.texts, start=1):
            scores = draft_scores(drafter, text.prompt, text.answer, self.settings, deepest, most)
            for source, one in scores.items():
                for rule in self._rules:
                    chains.setdefault((source, rule), []).append(self._chains(drafter, text, one, rule))
                for tree in fixed:
                    held.setdefault((source, tree.name), []).append(self._tree(drafter, text, one, tree))
            if progress is not None:
                progress(number, len(self.texts))
        found: dict[Key, list[DraftFigures]] = {
            key: [_figures(Drafting.chain(length), several, i) for i, length in enumerate(lengths)]
            for key, several in chains.items()
        }
        for source in drafter.exit_sources.values() if self.trees else ():
            found[source, TREES] = [
                self._held(tree, held[source, tree.name])
                if tree.widths
                else _figures(tree, replayed_steps(drafter, self.texts, self.settings, tree, self.limit))
                for tree in self.trees
            ]
        return found

    def _chains(self, drafter: DrawsChains, text: DrawnText, scores: TokenScores, rule: RuleName) -> ExpectedSteps:
        ratios_TK = scores.logprobs_TK
        if not self.settings.greedy:
            ratios_TK = ratios_TK - ahead(text.target_logprobs_T, ratios_TK.shape[1])
        lengths = self._lengths(drafter)
        return self._steps(drafter, text, survival(ratios_TK, max(lengths), rule), lengths)

    def _tree(
        self, drafter: DrawsChains, text: DrawnText, scores: TokenScores, tree: Drafting
    ) -> tuple[ExpectedSteps, np.ndarray]:
        """The steps with a tree of a fixed shape, and the number of tokens from which on it holds each depth."""
        reach_TK = coverage(scores.ranks_TK, tree.widths)
        sizes = [0, *np.cumsum(np.cumprod(tree.widths)).tolist()]
        inside = [reach_TK[: max(len(text.answer) - depth + 1, 0), depth].sum() for depth in range(1, tree.depth + 1)]
        return self._steps(drafter, text, reach_TK, [tree.depth], sizes), np.array(inside)

    def _held(self, tree: Drafting, several: Sequence[tuple[ExpectedSteps, np.ndarray]]) -> DraftFigures:
        counts_K = np.sum([inside for _, inside in several], axis=0)
        whole = [sum(max(len(text.answer) - depth, 0) for text in self.texts) for depth in range(tree.depth)]
        covered = [float(count) / total if total else 0.0 for count, total in zip(counts_K, whole)]
        return _figures(tree, [steps for steps, _ in several], covered=covered)

    def _steps(
        self,
        drafter: DrawsChains,
        text: DrawnText,
        reach_TK: np.ndarray,
        lengths: Sequence[int],
        sizes: Sequence[int] = (),
    ) -> ExpectedSteps:
        return expected_steps(
            reach_TK,
            lengths,
            prompt_tokens=len(text.prompt),
            max_new_tokens=self.limit,
            max_positions=drafter.max_positions,
            sizes=sizes,
        )

    def _rows(self, found: Sequence[DraftFigures], passes: DraftPasses) -> list[dict[str, Any]]:
        return [one.to_json(self.seed) | {"predicted": self._predicted(one, passes)} for one in found]

    def _predicted(self, one: DraftFigures, passes: DraftPasses) -> list[dict[str, Any]] | None:
        """By batch size. Plain decoding is charged no overhead."""
        costs = self.costs
        if costs is None:
            return None
        target, drafts = costs.of(TARGET), [costs.of(name) for name in passes.levels]
        reads = [costs.of(name) for name in passes.reads]
        drafting = replace(one.drafting, passes=(1,)) if passes.at_once else one.drafting
        found = []
        for rows in self.batch_sizes:
            plain = step_seconds(target, (), None, rows, one.context)
            step = step_seconds(target, drafts, drafting, rows, one.context, costs.overhead)
            read_s = sum(cost.even(rows, max(round(one.accepted_length), 1), one.context) for cost in reads)
            found.append(Prediction(rows, one.accepted_length, plain["step_s"], step["step_s"] + read_s).to_json())
        return found


@dataclass(frozen=True, slots=True)
class DraftPasses:
    """The passes of a draft by name: those that every level makes, or all levels at once; and those that read what was
    committed, once per step."""

    levels: Sequence[str]
    at_once: bool = False
    reads: Sequence[str] = ()


def _passes(drafter: DrawsChains, levels: Sequence[str]) -> DraftPasses:
    reader = drafter.reader
    return DraftPasses(levels, reader.at_once, [reader.reading] if reader.reading != reader.entry else [])


def _shape(drafter: Any, layers: int) -> dict[str, Any]:
    """Of the draft, for `plan`: an exit counts as a draft with its layers."""
    reader = drafter.reader
    if not isinstance(reader, TextReader):
        return {"head": reader.shape}
    config = reader.model.config.get_text_config()
    return {"layers": layers, "width": int(config.hidden_size), "heads": int(config.num_attention_heads)}


def _figures(
    drafting: Drafting, texts: Sequence[ExpectedSteps], at: int = 0, covered: Sequence[float] = ()
) -> DraftFigures:
    steps = np.array([one.steps_L[at] for one in texts])
    return DraftFigures(
        drafting=drafting,
        tokens=np.array([one.tokens for one in texts]),
        steps=steps,
        nodes_per_step=float(sum(one.nodes_L[at] for one in texts) / steps.sum()),
        context=float(sum(one.context_L[at] for one in texts) / steps.sum()),
        covered=covered,
    )
