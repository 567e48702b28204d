"""What a head reads of its target, brought to one scale for training.

The states before a layer are the target's residual stream, which grows with depth: in a Llama of 30M parameters their
root mean square is 40 to 53, in few channels far more, where an embedding's is 0.06. A first matrix over such states
gives the head a residual of 37, to which its layer adds less than 1; nearly all of the gradient is that matrix's, and a
step of AdamW moves its output by as much as there is. So in training the matrix is that of states divided by each
channel's root mean square. The saved head is an ordinary one: the scale is folded into its weights.

Legend: T positions, F input channels of the matrix, H width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.utils.parametrize import is_parametrized, register_parametrization, remove_parametrizations

from draftsmith.infer.models.runner.taps import Taps
from draftsmith.train.data.batches import IGNORED, assemble
from draftsmith.train.data.corpus import Corpus

# Learned positions that are measured, at least, if there are as many.
MEASURED = 512
# No channel counts as smaller than this share of the median one.
LEAST = 0.1


class ChannelScale(nn.Module):
    """A weight [H, F] of unscaled inputs, made of one for inputs that are divided by `scale_F`."""

    scale_F: torch.Tensor

    def __init__(self, scale_F: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("scale_F", scale_F)

    def forward(self, weight_HF: torch.Tensor) -> torch.Tensor:
        return weight_HF / self.scale_F

    def right_inverse(self, weight_HF: torch.Tensor) -> torch.Tensor:
        return weight_HF * self.scale_F


@torch.no_grad()
def measured_scale(target: Any, corpus: Corpus, names: Sequence[str]) -> torch.Tensor:
    """[F] the root mean square of each channel of the target's states `names`, side by side, where they are learned
    from: at the first tokens of a text some channels are a thousand times larger."""
    taps, squares, count = Taps(target), list[torch.Tensor](), 0
    for sample in range(len(corpus.lengths)):
        batch = assemble(corpus, [[sample]], int(corpus.lengths[sample]))
        learned_T = batch["labels"][0] != IGNORED
        with taps.taking(names) as taken:
            target.base_model(input_ids=batch["input_ids"].to(target.device), use_cache=False)
        joined_TF = torch.cat([taken[name][0][learned_T.to(target.device)] for name in names], -1).float()
        squares.append(joined_TF.square().sum(0))
        count += len(joined_TF)
        if count >= MEASURED:
            break
    scale_F = (torch.stack(squares).sum(0) / max(count, 1)).sqrt()
    return scale_F.clamp_min(max(LEAST * float(scale_F.median()), 1e-6))


def scaled(layer: nn.Linear, scale_F: torch.Tensor) -> None:
    """Let `layer` be trained in the scale of its inputs; what it computes does not change."""
    register_parametrization(layer, "weight", ChannelScale(scale_F.to(layer.weight)))


def folded(layer: nn.Linear) -> None:
    """End that: the layer's weight is an ordinary one again."""
    if is_parametrized(layer, "weight"):
        remove_parametrizations(layer, "weight")
