"""An EAGLE head in training, as the trainer knows it, and the first weights that it takes from its target.

Legend: V draft vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from draftsmith.infer.heads.eagle import EagleHead
from draftsmith.infer.heads.folders import save_eagle
from draftsmith.infer.models.layers import find_parts
from draftsmith.train.data.batches import Batch
from draftsmith.train.data.channel_scale import folded, measured_scale, scaled
from draftsmith.train.drafts.trainable import BuildContext, DraftSizes
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
        return list(self.model.lm_head.parameters()) if self.model.lm_head is not None else []

    def try_pass(self, batch: Batch) -> Predictions:
        shape = (*batch["input_ids"].shape, self.model.design.feature_width)
        state = torch.zeros(shape, dtype=self._target_dtype, device=batch["input_ids"].device)
        return self.forward(batch, dict.fromkeys(self.model.features, state))

    def drafters(self, num_draft_tokens: int) -> dict[str, Drafter]:
        from draftsmith.infer.drafters.heads.eagle import Eagle

        return {"accepted_length": Eagle(self.model, num_draft_tokens=num_draft_tokens)}

    def layers(self) -> list[nn.Module]:
        """None: unrolls run them again and again, and a head is small."""
        return []

    def save(self, folder: Path, tokenizer: Any, template_fingerprint: str) -> None:
        folded(self.model.fc)
        save_eagle(folder, self.model, self._trained_for)


@torch.no_grad()
def scale_states(head: EagleHead, run: BuildContext, fresh: bool) -> None:
    """Train `head` in the scale of its target's states; a fresh one then gives its layer states of size 1."""
    scale_F = measured_scale(run.target, run.corpus, head.features)
    if fresh:
        head.fc.weight.copy_(head.fc.weight / scale_F)
    scaled(head.fc, scale_F)


@torch.no_grad()
def start_from(target: Any, head: EagleHead) -> None:
    """Give `head` the target's rows of its draft vocabulary and the target's final norm; draw its matrices, so that
    they keep the size of what they are given: the layer then says as much as the state that it adds to."""
    parts = find_parts(target)
    width = head.config.hidden_size
    if head.design.feature_width != width or target.get_input_embeddings().weight.shape[1] != width:
        raise ValueError(
            f"{target.config.model_type} embeds tokens in another width than its states have: no head for it"
        )
    for module in head.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=module.in_features**-0.5)
    assert head.lm_head is not None
    rows_VD: torch.Tensor = next(parts.head.parameters())
    if head.ids_V is not None:
        rows_VD = rows_VD[head.ids_V.to(rows_VD.device)]
    (own_VD,) = head.lm_head.parameters()
    (norm_D,) = head.model.norm.parameters()
    own_VD.copy_(rows_VD * parts.scale)
    norm_D.copy_(norm_weight(parts.norm, width))


def norm_weight(norm: nn.Module, width: int) -> torch.Tensor:
    """[D] what `norm` multiplies by, whatever it adds to its weight or its output; ones where it is not a norm.

    Ones of alternating sign have a mean of 0 and a length of sqrt(D), which a norm leaves."""
    weight = next(iter(norm.parameters()), torch.ones(1))
    signs_D = torch.ones(width, dtype=weight.dtype, device=weight.device)
    signs_D[1::2] = -1
    return ((norm(signs_D[None]) - norm(-signs_D[None]))[0] * signs_D / 2).float()
