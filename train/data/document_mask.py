"""Keeping the documents of a packed row apart: by position ids where the model does it itself, else by a mask.

Legend: B rows, T positions, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch


def packs_by_positions(model: Any) -> bool:
    """Whether the model itself keeps documents apart where position ids begin anew. If it does not, a 4-D mask must;
    if that does not help either, ValueError. Judged by gradients: exactly none may reach an earlier document."""
    if not _leaks(model, mask=False):
        return True
    if not _leaks(model, mask=True):
        return False
    raise ValueError(f"{model.config.model_type} attends across the documents of a packed row: it cannot be trained")


def _leaks(model: Any, mask: bool) -> bool:
    embedding = model.get_input_embeddings()
    vocab = model.config.get_text_config().vocab_size
    ids_1T = torch.arange(3, 11, device=embedding.weight.device)[None] % vocab
    position_ids_1T = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3]], device=ids_1T.device)
    states_1TD = embedding(ids_1T).detach().requires_grad_()
    kwargs = {"attention_mask": document_mask(position_ids_1T, states_1TD.dtype)} if mask else {}
    training = model.training
    model.eval()
    try:
        with torch.enable_grad():
            output = model.base_model(
                inputs_embeds=states_1TD, position_ids=position_ids_1T, use_cache=False, **kwargs
            ).last_hidden_state
            (gradient,) = torch.autograd.grad(output[:, 4:].float().square().sum(), states_1TD)
    finally:
        model.train(training)
    return bool(gradient[:, :4].any())


def document_mask(position_ids_BT: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[B, 1, T, T] additive: each position sees its own document's positions up to itself."""
    document_BT = (position_ids_BT == 0).cumsum(-1)
    same = document_BT[:, :, None] == document_BT[:, None, :]
    seen = torch.ones_like(same[0]).tril() & same
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)[:, None]
