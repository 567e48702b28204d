"""From a target's state to a key: z-score per dimension, PCA, unit length (arXiv 2502.15572).

Z-score and PCA are one affine map, stored as one matrix. It is fitted in float64, in one pass over blocks of states.

Legend: N states, D hidden, K key dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

# Dimensions that hardly vary are dropped instead of scaled up.
MIN_SPREAD = 1e-6


@dataclass(frozen=True, slots=True)
class Projection:
    """`matrix_KD` and `offset_K` map a state to its key, before normalisation."""

    matrix_KD: torch.Tensor
    offset_K: torch.Tensor

    @torch.inference_mode()
    def keys(self, states_ND: torch.Tensor) -> np.ndarray:
        """[N, K] float32, of unit length."""
        keys_NK = states_ND.detach().to("cpu", torch.float32) @ self.matrix_KD.T + self.offset_K
        return torch.nn.functional.normalize(keys_NK, dim=-1).numpy()

    def write(self, path: Path) -> None:
        torch.cat([self.matrix_KD, self.offset_K[:, None]], dim=1).numpy().astype("<f4").tofile(path)

    @classmethod
    def read(cls, path: Path, hidden_size: int) -> Projection:
        both_KD = np.fromfile(path, dtype="<f4")
        if not both_KD.size or both_KD.size % (hidden_size + 1):
            raise ValueError(f"{path} is damaged: {both_KD.size} numbers are no map of {hidden_size}-wide states")
        both = torch.from_numpy(both_KD.reshape(-1, hidden_size + 1))
        return cls(both[:, :-1].contiguous(), both[:, -1].contiguous())


def fit(blocks: Iterable[torch.Tensor], dims: int) -> tuple[Projection, float]:
    """The projection to the `dims` directions of most variance, and their share of the variance."""
    count, sum_D, square_DD = 0, torch.zeros(0), torch.zeros(0)
    centre_D = torch.zeros(0)
    for block in blocks:
        block_ND = block.to("cpu", torch.float64)
        if not count:
            # Centred on a first guess of the mean, so that no digits are lost if the mean is far from zero.
            centre_D = block_ND.mean(0)
            sum_D, square_DD = torch.zeros_like(centre_D), torch.zeros(2 * (len(centre_D),), dtype=torch.float64)
        block_ND = block_ND - centre_D
        count += len(block_ND)
        sum_D += block_ND.sum(0)
        square_DD += block_ND.T @ block_ND
    if count < 2:
        raise ValueError(f"a projection cannot be fitted on {count} positions: add data")
    mean_D = sum_D / count
    covariance_DD = square_DD / count - mean_D[:, None] * mean_D
    spread_D = covariance_DD.diagonal().clamp_min(0).sqrt()
    scale_D = torch.where(spread_D > MIN_SPREAD, 1 / spread_D.clamp_min(MIN_SPREAD), 0.0)
    values_D, vectors_DD = torch.linalg.eigh(covariance_DD * scale_D[:, None] * scale_D)
    best_DK = vectors_DD.flip(1)[:, : min(dims, len(values_D))]
    # Eigenvectors have no sign of their own: make the largest component positive.
    largest_K = best_DK.gather(0, best_DK.abs().argmax(0, keepdim=True))[0]
    matrix_KD = (best_DK * torch.where(largest_K < 0, -1.0, 1.0)).T * scale_D
    held = float(values_D.flip(0)[: best_DK.shape[1]].sum() / values_D.sum().clamp_min(1e-30))
    return Projection(matrix_KD.float(), (-matrix_KD @ (mean_D + centre_D)).float()), held
