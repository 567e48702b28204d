"""A draft in training: one pass over a packed batch, and the states that leave at each exit.

Each exit is the output of one layer; the final norm that all exits share is applied only where a token is learned. The
wrapped model stays a plain Hugging Face model. What is made of the states is the objective's.

Legend: B rows, T positions, N positions that have a label, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from draftsmith.infer.models.layers import check_parts, find_parts, state_of
from draftsmith.train.data.batches import IGNORED
from draftsmith.train.data.document_mask import document_mask, packs_by_positions


class ExitStates(nn.Module):
    """`forward` gives the states at `exits` (numbers of layers, ascending; the last one is the whole model)."""

    def __init__(self, model: Any, exits: Sequence[int]) -> None:
        super().__init__()
        parts = find_parts(model)
        self.exits = check_exits(exits, len(parts.layers))
        check_parts(model, parts)
        self.masked = not packs_by_positions(model)
        self.model = model
        self.scale, self.softcap = parts.scale, parts.softcap
        self._parts = (parts.norm, parts.head)  # a tuple, so that they are not registered twice
        self._left: dict[int, torch.Tensor] = {}
        for exit in self.exits:
            parts.layers[exit - 1].register_forward_hook(self._keep(exit))

    def _keep(self, exit: int) -> Any:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            self._left[exit] = state_of(output)

        return hook

    @property
    def head(self) -> nn.Linear:
        head: nn.Linear = self._parts[1]  # type: ignore[assignment]
        return head

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """(per exit [N, D] states after the final norm, [N] labels)."""
        position_ids_BT, labels_BT = batch["position_ids"], batch["labels"]
        mask = document_mask(position_ids_BT, self._dtype(labels_BT.device.type)) if self.masked else None
        self.model.base_model(
            input_ids=batch["input_ids"], position_ids=position_ids_BT, attention_mask=mask, use_cache=False
        )
        left, self._left = self._left, {}
        learned_BT = labels_BT != IGNORED
        norm = self._parts[0]
        return [norm(left[exit][learned_BT]) for exit in self.exits], labels_BT[learned_BT]

    def _dtype(self, device: str) -> torch.dtype:
        dtype: torch.dtype = self.head.weight.dtype
        return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype


def check_exits(exits: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """`exits` in ascending order, the last one the whole depth."""
    if len(set(exits)) != len(exits) or list(exits) != sorted(exits) or not exits or exits[0] < 1:
        raise ValueError(f"exits {list(exits)} must be numbers of layers in ascending order, from 1 on")
    if exits[-1] != num_layers:
        raise ValueError(f"exits {list(exits)} must end with the draft's whole depth of {num_layers} layers")
    return tuple(exits)
