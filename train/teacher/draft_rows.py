"""The target's distributions over a draft vocabulary, from its states: only the rows of its head that are in it are
multiplied.

Legend: N predictions, V draft vocabulary, U the target's vocabulary.
"""

from __future__ import annotations

import torch
from torch import nn

from draftsmith.train.teacher.features import FeatureBatch
from draftsmith.train.teacher.live import LiveBatch, OutputHead

# Entries of the logits that are made at once to find the target's choices.
CHUNK_ENTRIES = 1 << 22


class DraftRows:
    """`ids_V`: the draft vocabulary; None: all of the target's."""

    def __init__(self, ids_V: torch.Tensor | None) -> None:
        self.ids_V = ids_V
        self._output: OutputHead | None = None

    def distributions(self, features: FeatureBatch, places_N: torch.Tensor) -> LiveBatch:
        """Of the tokens after `places_N`, indices into the batch's positions."""
        if self.ids_V is None:
            return features.distributions(places_N)
        if self._output is None:
            self._output = _rows(features.output, self.ids_V)
        return LiveBatch(features["last"].flatten(0, 1)[places_N], self._output)

    def have_choice(self, features: FeatureBatch, places_N: torch.Tensor) -> torch.Tensor:
        """[N] whether the target's likeliest token is in the draft vocabulary."""
        if self.ids_V is None:
            return torch.ones_like(places_N, dtype=torch.bool)
        head = features.output.head
        known_U = torch.zeros(head.out_features, dtype=torch.bool, device=places_N.device)
        known_U[self.ids_V.to(places_N.device)] = True
        whole = features.distributions(places_N)
        size = max(CHUNK_ENTRIES // head.out_features, 1)
        found = [known_U[whole.chunk(slice(i, i + size)).choice()] for i in range(0, len(places_N), size)]
        return torch.cat(found) if found else known_U[:0]


def _rows(output: OutputHead, ids_V: torch.Tensor) -> OutputHead:
    weight, bias = output.head.weight, output.head.bias
    ids_V = ids_V.to(weight.device)
    head = nn.Linear(weight.shape[1], len(ids_V), bias=bias is not None, device="meta")
    head.weight = nn.Parameter(weight[ids_V].detach(), requires_grad=False)
    if bias is not None:
        head.bias = nn.Parameter(bias[ids_V].detach(), requires_grad=False)
    return OutputHead(head, output.scale, output.softcap)
