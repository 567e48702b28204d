"""Distillation: the draft learns the target's distribution at every position of the assistant's turns (arXiv 2402.01528
trains its wide shallow drafts this way; 2310.08461 compares the divergences).

The loss is a weighted mix of those in divergences.py, at any exits of the draft (weighted as in soft.py). The target's
distributions come from the live, frozen target or from a cache on disk, and some of the batches can be text that the
draft wrote itself (on_policy.py).

Legend: E exits, N positions, D hidden, V vocabulary, C positions of a chunk.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from draftsmith.train.objectives.soft import SoFT

if TYPE_CHECKING:  # `--help` reads this class, and should not wait for torch
    import torch

    from draftsmith.train.drafts.exits import ExitStates, TrainContext
    from draftsmith.train.objectives.objective import LossSums
    from draftsmith.train.teacher.live import Teacher

# A loss holds several forms of a chunk's distributions at once; smaller chunks also stay in a CPU's cache.
CHUNK_ENTRIES = 1 << 20
CHUNK_ENTRIES_CUDA = 1 << 25


class Distil:
    """The objective of `draftsmith train distil`.

    Args:
        losses: name and weight of forward_kl, reverse_kl, jsd, total_variation, cross_entropy, or of the acceptance of
            the rule that will run: sampled, greedy, topk; or the dotted path of a function. Default: forward_kl alone.
        exits: layer counts after which the draft can exit; the last is num_layers. Default: only the whole draft.
        exit_weights: loss weight of each exit, scaled to sum to one; default: equal.
        temperature: temperature of both distributions; 0 for a target that will decode greedily (losses greedy, topk
            and cross_entropy only).
        tree_top_k: tokens that a tree will try at a node, for the loss topk.
        sharpness: the losses greedy and topk replace the argmax by softmax(sharpness x logits).
        teacher: live, or the folder of a cache of the target's distributions, which is built if it is missing.
        teacher_top_k: tokens per position in that cache.
        on_policy: share of the rows whose answers the draft writes itself.
    """

    def __init__(
        self,
        losses: dict[str, float] | None = None,
        exits: Sequence[int] | None = None,
        exit_weights: Sequence[float] | None = None,
        temperature: float = 1.0,
        tree_top_k: int = 4,
        sharpness: float = 1.0,
        teacher: str = "live",
        teacher_top_k: int = 64,
        on_policy: float = 0.0,
    ) -> None:
        from draftsmith.train.data.on_policy import check_share

        self.losses = {"forward_kl": 1.0} if losses is None else losses
        check_losses(self.losses, temperature, tree_top_k, sharpness)
        if on_policy and (teacher != "live" or "cross_entropy" in self.losses):
            raise ValueError(
                "on-policy answers need a live teacher (a cache does not contain them) and no cross_entropy (it would "
                "teach the draft its own mistakes)"
            )
        check_share(on_policy)
        if exits is None and exit_weights is not None:
            raise ValueError(f"exit weights {list(exit_weights)} without exits: give --exits as well")
        self._exits = None if exits is None else list(exits)
        self.exit_weights = None if exits is None else SoFT(exits, exit_weights).weights
        self.temperature = temperature
        self.top_k = tree_top_k
        self.sharpness = sharpness
        self.teacher = teacher
        self.teacher_top_k = teacher_top_k
        self.on_policy = on_policy

    @property
    def whole_draft(self) -> bool:
        return self.on_policy > 0

    @property
    def reads_cache(self) -> bool:
        return self.teacher != "live"

    def exits(self, num_layers: int) -> list[int]:
        return [num_layers] if self._exits is None else SoFT(self._exits).exits(num_layers)

    def begin(self, run: TrainContext) -> None:
        from draftsmith.train.data.on_policy import OnPolicy
        from draftsmith.train.teacher.cache_build import open_or_build
        from draftsmith.train.teacher.live import LiveTeacher

        self.read: Teacher
        if self.teacher == "live":
            self.read = LiveTeacher(run.target)
        else:
            temperature = self.temperature or 1.0  # at temperature 0 only the order of the tokens matters
            self.read = open_or_build(self.teacher, run, top_k=self.teacher_top_k, temperature=temperature)
        vocab_size = run.draft.config.get_text_config().vocab_size
        if self.read.vocab_size != vocab_size:
            raise ValueError(f"the teacher's vocabulary has {self.read.vocab_size} tokens, the draft's {vocab_size}")
        self.rewrite = OnPolicy(self.on_policy, self.temperature, run.seed)

    def __call__(self, draft: ExitStates, batch: dict[str, torch.Tensor]) -> LossSums:
        from draftsmith.train.objectives.chunked_loss import chunked_loss
        from draftsmith.train.objectives.divergences import Distributions, find_divergence, mixed

        if draft.training:
            batch = self.rewrite(draft.model, batch)
        distributions = self.read(batch)
        states_END, labels_N = draft(batch)
        terms = [(find_divergence(name), weight) for name, weight in self.losses.items()]

        def loss(logits_CV: torch.Tensor, chunk: slice, slope: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
            both = Distributions(
                logits_CV, distributions.chunk(chunk), labels_N[chunk], self.temperature, self.top_k, self.sharpness
            )
            return mixed(terms, both, slope)

        weights = self.exit_weights or [1.0]
        entries = chunk_entries(labels_N.device.type)
        return chunked_loss(
            states_END, draft.head, weights, loss, scale=draft.scale, softcap=draft.softcap, chunk_entries=entries
        )


def chunk_entries(device: str) -> int:
    """The entries of a chunk's logits, for losses that compare distributions."""
    return CHUNK_ENTRIES_CUDA if device == "cuda" else CHUNK_ENTRIES


def check_losses(losses: Mapping[str, float], temperature: float, top_k: int, sharpness: float) -> None:
    """ValueError for losses that are unknown or that the temperature does not leave."""
    from draftsmith.train.objectives.divergences import OF_CHOICES, find_divergence

    if not losses or min(losses.values()) < 0 or sum(losses.values()) <= 0:
        raise ValueError(f"losses {dict(losses)}: give at least one, with weights that are not negative, nor all zero")
    for name in losses:
        find_divergence(name)
    if temperature < 0 or sharpness <= 0 or top_k < 1:
        raise ValueError(f"temperature {temperature} < 0, sharpness {sharpness} <= 0, or tree_top_k {top_k} < 1")
    comparing = [name for name in losses if name not in OF_CHOICES]
    if temperature == 0 and comparing:
        raise ValueError(
            f"{comparing[0]} compares distributions, which temperature 0 does not leave; use {', '.join(OF_CHOICES)}"
        )
