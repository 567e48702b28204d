"""A slower target with the same output: `python -m draftsmith.recipes.studies.slow_target --target T --blocks 24`.

Layers whose output projections are zero add nothing to the residual stream, but take the time of a deeper model. This
shows whether a choice depends on costs, because nothing else changes.
"""

from __future__ import annotations

import copy
from typing import Any

OUTPUTS = ("o_proj", "down_proj")


def slow_target(*, target: str, blocks: int, out: str) -> None:
    """Write the target with idle layers added after its own.

    Args:
        target: folder or Hub name of a Llama-like model.
        blocks: number of layers to add.
        out: folder for the slower model.
    """
    import torch

    from draftsmith.infer.models.layers import find_parts
    from draftsmith.infer.models.load import load_model

    if blocks < 1:
        raise ValueError(f"--blocks must be at least 1, not {blocks}")
    model, tokenizer = load_model(target, device="cpu")
    ids_1T = torch.arange(3, 19)[None]
    with torch.inference_mode():
        before = model(ids_1T, use_cache=False).logits
    layers = find_parts(model).layers
    own = len(layers)
    for number in range(own, own + blocks):
        layers.append(_idle(layers[own - 1], number))
    model.config.num_hidden_layers = own + blocks
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [*model.config.layer_types, *model.config.layer_types[-1:] * blocks]
    with torch.inference_mode():
        assert torch.equal(model(ids_1T, use_cache=False).logits, before), "the added layers are not idle"
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"{out}: {own} layers and {blocks} idle ones")


def _idle(layer: Any, number: int) -> Any:
    """A copy of `layer` that adds nothing to the residual stream."""
    import torch

    added = copy.deepcopy(layer)
    zeroed = 0
    for name, module in added.named_modules():
        if hasattr(module, "layer_idx"):
            module.layer_idx = number
        if name.rpartition(".")[2] in OUTPUTS:
            zeroed += 1
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.zero_()
    if zeroed != len(OUTPUTS):
        raise ValueError(f"this model's layers have no {' and '.join(OUTPUTS)}, so they cannot be made idle")
    return added


if __name__ == "__main__":
    from jsonargparse import auto_cli

    auto_cli(slow_target)
