"""Teachers provide the target's distribution at the positions of a batch; LiveTeacher is the frozen target itself.

It reads the same packed rows as the draft, documents kept apart, without gradients. Its logits are computed chunk by
chunk when a loss asks for them, once for all exits. CachedTeacher in cache.py reads distributions from disk.

Legend: N positions that have a label, D hidden, V vocabulary, C positions of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import nn

from draftsmith.infer.models.layers import check_parts, find_parts, shaped_logits
from draftsmith.train.data.batches import Batch
from draftsmith.train.drafts.exits import ExitStates


class TeacherChunk(Protocol):
    """The target's distribution at a chunk of positions."""

    def log_probs(self, temperature: float, draft_log_CV: torch.Tensor) -> torch.Tensor:
        """[C, V] log-probabilities at `temperature`. Tokens whose probability is unknown share the remaining mass in
        proportion to the draft's."""
        ...

    def probs(self, log_CV: torch.Tensor) -> torch.Tensor:
        """[C, V] the probabilities of what `log_probs` returned."""
        ...

    def choice(self) -> torch.Tensor:
        """[C] the likeliest tokens."""
        ...


class TeacherBatch(Protocol):
    """The target's distributions at the N positions of a batch."""

    def chunk(self, chunk: slice) -> TeacherChunk: ...


class Teacher(Protocol):
    vocab_size: int

    def __call__(self, batch: Batch) -> TeacherBatch: ...


class LiveTeacher:
    """The frozen target `model`, moved to the device of the batches."""

    def __init__(self, model: Any) -> None:
        layers = model.config.get_text_config().num_hidden_layers
        self.states = ExitStates(model.requires_grad_(False).eval(), [layers])
        self.vocab_size = int(self.states.head.out_features)

    # Not in inference mode, in which a single rank could not gather sharded weights.
    @torch.no_grad()
    def __call__(self, batch: Batch) -> LiveBatch:
        device = batch["labels"].device
        if self.states.head.weight.device != device:
            self.states.to(device)
        self.states.eval()
        (states_ND,), _ = self.states(batch)
        return LiveBatch(states_ND, OutputHead(self.states.head, self.states.scale, self.states.softcap))


@dataclass(frozen=True, slots=True)
class OutputHead:
    """What makes the target's logits of its states after the final norm."""

    head: nn.Linear
    scale: float
    softcap: float

    @classmethod
    def of(cls, model: Any) -> OutputHead:
        """ValueError where `model` does more than a norm and a head after its last layer."""
        parts = find_parts(model)
        check_parts(model, parts)
        assert isinstance(parts.head, nn.Linear)
        return cls(parts.head, parts.scale, parts.softcap)


class LiveBatch:
    """The target's states at a batch's positions. Only the newest chunk's logits are kept."""

    def __init__(self, states_ND: torch.Tensor, output: OutputHead) -> None:
        self.states_ND = states_ND
        self.output = output
        self._newest: tuple[slice, LiveChunk] | None = None

    def chunk(self, chunk: slice) -> LiveChunk:
        if self._newest is None or self._newest[0] != chunk:
            self._newest = None
            head, states_CD = self.output.head, self.states_ND[chunk]
            with torch.inference_mode(), torch.autocast(states_CD.device.type, enabled=False):
                logits_CV = head(states_CD.to(head.weight.dtype))
                logits_CV = logits_CV.to(torch.promote_types(logits_CV.dtype, torch.float32))
                logits_CV = shaped_logits(logits_CV, self.output.scale, self.output.softcap)
            self._newest = (chunk, LiveChunk(logits_CV))
        return self._newest[1]


class LiveChunk:
    """The logits of a chunk, and both forms of the distribution at the temperature last asked for."""

    def __init__(self, logits_CV: torch.Tensor) -> None:
        self.logits_CV = logits_CV
        self._made: tuple[float, torch.Tensor] | None = None
        self._probs_CV: torch.Tensor | None = None

    def log_probs(self, temperature: float, draft_log_CV: torch.Tensor) -> torch.Tensor:
        if self._made is None or self._made[0] != temperature:
            scaled_CV = self.logits_CV if temperature == 1.0 else self.logits_CV / temperature
            self._made, self._probs_CV = (temperature, torch.log_softmax(scaled_CV, -1)), None
        return self._made[1]

    def probs(self, log_CV: torch.Tensor) -> torch.Tensor:
        assert self._made is not None
        assert log_CV is self._made[1]
        if self._probs_CV is None:
            self._probs_CV = log_CV.exp()
        return self._probs_CV

    def choice(self) -> torch.Tensor:
        return self.logits_CV.argmax(-1)
