"""Linear layers of a Llama-like model that multiply the same input, joined: one product for queries, keys and values,
one for gate and up. A pass then makes four products a layer instead of seven, and of few tokens a product costs its
call (LOG.md has figures).

The weights are held once: those of the parts become views of the joined ones. Each part's forward makes the joined
product when it is first asked with an input, and gives its share of it; so transformers' own layers profit too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from draftsmith.infer.models.layers import LLAMA_LIKE

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


class JoinedPart:
    """Replaces the forward of one of the layers that were joined, as long as its weights are part of the joined ones:
    a model that was copied, or moved to another dtype, multiplies with its own."""

    def __init__(self, whole: JoinedProduct, index: int, layer: nn.Linear) -> None:
        self.whole = whole
        self.index = index
        self.layer = layer
        self.address = layer.weight.data_ptr()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        if self.layer.weight.data_ptr() != self.address:
            return nn.functional.linear(x, self.layer.weight, self.layer.bias)
        return self.whole.part(x, self.index)


class JoinedProduct:
    """The product of one input with the weights of several layers, kept until the last of them has asked for it."""

    def __init__(self, parts: list[nn.Linear]) -> None:
        self.sizes = [part.out_features for part in parts]
        self.layer = nn.Linear(parts[0].in_features, sum(self.sizes), bias=parts[0].bias is not None, device="meta")
        self.layer.weight = _whole([part.weight for part in parts])
        if parts[0].bias is not None:
            self.layer.bias = _whole([part.bias for part in parts])
        self._given: torch.Tensor | None = None
        self._made: tuple[torch.Tensor, ...] = ()

    def part(self, x: torch.Tensor, index: int) -> torch.Tensor:
        if x is not self._given:
            self._given, self._made = x, self.layer.forward(x).split(self.sizes, -1)
        made = self._made[index]
        if index == len(self.sizes) - 1:
            self._given, self._made = None, ()
        return made


def _whole(parts: list[Any]) -> nn.Parameter:
    """One tensor of these, which become views of it."""
    whole = torch.cat([part.data for part in parts])
    for part, view in zip(parts, whole.split([len(part) for part in parts])):
        part.data = view
    return nn.Parameter(whole, requires_grad=False)


@torch.inference_mode(False)
@torch.no_grad()
def join_layers(model: Any) -> None:
    """Join what can be joined in a model whose weights will not change."""
    if type(model).__name__ not in LLAMA_LIKE:
        return
    for module in model.modules():
        for names in GROUPS:
            parts = [module._modules.get(name) for name in names]
            if all(_is_free(part) for part in parts) and _fit(parts):
                whole = JoinedProduct(parts)
                for index, part in enumerate(parts):
                    part.forward = JoinedPart(whole, index, part)


def linear_layers(model: Any) -> list[Any]:
    """The linear layers whose products a pass makes, in its order: joined ones stand for their parts."""
    found: dict[int, nn.Linear] = {}
    for layer in model.modules():
        if type(layer) is nn.Linear:
            own = layer.__dict__.get("forward")
            layer = own.whole.layer if isinstance(own, JoinedPart) else layer
            found[id(layer)] = layer
    return list(found.values())


def _is_free(layer: Any) -> bool:
    """Whether this is a linear layer that nothing was done to."""
    if type(layer) is not nn.Linear or "forward" in layer.__dict__:
        return False
    return not (layer._forward_hooks or layer._forward_pre_hooks)


def _fit(parts: list[Any]) -> bool:
    alike = {(part.in_features, part.weight.dtype, part.weight.device.type, part.bias is None) for part in parts}
    plain = all(type(part.weight) is nn.Parameter for part in parts)
    return len(alike) == 1 and plain and parts[0].weight.device.type == "cpu"
