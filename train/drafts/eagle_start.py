"""The first weights of an EAGLE-3 head that come from its target: output head and final norm.

Legend: V draft vocabulary, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from draftsmith.infer.heads.eagle import EagleHead
from draftsmith.infer.models.layers import find_parts


@torch.no_grad()
def start_from(target: Any, head: EagleHead) -> None:
    """Give `head` the target's rows of its draft vocabulary and the target's final norm; draw its matrices."""
    parts = find_parts(target)
    width = head.config.hidden_size
    if head.design.feature_width != width or target.get_input_embeddings().weight.shape[1] != width:
        raise ValueError(
            f"{target.config.model_type} embeds tokens in another width than its states have: no head for it"
        )
    for module in head.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=head.config.initializer_range)
    assert head.lm_head is not None
    rows_VD = parts.head.weight if head.ids_V is None else parts.head.weight[head.ids_V.to(parts.head.weight.device)]
    head.lm_head.weight.copy_(rows_VD * parts.scale)
    head.model.norm.weight.copy_(norm_weight(parts.norm, width))


def norm_weight(norm: nn.Module, width: int) -> torch.Tensor:
    """[D] what `norm` multiplies by, whatever it adds to its weight or its output; ones where it is not a norm.

    Ones of alternating sign have a mean of 0 and a length of sqrt(D), which a norm leaves."""
    weight = next(iter(norm.parameters()), torch.ones(1))
    signs_D = torch.ones(width, dtype=weight.dtype, device=weight.device)
    signs_D[1::2] = -1
    return ((norm(signs_D[None]) - norm(-signs_D[None]))[0] * signs_D / 2).float()
