"""Is a difference a numeric tie or a bug? A pass of many tokens rounds differently from a pass of one.

A first difference between two greedy answers is a *numeric tie* if, in a float32 copy over their common prefix, the two
tokens' logits lie within twice the error measured there between passes of one token and passes of several. Anything
else is a bug. The judge uses none of our decoding code: the copy and the measured passes run through transformers' own
forward and cache.

Legend: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.measure.bench import Measured
from draftsmith.infer.measure.compare import first_difference
from draftsmith.infer.measure.runners import Encode, Messages

CHUNKS = (2, 5, 16, 48)


@dataclass(frozen=True, slots=True)
class Judgement:
    """Where the answers differ, the gap between the two logits in float32, and the rounding error there."""

    index: int
    tie: bool
    gap: float
    error: float


@dataclass(slots=True)
class TieJudge:
    """Judges differences between greedy answers of one model. The float32 copy is made when first needed.

    `settings` and `eos_ids` give the penalties and bans that are applied to the logits, as in decoding.
    """

    model: Any
    settings: Settings = field(default_factory=Settings)
    eos_ids: Sequence[int] = ()
    _copy: Any = None
    _known: dict[tuple[int, ...], tuple[torch.Tensor, float]] = field(default_factory=dict)

    def judge(self, prompt: Sequence[int], base: Sequence[int], other: Sequence[int]) -> Judgement | None:
        """None if the answers are equal. If only one of them has ended, the difference is no tie."""
        index = first_difference(list(base), list(other))
        if index is None:
            return None
        if index >= min(len(base), len(other)):
            return Judgement(index, False, float("inf"), 0.0)
        exact_V, error = self._measure(list(prompt), list(base[:index]))
        gap = float((exact_V[base[index]] - exact_V[other[index]]).abs())
        return Judgement(index, gap <= 2 * error, gap, error)

    @torch.inference_mode()
    def _measure(self, prompt: list[int], answer: list[int]) -> tuple[torch.Tensor, float]:
        """The float32 logits after prompt + answer, and the largest difference between ways to split it into passes."""
        key = (*prompt, -1, *answer)
        if key not in self._known:
            if self._copy is None:
                self._copy = _float32_copy(self.model)
            device = next(self._copy.parameters()).device
            logits_V = self._copy(torch.tensor([prompt + answer], device=device), use_cache=False).logits[0, -1]
            exact_V = self._processed(prompt, answer, logits_V)
            single_V = self._in_chunks(prompt, answer, 1, 0)
            open_V = torch.isfinite(single_V)
            ways = [(size, more) for size in CHUNKS for more in (0, size)]
            passes = [self._in_chunks(prompt, answer, size, more) for size, more in ways]
            passes.append(self._in_chunks(prompt, answer, 1, 0, at_once=True))
            error = max(float((logits_V - single_V)[open_V].abs().max()) for logits_V in passes)
            self._known[key] = (exact_V, error)
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
    with torch.random.fork_rng(devices=[]):
        copy = type(model)._from_config(model.config, dtype=torch.float32)
    copy.load_state_dict(model.state_dict())
    return copy.to(next(model.parameters()).device).eval()


def name_ties(results: dict[str, Any], measured: Measured, encode: Encode, judge: TieJudge) -> None:
    """Mark every difference in `results` as a numeric tie or not, and count the ties of each runner."""
    for name, figures in results["drafters"].items():
        for difference in figures["differences"]:
            plain = measured.outcomes[measured.baseline][difference["question_id"]][0]
            other = measured.outcomes[name][difference["question_id"]][difference["repeat"]]
            turn = difference["turn"]
            question = next(one for one in measured.questions if one.id == difference["question_id"])
            messages: Messages = question.head()
            for earlier in range(turn):
                messages.append({"role": "user", "content": question.turns[earlier]})
                messages.append({"role": "assistant", "content": plain.turns[earlier].text})
            messages.append({"role": "user", "content": question.turns[turn]})
            found = judge.judge(encode(messages), plain.token_ids[turn], other.token_ids[turn])
            assert found is not None
            difference |= {"tie": found.tie, "gap": found.gap, "error": found.error}
        figures["ties"] = sum(difference["tie"] for difference in figures["differences"])
