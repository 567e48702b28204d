"""Is a difference a numeric tie or a bug? A pass of many tokens rounds differently from a pass of one.

At the first token that differs, three kinds of logits are compared: those of a fresh float32 copy; those of
transformers' own passes in the target's dtype, split in several ways, which show how far rounding goes; and the
engine's own, from decoding both answers again. The difference is a *numeric tie* if rounding explains all of it: the
gap between the two tokens in float32, the engine's error of that gap, and the engine's error over the vocabulary are
each at most twice the rounding error measured there. Anything else is a bug. A tie is evidence and no proof: a fault
smaller than the rounding of the dtype looks the same.

Legend: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.files.errors import first_line
from draftsmith.infer.measure.bench import Measured, Outcome
from draftsmith.infer.measure.compare import first_difference
from draftsmith.infer.measure.runners import Encode, LoopRunner, Messages, Prompt, Question, Runner

CHUNKS = (2, 5, 16, 48)
# How many times the measured rounding error is still a tie.
MOST = 2.0

# Called with (differences judged, differences in all).
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Judgement:
    """Where the answers differ, and what was found there.

    `gap` separates the two tokens' logits in float32, `error` is the rounding error of that gap in the target's dtype,
    `own_error` the engine's; `drift` is the engine's error over the vocabulary in units of the rounding error.
    """

    index: int
    tie: bool
    gap: float
    error: float
    own_error: float = 0.0
    drift: float = 0.0


def judgement(
    index: int, tokens: tuple[int, int], exact_V: torch.Tensor, ways: Sequence[torch.Tensor],
    own: Sequence[torch.Tensor], resolution: float,
) -> Judgement:  # fmt: skip
    """Judge from logits alone. `resolution`: the relative spacing of numbers in the target's dtype."""
    base, other = tokens
    gap = float((exact_V[base] - exact_V[other]).abs())
    if gap == float("inf") or gap != gap:
        return Judgement(index, False, float("inf"), 0.0)

    def gap_error(logits_V: torch.Tensor) -> float:
        return float(((logits_V[base] - logits_V[other]) - (exact_V[base] - exact_V[other])).abs())

    spacing = resolution * float(torch.maximum(exact_V[base].abs(), exact_V[other].abs()))
    error = max([spacing, *map(gap_error, ways)])
    own_error = max(map(gap_error, own), default=0.0)
    rounding = max(_rms(way_V, exact_V) for way_V in ways)
    drift = max((_rms(own_V, exact_V) for own_V in own), default=0.0) / max(rounding, torch.finfo(torch.float32).tiny)
    return Judgement(index, max(gap, own_error) <= MOST * error and drift <= MOST, gap, error, own_error, drift)


def _rms(logits_V: torch.Tensor, exact_V: torch.Tensor) -> float:
    """Over the tokens that no processor has banned."""
    open_V = torch.isfinite(exact_V)
    return float((logits_V[open_V] - exact_V[open_V]).square().mean().sqrt())


@dataclass(slots=True)
class TieJudge:
    """Judges differences between greedy answers of one model. The float32 copy is made when first needed.

    `settings` and `eos_ids` give the penalties and bans that are applied to the logits, as in decoding.
    """

    model: Any
    settings: Settings = field(default_factory=Settings)
    eos_ids: Sequence[int] = ()
    _copy: Any = None
    _known: dict[tuple[int, ...], tuple[torch.Tensor, list[torch.Tensor]]] = field(default_factory=dict)

    def judge(
        self,
        prompt: Sequence[int],
        base: Sequence[int],
        other: Sequence[int],
        own: Callable[[int], Sequence[torch.Tensor]] = lambda index: (),
    ) -> Judgement | None:
        """None if the answers are equal. If only one of them has ended, the difference is no tie.

        `own(index)` gives the logits, after processors, with which the engine chose the token at `index`.
        """
        index = first_difference(list(base), list(other))
        if index is None:
            return None
        if index >= min(len(base), len(other)):
            return Judgement(index, False, float("inf"), 0.0)
        exact_V, ways = self._measure(list(prompt), list(base[:index]))
        seen = [logits_V.to(exact_V.device, torch.float32) for logits_V in own(index)]
        resolution = torch.finfo(next(self.model.parameters()).dtype).eps
        return judgement(index, (base[index], other[index]), exact_V, ways, seen, resolution)

    @torch.inference_mode()
    def _measure(self, prompt: list[int], answer: list[int]) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The logits after prompt + answer in float32, and in the model's dtype for several ways to split it up."""
        key = (*prompt, -1, *answer)
        if key not in self._known:
            if self._copy is None:
                self._copy = _float32_copy(self.model)
            device = next(self._copy.parameters()).device
            logits_V = self._copy(torch.tensor([prompt + answer], device=device), use_cache=False).logits[0, -1]
            splits = [(1, 0), *((size, more) for size in CHUNKS for more in (0, size))]
            ways = [self._in_chunks(prompt, answer, size, more) for size, more in splits]
            ways.append(self._in_chunks(prompt, answer, 1, 0, at_once=True))
            self._known[key] = (self._processed(prompt, answer, logits_V), ways)
        return self._known[key]

    def _in_chunks(
        self, prompt: list[int], answer: list[int], size: int, more: int, at_once: bool = False
    ) -> torch.Tensor:
        """[V] the logits after prompt + answer, the answer fed `size` tokens at a time after the prompt.

        `more` tokens follow in the last pass, as a draft's nodes do; they change only its shape. `at_once` feeds
        everything in one pass.
        """
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        device = next(self.model.parameters()).device
        parts = [prompt[:-1]] if len(prompt) > 1 else []
        rest = prompt[-1:] + answer
        parts += [rest[at : at + size] for at in range(0, len(rest), size)]
        if at_once:
            parts = [prompt + answer]
        last = len(parts[-1]) - 1
        parts[-1] = parts[-1] + prompt[:1] * more
        for part in parts:
            logits = self.model(torch.tensor([part], device=device), past_key_values=cache, use_cache=True).logits
        return self._processed(prompt, answer, logits[0, last].float())

    def _processed(self, prompt: list[int], answer: list[int], logits_V: torch.Tensor) -> torch.Tensor:
        """[V] the logits after the processors: those that greedy decoding chooses from."""
        scores_1V = logits_V[None]
        for processor in self.settings.processors(sorted(self.eos_ids), len(prompt), logits_V.device):
            scores_1V = processor(torch.tensor([prompt + answer], device=logits_V.device), scores_1V)
        return scores_1V[0]


def _float32_copy(model: Any) -> Any:
    """The same weights in float32, in a fresh model without our packing and patching."""
    if (getattr(model, "tp_size", None) or 1) > 1:
        raise RuntimeError("each rank of --tp holds a share of the weights, and a copy to judge by needs them all")
    with torch.random.fork_rng(devices=[]):
        copy = type(model)._from_config(model.config, dtype=torch.float32)
    copy.load_state_dict(model.state_dict())
    return copy.to(next(model.parameters()).device).eval()


def name_ties(
    results: dict[str, Any], measured: Measured, encode: Encode, judge: TieJudge, runners: Sequence[Runner] = (),
    progress: Progress | None = None,
) -> None:  # fmt: skip
    """Mark every difference in `results` as a numeric tie or not, and count the ties of each runner.

    If the judge fails, say because the float32 copy does not fit, `results["not_judged"]` holds the reason and the
    remaining differences have no judgement. `runners` are those that answered: their own logits are judged too.
    """
    by_name = {runner.name: runner for runner in runners}
    cases = [(name, one) for name, row in results["drafters"].items() for one in row["differences"]]
    results.pop("not_judged", None)
    try:
        for done, (name, difference) in enumerate(cases, start=1):
            found = _judge(measured, name, difference, encode, judge, by_name)
            figures = ("tie", "gap", "error", "own_error", "drift")
            difference |= {figure: getattr(found, figure) for figure in figures}
            if progress is not None:
                progress(done, len(cases))
    except (MemoryError, RuntimeError) as error:
        results["not_judged"] = first_line(error)
    for row in results["drafters"].values():
        row["ties"] = sum(difference.get("tie", False) for difference in row["differences"])
        row["not_judged"] = sum("tie" not in difference for difference in row["differences"])


def _judge(
    measured: Measured, name: str, difference: dict[str, Any], encode: Encode, judge: TieJudge,
    runners: dict[str, Runner],
) -> Judgement:  # fmt: skip
    question_id, turn = difference["question_id"], difference["turn"]
    question = next(one for one in measured.questions if one.id == question_id)
    plain = measured.outcomes[measured.baseline][question_id][0]
    other = measured.outcomes[name][question_id][difference["repeat"]]

    def own(index: int) -> list[torch.Tensor]:
        sides = ((measured.baseline, 0), (name, difference["repeat"]))
        decoders = [(runners.get(side), side, repeat) for side, repeat in sides]
        return [
            _logits_again(measured, runner, repeat, question, turn, index, encode)
            for runner, _, repeat in decoders
            if isinstance(runner, LoopRunner)
        ]

    found = judge.judge(encode(_messages(question, plain, turn)), plain.token_ids[turn], other.token_ids[turn], own)
    assert found is not None
    return found


def _messages(question: Question, outcome: Outcome, turn: int) -> Messages:
    """What was asked at `turn`, after the answers of `outcome`."""
    messages = question.head()
    for earlier in range(turn):
        messages.append({"role": "user", "content": question.turns[earlier]})
        messages.append({"role": "assistant", "content": outcome.turns[earlier].text})
    return [*messages, {"role": "user", "content": question.turns[turn]}]


def _logits_again(
    measured: Measured, runner: LoopRunner, repeat: int, question: Question, turn: int, index: int, encode: Encode
) -> torch.Tensor:
    """[V] the engine's logits at token `index` of a turn, its whole batch decoded again as it was measured."""
    size = measured.batch_size
    first = measured.questions.index(question) // size * size
    prompts, answers = [], {}
    for one in measured.questions[first : first + size]:
        outcome = measured.outcomes[runner.name][one.id][repeat]
        if turn < len(outcome.turns):
            prompts.append(Prompt(f"{one.id}/{turn}", encode(_messages(one, outcome, turn))))
            answers[prompts[-1].key] = outcome.token_ids[turn]
    return runner.logits_again(prompts, answers, f"{question.id}/{turn}", index)
