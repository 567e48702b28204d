"""What every check of a draft measures with: the target's own greedy answers, and how well a draft predicts them.

A suspected fault is tried: the draft is mended in memory, and if it then predicts the answers better, by more than
chance, the fault is there.

Legend: N tokens of answers, T positions of a text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from draftsmith.infer.contract.protocols import Drafter
from draftsmith.infer.contract.row import Row
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.contract.trace import Generation
from draftsmith.infer.costs.policy import Policy
from draftsmith.infer.engine.engine import Engine
from draftsmith.infer.measure.calibrate.answers import Answered, answer_prompts
from draftsmith.infer.measure.forecast.drafts import draft_scores
from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.infer.models.layers import find_parts
from draftsmith.infer.models.positions import max_positions
from draftsmith.infer.text.record import Record
from draftsmith.infer.text.rendering import Template

Progress = Callable[[str], None]

# A token's loss is at most this: one that the draft rules out must not outweigh all others.
WORST = 20.0
# A mend has to gain this many nats per token, and this many standard errors.
LEAST_GAIN, LEAST_ERRORS = 0.1, 3.0


@dataclass(frozen=True, slots=True)
class Exam:
    """A target, the template that it is served with, and its greedy answers."""

    target: HFTarget
    name: str
    template: Template
    answers: Sequence[Answered]
    max_new_tokens: int
    batch_size: int = 8
    say: Progress = lambda line: None

    @classmethod
    def sit(
        cls,
        target: HFTarget,
        name: str,
        template: Template,
        records: Sequence[Record],
        max_new_tokens: int,
        batch_size: int = 8,
        say: Progress = lambda line: None,
    ) -> Exam:
        """Let the target answer the first turn of each record."""
        first = [replace(one, messages=one.messages[: bool(one.system)], turns=one.questions[:1]) for one in records]
        stops = target.stops(max_new_tokens)
        answers = answer_prompts(
            target, first, template, Settings(), stops, batch_size=batch_size,
            progress=lambda done, of: say(f"the target's answers: {done}/{of}"),
        )  # fmt: skip
        return cls(target, name, template, answers, max_new_tokens, batch_size, say)

    @property
    def model(self) -> Any:
        return self.target.model

    def decode(self, drafter: Drafter) -> list[Generation]:
        """The same answers, drafted by `drafter`, which is bound first; raises the first row's error."""
        drafter.bind(self.target)
        stops = self.target.stops(self.max_new_tokens)
        rows = [Row(one.key, list(one.prompt), Settings(), stops, self.target.tokenizer) for one in self.answers]
        # An empty policy limits nothing: what is measured is the draft, not what pays on this machine.
        with Engine(self.target, drafter, batch_size=self.batch_size, policy=Policy()) as engine:
            return engine.run(rows, strict=True)

    def fitting(self, model: Any) -> list[Answered]:
        """The answers whose ids the model has, within its context."""
        rows, limit = model.get_input_embeddings().weight.shape[0], max_positions(model.config.get_text_config())
        texts = ((one, [*one.prompt, *one.answer]) for one in self.answers)
        return [one for one, ids in texts if max(ids) < rows and len(ids) <= limit]


@torch.inference_mode()
def token_losses(model: Any, answers: Sequence[Answered]) -> torch.Tensor:
    """[N] of a causal LM: -log(draft_probs) of every answer token."""
    return torch.cat([_losses(model, one, None)[-1] for one in answers])


@torch.inference_mode()
def losses_by_layer(model: Any, answers: Sequence[Answered]) -> list[torch.Tensor]:
    """[N] for each number of layers, from 1 on: as if the model ended there."""
    parts = find_parts(model)
    return [torch.cat(layers) for layers in zip(*(_losses(model, one, parts) for one in answers))]


@torch.inference_mode()
def logits_finite(model: Any, answers: Sequence[Answered]) -> bool:
    """Whether all logits of these texts are numbers; a token that a model bans (-inf) is none of the others."""
    for one in answers:
        logits_TV = _forward(model, one).logits[0]
        if bool(logits_TV.isnan().any()) or not bool(logits_TV.amax(-1).isfinite().all()):
            return False
    return True


def head_losses(drafter: Any, exam: Exam) -> torch.Tensor:
    """[N] of a head that is run over the text (EAGLE), at the first token that it drafts."""
    drafter.bind(exam.target)
    found = []
    for one in exam.answers:
        (scores,) = draft_scores(drafter, one.prompt, one.answer, Settings(temperature=1.0)).values()
        found.append(torch.from_numpy(scores.logprobs_TK[:, 0]))
    return _capped(-torch.cat(found))


def gain(before_N: torch.Tensor, after_N: torch.Tensor, guessing: float = math.inf) -> float:
    """The nats per token that a mend gains; 0 if that may be chance, or if what is mended still predicts no better than
    `guessing`. Tokens that cannot be drafted either way do not count."""
    drafted_N = (before_N < WORST) | (after_N < WORST)
    gained_N = (before_N - after_N)[drafted_N].double()
    if len(gained_N) < 2 or float(after_N[drafted_N].mean()) >= guessing:
        return 0.0
    mean, error = float(gained_N.mean()), float(gained_N.std()) / len(gained_N) ** 0.5
    return mean if mean >= max(LEAST_GAIN, LEAST_ERRORS * error) else 0.0


def _forward(model: Any, one: Answered, layers: bool = False) -> Any:
    device = model.get_input_embeddings().weight.device
    ids_1T = torch.tensor([[*one.prompt, *one.answer]], device=device)
    return model(input_ids=ids_1T, use_cache=False, output_hidden_states=layers)


def _losses(model: Any, one: Answered, parts: Any | None) -> list[torch.Tensor]:
    output = _forward(model, one, parts is not None)
    start, end = len(one.prompt) - 1, len(one.prompt) + len(one.answer) - 1
    logits = [] if parts is None else [parts.logits(state[0, start:end]) for state in output.hidden_states[1:-1]]
    answer_N = torch.tensor(one.answer, device=output.logits.device)
    return [
        _capped(torch.nn.functional.cross_entropy(found_NV.float(), answer_N, reduction="none"))
        for found_NV in [*logits, output.logits[0, start:end]]
    ]


def _capped(losses_N: torch.Tensor) -> torch.Tensor:
    return losses_N.float().cpu().nan_to_num(WORST, WORST, WORST).clamp(max=WORST)
