"""Distillation: a draft learns the target's own distribution at every position of the assistant's turns (arXiv
2402.01528 made its wide shallow drafts so; 2310.08461 compares the divergences).

The loss is a weighted mix of divergences.py's, among them those of the rule that will run; any exit of a sorted draft
is distilled alike (soft.py's weights). The distributions are the frozen target's, live or from a cache on disk, and a
share of the batches may be the draft's own text (on_policy.py). Data, order and trainer are not known here.

Legend: E exits, N positions, D hidden, V vocabulary, C positions of a chunk.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

import torch

from draftsmith.train.data.batches import rank
from draftsmith.train.data.on_policy import OnPolicy
from draftsmith.train.drafts.context import TrainContext
from draftsmith.train.drafts.exits import ExitStates
from draftsmith.train.objectives.chunked_loss import chunked_loss
from draftsmith.train.objectives.divergences import OF_CHOICES, find_divergence
from draftsmith.train.objectives.objective import LossSums
from draftsmith.train.objectives.soft import SoFT
from draftsmith.train.teacher.cache_build import open_or_build
from draftsmith.train.teacher.distributions import Distributions
from draftsmith.train.teacher.live import LiveTeacher, Teacher

# A loss holds several forms of a chunk's distributions at once; smaller chunks stay in a CPU's cache as well.
CHUNK_ENTRIES = 1 << 20
CHUNK_ENTRIES_CUDA = 1 << 25


class Distil:
    """The objective of `draftsmith train distil`.

    Args:
        losses: name -> weight; names are divergences.py's, or dotted paths.
        exits: numbers of layers after which the draft can be left; not given: only its whole depth.
        exit_weights: one per exit; not given: equal. They are scaled to sum to one.
        temperature: of both distributions that are compared; 0: the target is greedy (greedy, topk and cross_entropy
            only).
        top_k: of the loss `topk`.
        sharpness: of the losses `greedy` and `topk`.
        teacher: live, or the folder of a cache, which is made where there is none.
        teacher_top_k: tokens per position that a cache keeps.
        on_policy: the share of micro-batches whose answers the draft writes itself.
        seed: of on-policy answers.
    """

    def __init__(
        self,
        losses: Mapping[str, float],
        *,
        exits: Sequence[int] | None = None,
        exit_weights: Sequence[float] | None = None,
        temperature: float = 1.0,
        top_k: int = 4,
        sharpness: float = 1.0,
        teacher: str = "live",
        teacher_top_k: int = 64,
        on_policy: float = 0.0,
        seed: int = 0,
    ) -> None:
        _check(losses, temperature, top_k, sharpness)
        if on_policy and (teacher != "live" or "cross_entropy" in losses):
            raise ValueError(
                "on-policy answers need a live teacher, for no cache knows them, and no cross_entropy, for it would "
                "teach the draft its own mistakes"
            )
        OnPolicy(on_policy, temperature, seed)
        if exits is None and exit_weights is not None:
            raise ValueError(f"exit weights {list(exit_weights)} without exits: name the exits as well")
        self.losses = dict(losses)
        self._exits = None if exits is None else list(exits)
        self.exit_weights = None if exits is None else SoFT(exits, exit_weights).weights
        self.temperature = temperature
        self.top_k = top_k
        self.sharpness = sharpness
        self.teacher = teacher
        self.teacher_top_k = teacher_top_k
        self.on_policy = on_policy
        self.seed = seed

    def exits(self, num_layers: int) -> list[int]:
        return [num_layers] if self._exits is None else SoFT(self._exits).exits(num_layers)

    def begin(self, run: TrainContext) -> None:
        self.read: Teacher
        if self.teacher == "live":
            self.read = LiveTeacher(run.target)
            size = sum(weight.numel() * weight.element_size() for weight in run.target.parameters())
            if rank() == 0:
                print(f"the live teacher takes {size / 2**30:.2f} GiB more on each device", file=sys.stderr)
        else:
            temperature = self.temperature or 1.0  # its order is all that temperature 0 asks for
            self.read = open_or_build(self.teacher, run, top_k=self.teacher_top_k, temperature=temperature)
        vocab_size = run.draft.config.get_text_config().vocab_size
        if self.read.vocab_size != vocab_size:
            raise ValueError(f"the teacher has {self.read.vocab_size} tokens and the draft {vocab_size}: not the same")
        self.rewrite = OnPolicy(self.on_policy, self.temperature, self.seed)

    def __call__(self, draft: ExitStates, batch: dict[str, torch.Tensor]) -> LossSums:
        if draft.training:
            batch = self.rewrite(draft.model, batch)
        distributions = self.read(batch)
        states_END, labels_N = draft(batch)
        terms = [(find_divergence(name), weight) for name, weight in self.losses.items()]

        def loss(logits_CV: torch.Tensor, chunk: slice, slope: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
            both = Distributions(
                logits_CV, distributions.chunk(chunk), labels_N[chunk], self.temperature, self.top_k, self.sharpness
            )
            summed, slope_CV = logits_CV.new_zeros(()), None
            for term, weight in terms:
                loss_C, term_CV = term(both)
                summed = summed + weight * loss_C.sum()
                if slope:
                    slope_CV = term_CV * weight if slope_CV is None else slope_CV.add_(term_CV, alpha=weight)
            return summed, slope_CV

        weights = self.exit_weights or [1.0]
        entries = CHUNK_ENTRIES_CUDA if labels_N.device.type == "cuda" else CHUNK_ENTRIES
        return LossSums(
            *chunked_loss(
                states_END, draft.head, weights, loss, scale=draft.scale, softcap=draft.softcap, chunk_entries=entries
            )
        )


def _check(losses: Mapping[str, float], temperature: float, top_k: int, sharpness: float) -> None:
    if not losses or min(losses.values()) < 0 or sum(losses.values()) <= 0:
        raise ValueError(f"losses {dict(losses)}: name at least one, with weights that are not negative nor all zero")
    for name in losses:
        find_divergence(name)
    if temperature < 0 or sharpness <= 0 or top_k < 1:
        raise ValueError(f"temperature {temperature} below 0, sharpness {sharpness} not above 0, or top_k {top_k} < 1")
    comparing = [name for name in losses if name not in OF_CHOICES]
    if temperature == 0 and comparing:
        raise ValueError(
            f"temperature 0 leaves no distribution to compare for {comparing[0]}: only {', '.join(OF_CHOICES)}"
        )
