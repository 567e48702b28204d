"""Replay: how much of recorded answers drafters would have drafted. No target is needed.

Replay runs the decoding loop with a recorded target, so it gives accepted_length, hit_rate, nodes and the time to
propose; a costs file turns them into predicted speedups (predicted.py). It is exact for outright drafts at any
temperature (the target's token is drawn first and looked up), for sampled drafts at temperature 0 only. Chains that are
drawn at a temperature are forecast instead (forecast/), from the log-probabilities of the recorded tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol, runtime_checkable

from draftsmith.infer.contract.protocols import Budget, DocumentLearner, Drafter, LearnsAnswers, couples
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings, resolve_settings
from draftsmith.infer.contract.trace import Generation, StepTrace
from draftsmith.infer.costs.identity import machine_text, modelled_on
from draftsmith.infer.costs.pass_costs import Costs
from draftsmith.infer.engine.engine import BUDGET, Engine
from draftsmith.infer.measure.bootstrap import ratio_interval
from draftsmith.infer.measure.forecast.drafts import DrawsChains, bind_draft, drawn_chains
from draftsmith.infer.measure.forecast.forecast import Forecast
from draftsmith.infer.measure.forecast.texts import logged_settings, logged_texts
from draftsmith.infer.measure.metrics import per_answer, trace_figures
from draftsmith.infer.measure.predicted import BATCH_SIZES, conclusion, pays_if, predict_replayed
from draftsmith.infer.measure.recordings import Held, Recording, leakage, prompt_to_find, without_ends
from draftsmith.infer.models.recorded_target import RecordedTarget
from draftsmith.infer.rules.named import DEFAULT


class ReplayProgress(Protocol):
    def __call__(self, done: int, total: int, name: str) -> None: ...


@runtime_checkable
class Holder(Protocol):
    """A drafter with a store that can be searched for an answer or a prompt."""

    def holds(self, ids: Sequence[int]) -> bool:
        """Whether `ids` occur in a row within one document."""
        ...


@dataclass(slots=True)
class Replayed:
    """One drafter's generations, and what it held of each beforehand (empty for a drafter without a store)."""

    done: list[Generation] = field(default_factory=list)
    held: list[Held] = field(default_factory=list)

    @property
    def traces(self) -> list[StepTrace]:
        return [trace for generation in self.done for trace in generation.traces]


@dataclass(frozen=True, slots=True)
class Replay:
    """Recorded answers to replay, in order, and how.

    Args:
        streams: the recorded answers.
        vocab_size: token ids from here on are refused.
        tokenizer: its special tokens end an answer, and stores are checked against it.
        temperature: at which the answers were sampled.
        budget: of a draft.
        rule: the verification rule, by name.
        seed: of the intervals.
        arrival: add every answer, once replayed, to the drafters that can take it.
        costs: of a machine's passes; if given, speedups are predicted.
        batch_sizes: to predict speedups for.
        draft_ratio: how long a drafter's model takes on the machine of `costs`, over how long it takes here; None: no
            longer.
    """

    streams: Sequence[Recording]
    vocab_size: int
    tokenizer: Any = None
    temperature: float = 0.0
    budget: Budget = BUDGET
    rule: str = DEFAULT
    seed: int = 0
    arrival: bool = False
    costs: Costs | None = None
    batch_sizes: Sequence[int] = BATCH_SIZES
    draft_ratio: Callable[[Drafter], float] | None = None

    def __post_init__(self) -> None:
        if self.costs is not None and (not self.batch_sizes or min(self.batch_sizes) < 1):
            raise ValueError("batch_sizes must be numbers of rows, 1 or more")
        for stream in self.streams:
            for token in (*stream.prompt, *stream.answer):
                if not 0 <= token < self.vocab_size:
                    raise ValueError(
                        f"{stream.key} holds token id {token}, but the tokenizer ends at {self.vocab_size}"
                    )

    def results(self, drafters: dict[str, Drafter], progress: ReplayProgress | None = None) -> dict[str, Any]:
        """The figures of every drafter over all streams, as JSON."""
        self._check_coupled(drafters)
        drawn = drawn_chains(drafters) if self.temperature > 0 else {}
        forecast = self._forecast(drawn, progress) if drawn else None
        found = self.run({name: one for name, one in drafters.items() if name not in drawn}, progress)
        rows = {
            name: self.figures(one) | {"predicted": self._predicted(one, drafters[name])} for name, one in found.items()
        }
        for row in rows.values():
            row["pays_if"] = pays_if(row, row["predicted"])
        return {
            "drafters": rows,
            "forecast": forecast,
            "streams": len(self.streams),
            "tokens": sum(len(one.answer) for one in self.streams),
            "temperature": self.temperature,
            "budget": {"nodes": self.budget.nodes, "depth": self.budget.depth},
            "rule": self.rule,
            "arrival": self.arrival,
            "costs": self.costs.describe() if self.costs else None,
            "modelled": modelled_on(self.costs.machine) if self.costs else "",
            "conclusion": conclusion(rows, self._where()) if rows else None,
        }

    def run(self, drafters: dict[str, Drafter], progress: ReplayProgress | None = None) -> dict[str, Replayed]:
        """Every drafter's generations; `progress` is called after each stream."""
        if self.arrival and not any(_learners(drafter) for drafter in drafters.values()):
            raise ValueError(f"none of {', '.join(drafters)} can take in answers as they arrive; rest can")
        for name, drafter in drafters.items():
            if isinstance(drafter, LearnsAnswers) and drafter.learns and not self.arrival:
                raise ValueError(
                    f"drafter {name!r} has nothing to draft from but the answers that arrive: add --arrival, or give "
                    "it a store (rest:STORE, or --split)"
                )
        answers = {one.key: one.answer for one in self.streams}
        target = RecordedTarget(answers, self.vocab_size, self.tokenizer, sampled=self.temperature > 0)
        found = {}
        for name, drafter in drafters.items():
            drafter.bind(target)
            found[name] = self._run_one(drafter, target, None if progress is None else partial(progress, name=name))
        return found

    def _run_one(
        self, drafter: Drafter, target: RecordedTarget, progress: Callable[[int, int], None] | None
    ) -> Replayed:
        found, settings = Replayed(), Settings(temperature=self.temperature, seed=self.seed)
        ends = set() if self.tokenizer is None else set(self.tokenizer.all_special_ids)
        engine = Engine(target, drafter, budget=self.budget, rule=self.rule, learn=False)
        for number, stream in enumerate(self.streams, start=1):
            if isinstance(drafter, Holder):
                answer, prompt = without_ends(stream.answer, ends), prompt_to_find(stream, ends)
                found.held.append(Held(drafter.holds(answer), drafter.holds(prompt)))
            row = Row(stream.key, list(stream.prompt), settings, Stops(len(stream.answer)))
            found.done += engine.run([row], strict=True)
            if self.arrival:
                for learner in _learners(drafter):
                    if isinstance(learner, LearnsAnswers):
                        learner.add_answer(row)
                    else:
                        learner.add_document(stream.answer)
            if progress is not None:
                progress(number, len(self.streams))
        return found

    def figures(self, found: Replayed) -> dict[str, Any]:
        """The figures of a benchmark that a replay can give, under the same names; with and without leaked ones."""
        figures = self._counts(found.done)
        times = sorted(trace.propose_s for trace in found.traces)
        figures["propose_p50_s"] = times[len(times) // 2]
        figures["propose_p99_s"] = times[int(len(times) * 0.99)]
        figures["leakage"] = None
        if found.held:
            clean = [generation for generation, held in zip(found.done, found.held) if not held.any]
            figures["leakage"] = leakage(self.streams, found.held)
            figures["leakage"]["without"] = self._counts(clean) if clean else None
        return figures

    def _counts(self, done: Sequence[Generation]) -> dict[str, Any]:
        known = trace_figures([trace for generation in done for trace in generation.traces])
        committed, steps = per_answer(done)
        figures = {key: known[key] for key in ("accepted_length", "acceptance_rate", "hit_rate", "nodes_per_step")}
        figures["accepted_length_interval"] = ratio_interval(committed, steps, seed=self.seed)
        figures["by_depth"] = known["by_depth"]
        return figures | {"steps": sum(steps), "total": len(done)}

    def _check_coupled(self, drafters: Mapping[str, Drafter]) -> None:
        """Coupled drafts are outright, but fit only texts drawn with the noise that they share."""
        for name, drafter in drafters.items():
            if self.temperature > 0 and couples(drafter):
                said = f"{name}: coupled drafts share the noise of the target's draws, which recorded answers lack: "
                coupled = [part.name for part in _parts(drafter) if couples(part)]
                if coupled != [drafter.name]:
                    raise ValueError(
                        f"{said}replay the likeliest tokens of each draft model in the mix instead, as in "
                        f"mix=pld+{coupled[0]}:MODEL[sample=likeliest]"
                    )
                raise ValueError(
                    f"{said}add [sample=likeliest] to replay outright drafts only, or [sample=drawn] to forecast chains"
                )

    def _forecast(self, drawn: Mapping[str, DrawsChains], progress: ReplayProgress | None) -> dict[str, Any]:
        """Of drawn chains of every length up to the longest that a drafter draws."""
        settings = resolve_settings(None, **logged_settings(self.streams, {"temperature": self.temperature}))
        for drafter in drawn.values():
            bind_draft(drafter, None, self.tokenizer)
        bare = next((one.key for one in self.streams if not one.logprobs), None)
        if bare is not None:
            raise ValueError(
                f"{bare} has no log-probabilities, from which drawn drafts ({', '.join(drawn)}) are forecast: log "
                "them, write answers with `draftsmith answers --logprobs`, or replay outright drafts only, as with "
                "small:MODEL[sample=likeliest]"
            )
        texts, longest = logged_texts(self.streams, settings), max(one.drawn_chain for one in drawn.values())
        lengths = range(1, longest + 1)
        run = Forecast(texts, settings, lengths, seed=self.seed, costs=self.costs, batch_sizes=self.batch_sizes)
        return run.results(drawn, progress)

    def _where(self) -> str:
        """What the costs are of, in the closing sentence."""
        if self.costs is None:
            return ""
        return modelled_on(self.costs.machine) or f"measured on {machine_text(self.costs.machine)}"

    def _predicted(self, found: Replayed, drafter: Drafter) -> dict[str, Any] | None:
        if self.costs is None:
            return None
        ratio = self.draft_ratio(drafter) if self.draft_ratio else 1.0
        return predict_replayed(found.traces, self.costs, self.batch_sizes, ratio)


def _parts(drafter: Drafter) -> Sequence[Drafter]:
    """The drafters of a mix; a single one is its own part."""
    found: Sequence[Drafter] = getattr(drafter, "drafters", [drafter])
    return found


def _learners(drafter: Drafter) -> list[LearnsAnswers | DocumentLearner]:
    """Its parts that can take in an answer."""
    return [part for part in _parts(drafter) if isinstance(part, (LearnsAnswers, DocumentLearner))]
