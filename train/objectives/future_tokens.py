"""Heads of a target that does not change learn tokens further ahead (Medusa, arXiv 2401.10774; Hydra, 2402.05109).

Head i learns the token i + 2 places after the state that it reads: from the text (cross_entropy), or from the target's
own distribution there, given the text up to it. All losses of divergences.py serve. All heads' losses are divided by
one number, the learned tokens of the step, of which the later heads see slightly fewer.

Legend: K heads, N positions at which the first head learns, V vocabulary, C positions of a chunk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from draftsmith.train.objectives.distil import check_losses, chunk_entries

if TYPE_CHECKING:  # `--help` reads this class, and should not wait for torch
    import torch

    from draftsmith.train.drafts.exits import TrainContext
    from draftsmith.train.drafts.heads import HeadsDraft
    from draftsmith.train.drafts.hydra import HydraBuilder
    from draftsmith.train.drafts.medusa import MedusaBuilder
    from draftsmith.train.drafts.trainable import Curves
    from draftsmith.train.objectives.chunked_loss import Loss
    from draftsmith.train.objectives.objective import LossSums
    from draftsmith.train.teacher.features import Features


class FutureTokens:
    """The objective of `draftsmith train medusa` and `train hydra`.

    Args:
        losses: name and weight of cross_entropy (the text), forward_kl, reverse_kl, jsd, total_variation (the target's
            distribution), or of the acceptance of the rule that will run: sampled, greedy, topk; or the dotted path of
            a function. Default: forward_kl alone.
        decay: head i, counted from 0, weighs decay to the power of i.
        temperature: temperature of both distributions; 0 for a target that will decode greedily (losses greedy, topk
            and cross_entropy only).
        tree_top_k: tokens that a tree will try at a node, for the loss topk.
        sharpness: the losses greedy and topk replace the argmax by softmax(sharpness x logits).
        features: where the target's states come from: live, or the folder of a cache, which is built if it is missing.
        features_dtype: of the states in that cache.
    """

    whole_draft = False

    def __init__(
        self,
        losses: dict[str, float] | None = None,
        decay: float = 0.8,
        temperature: float = 1.0,
        tree_top_k: int = 4,
        sharpness: float = 1.0,
        features: str = "live",
        features_dtype: Literal["bfloat16", "float32"] = "bfloat16",
    ) -> None:
        self.losses = {"forward_kl": 1.0} if losses is None else losses
        check_losses(self.losses, temperature, tree_top_k, sharpness)
        if not 0 < decay <= 1:
            raise ValueError(f"--decay {decay}: it must be above 0 and at most 1")
        self.decay = decay
        self.temperature = temperature
        self.top_k = tree_top_k
        self.sharpness = sharpness
        self.features = features
        self.features_dtype = features_dtype

    @property
    def reads_cache(self) -> bool:
        return self.features != "live"

    def curves(self, builder: MedusaBuilder | HydraBuilder) -> Curves:
        from draftsmith.train.drafts.trainable import Curves

        return Curves("head", tuple(range(1, builder.num_heads + 1)))

    def begin(self, run: TrainContext) -> None:
        from draftsmith.train.teacher.feature_cache import open_features

        self.read: Features = open_features(self.features, run, run.draft.features, self.features_dtype)

    def __call__(self, draft: HeadsDraft, batch: dict[str, torch.Tensor]) -> LossSums:
        from draftsmith.train.objectives.chunked_loss import chunked_loss
        from draftsmith.train.objectives.divergences import OF_TEXT, Distributions, find_divergence, mixed

        features = self.read(batch)
        states_KNH, rows = draft(batch, features["last"])
        target = features.distributions(rows.at_N) if set(self.losses) != {OF_TEXT} else None
        terms = [(find_divergence(name), weight) for name, weight in self.losses.items()]

        def of_head(kept_N: torch.Tensor) -> Loss:
            def loss(logits_CV: torch.Tensor, chunk: slice, slope: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
                theirs = target.chunk(chunk) if target is not None else None
                both = Distributions(
                    logits_CV, theirs, rows.labels_N[chunk], self.temperature, self.top_k, self.sharpness
                )
                return mixed(terms, both, slope, kept_N[chunk])

            return loss

        weights = [self.decay**number for number in range(len(states_KNH))]
        losses = [of_head(kept_N) for kept_N in rows.kept_KN]
        entries = chunk_entries(rows.labels_N.device.type)
        return chunked_loss(states_KNH, draft.outputs, weights, losses, chunk_entries=entries)
