"""Embeddings and head of a draft that is not as wide as its target: the target's, in fewer directions.

A narrower draft keeps the directions that hold most of the second moment of the target's embeddings and head together
(each scaled to the same weight; no mean is taken off, for a norm follows that takes none off either). Both matrices are
projected on the same directions, because states pass from one to the other along the residual stream; so the products
of embeddings with head rows, which are the first thing a shallow draft says, come as near to the target's as so few
directions allow. The head is multiplied by sqrt(wide / narrow), because the final norm gives each state the length
sqrt(width). A wider draft gets the target's columns and zeros. Layers and norms are not known here.

Legend: V vocabulary, D the target's width, K the draft's.
"""

from __future__ import annotations

import math
from typing import Any

import torch


@torch.no_grad()
def project_embeddings(target: Any, draft: Any) -> float:
    """Fill the draft's embeddings and head; returns the share of the second moment that its width holds."""
    embedding_VD = target.get_input_embeddings().weight.float()
    head_VD = target.get_output_embeddings().weight.float()
    ours_VK, theirs_VK = draft.get_input_embeddings().weight, draft.get_output_embeddings().weight
    wide, narrow = embedding_VD.shape[1], ours_VK.shape[1]
    tied = ours_VK is theirs_VK
    if narrow >= wide:
        basis_DK, held = torch.eye(wide, narrow), 1.0
    else:
        basis_DK, held = main_directions([embedding_VD] if tied else [embedding_VD, head_VD], narrow)
    basis_DK = basis_DK.to(embedding_VD.device)
    ours_VK.copy_(embedding_VD @ basis_DK)
    if not tied:
        theirs_VK.copy_(head_VD @ basis_DK * math.sqrt(wide / narrow))
    return held


def main_directions(matrices_VD: list[torch.Tensor], count: int) -> tuple[torch.Tensor, float]:
    """([D, count] orthonormal, the largest first; their share of the second moment)."""
    moments = [matrix_VD.double().T @ matrix_VD.double() for matrix_VD in matrices_VD]
    moment_DD = torch.stack([moment_DD / moment_DD.trace() for moment_DD in moments]).mean(0)
    values_D, vectors_DD = torch.linalg.eigh(moment_DD)
    held = float(values_D[-count:].sum() / values_D.sum())
    return vectors_DD[:, -count:].flip(-1).float(), held
