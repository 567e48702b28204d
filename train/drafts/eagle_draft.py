"""An EAGLE head in training, as the trainer knows it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from draftsmith.infer.heads.eagle import EagleHead
from draftsmith.infer.heads.folders import save_eagle
from draftsmith.train.data.batches import Batch
from draftsmith.train.drafts.trainable import BuildContext, DraftSizes, Weights
from draftsmith.train.drafts.unrolled import Predictions, UnrolledHead

if TYPE_CHECKING:
    from draftsmith.infer.contract.protocols import Drafter


class EagleDraft(UnrolledHead):
    """The Trainable of `draftsmith train eagle`."""

    def __init__(self, model: EagleHead, unrolls: int, run: BuildContext) -> None:
        super().__init__(model, unrolls, run.checkpointing)
        self._target_dtype = next(run.target.parameters()).dtype
        self._trained_for = run.trained_for

    def forward(self, batch: Batch, features: Mapping[str, torch.Tensor]) -> Predictions:
        embedding = self.model.get_input_embeddings()  # the target's, which nothing else may have moved
        if embedding.weight.device != batch["input_ids"].device:
            embedding.to(batch["input_ids"].device)
        return super().forward(batch, features)

    @property
    def sizes(self) -> DraftSizes:
        config, design = self.model.config, self.model.design
        output = self.model.lm_head
        assert output is not None
        states = len({*design.features, "last"})
        return DraftSizes(
            layers=config.num_hidden_layers * self.unrolls,
            width=config.hidden_size,
            widest=max(config.intermediate_size, 2 * config.hidden_size),
            vocab_size=output.out_features,
            heads=int(output.weight.requires_grad),
            feature_bytes=states * design.feature_width * self._target_dtype.itemsize,
        )

    def edges(self) -> list[nn.Parameter]:
        assert self.model.lm_head is not None
        return [self.model.lm_head.weight]

    def try_pass(self, batch: Batch) -> Predictions:
        shape = (*batch["input_ids"].shape, self.model.design.feature_width)
        state = torch.zeros(shape, dtype=self._target_dtype, device=batch["input_ids"].device)
        return self(batch, dict.fromkeys(self.model.features, state))  # type: ignore[no-any-return]

    def drafters(self, num_draft_tokens: int) -> dict[str, Drafter]:
        from draftsmith.infer.drafters.heads.eagle import Eagle

        return {"accepted_length": Eagle(self.model, num_draft_tokens=num_draft_tokens)}

    def save(self, folder: Path, tokenizer: Any, template_fingerprint: str, state: Weights | None) -> None:
        if state is not None:
            self.model.load_state_dict(state)
        save_eagle(folder, self.model, self._trained_for)
