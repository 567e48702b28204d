"""Training-time test (EAGLE-3, arXiv 2503.01840): at each unroll, the head learns the target's distribution.

Over a draft vocabulary it is the target's distribution of those tokens alone. Where the target's likeliest token is not
among them, the head still learns which of its own tokens the target prefers: sampled drafts and trees are accepted by
them. EAGLE's own code leaves such positions out.

Legend: K unrolls, N predictions, D hidden, V draft vocabulary, C predictions of a chunk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from draftsmith.train.drafts.trainable import Curves
from draftsmith.train.objectives.distil import check_losses, chunk_entries

if TYPE_CHECKING:  # `--help` reads this class, and should not wait for torch
    import torch

    from draftsmith.train.drafts.eagle_draft import EagleDraft
    from draftsmith.train.drafts.exits import TrainContext
    from draftsmith.train.objectives.chunked_loss import Loss
    from draftsmith.train.objectives.objective import LossSums
    from draftsmith.train.teacher.features import FeatureBatch, Features


class EagleObjective:
    """The objective of `draftsmith train eagle`.

    Args:
        losses: name and weight of forward_kl, reverse_kl, jsd, total_variation, cross_entropy (the text), or of the
            acceptance of the rule that will run: sampled, greedy, topk; or the dotted path of a function. Default:
            forward_kl alone.
        decay: factor of the loss from one unroll to the next.
        temperature: temperature of both distributions.
        tree_top_k: tokens that a tree will try at a node, for the loss topk.
        sharpness: the losses greedy and topk replace the argmax by softmax(sharpness x logits).
        outside: positions whose likeliest token is not in the draft vocabulary: keep, or drop.
        noise: added to the target's states in training: the standard deviation, or the largest value if it is uniform.
        noise_kind: normal or uniform.
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
        outside: Literal["keep", "drop"] = "keep",
        noise: float = 0.0,
        noise_kind: Literal["normal", "uniform"] = "normal",
        features: str = "live",
        features_dtype: Literal["bfloat16", "float32"] = "bfloat16",
    ) -> None:
        self.losses = {"forward_kl": 1.0} if losses is None else losses
        check_losses(self.losses, temperature, tree_top_k, sharpness)
        if not 0 < decay <= 1:
            raise ValueError(f"--decay {decay}: it must be above 0 and at most 1")
        if noise < 0:
            raise ValueError(f"--noise {noise}: it must not be negative")
        self.decay = decay
        self.temperature = temperature
        self.top_k = tree_top_k
        self.sharpness = sharpness
        self.outside = outside
        self.noise = noise
        self.noise_kind = noise_kind
        self.features = features
        self.features_dtype = features_dtype

    @property
    def reads_cache(self) -> bool:
        return self.features != "live"

    def curves(self, builder: Any) -> Curves:
        return Curves("unroll", tuple(range(builder.unrolls)))

    def begin(self, run: TrainContext) -> None:
        from draftsmith.train.teacher.draft_rows import DraftRows
        from draftsmith.train.teacher.feature_cache import open_features

        if run.draft.ids_V is not None and "cross_entropy" in self.losses:
            raise ValueError(
                "cross_entropy learns the text's tokens, and a draft vocabulary may lack them: use another loss, or "
                "--draft_vocab 0"
            )
        self.read: Features = open_features(self.features, run, run.draft.features, self.features_dtype)
        self.rows = DraftRows(run.draft.ids_V)
        self._seed = run.seed

    def __call__(self, draft: EagleDraft, batch: dict[str, torch.Tensor]) -> LossSums:
        from draftsmith.train.objectives.chunked_loss import chunked_loss
        from draftsmith.train.objectives.divergences import Distributions, find_divergence, mixed
        from draftsmith.train.objectives.objective import LossSums

        head = draft.model.lm_head
        assert head is not None
        features = self.read(batch)
        found = draft(batch, self._noisy(features, draft, batch))
        learned_KN = found.learned_KN
        if self.outside == "drop":
            learned_KN = learned_KN & self.rows.have_choice(features, found.places_N)
        distributions = self.rows.distributions(features, found.places_N)
        terms = [(find_divergence(name), weight) for name, weight in self.losses.items()]
        labels_N = batch["labels"].flatten()[found.places_N]

        def of_unroll(learned_N: torch.Tensor) -> Loss:
            def loss(logits_CV: torch.Tensor, chunk: slice, slope: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
                both = Distributions(
                    logits_CV, distributions.chunk(chunk), labels_N[chunk], self.temperature, self.top_k, self.sharpness
                )
                return mixed(terms, both, slope, learned_N[chunk])

            return loss

        sums = chunked_loss(
            found.states_KND,
            head,
            [self.decay**t for t in range(draft.unrolls)],
            [of_unroll(learned_N) for learned_N in learned_KN],
            chunk_entries=chunk_entries(labels_N.device.type),
        )
        return LossSums(sums.total, sums.per_exit_E, learned_KN.sum(1))

    def _noisy(
        self, features: FeatureBatch, draft: EagleDraft, batch: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The states that the head reads; noise makes it bear with states that are not quite the target's."""
        import torch

        from draftsmith.train.data.row_streams import row_generators

        given = {name: features[name] for name in draft.model.features}
        if not (draft.training and self.noise):
            return given
        device = batch["labels"].device
        streams = row_generators(batch["rows"].tolist(), self._seed, "noise", device)

        def drawn(state: torch.Tensor) -> torch.Tensor:
            draw = torch.randn if self.noise_kind == "normal" else torch.rand
            rows = [draw(state.shape[1:], generator=stream, dtype=state.dtype, device=device) for stream in streams]
            noise = torch.stack(rows)
            return noise if self.noise_kind == "normal" else noise * 2 - 1

        return {name: state + self.noise * drawn(state) for name, state in given.items()}
