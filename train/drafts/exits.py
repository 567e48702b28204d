"""A draft in training: one pass over a packed batch, documents kept apart, and the hidden states at each exit.

An exit is the output of one layer; the final norm, which all exits share, is applied only to positions with a label.
The wrapped model stays a plain Hugging Face model.

Legend: B rows, T positions, N positions that have a label, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from draftsmith.infer.files.workers import Workers, open_workers
from draftsmith.infer.models.layers import check_parts, find_parts, first_layers, state_of
from draftsmith.train.data.batches import IGNORED, Batch
from draftsmith.train.data.corpus import Corpus
from draftsmith.train.drafts.folder import save_model
from draftsmith.train.drafts.lora import has_lora, merge_lora
from draftsmith.train.drafts.trainable import DraftSizes, exit_curves

if TYPE_CHECKING:
    from draftsmith.infer.contract.protocols import Drafter


class ExitStates(nn.Module):
    """The Trainable of a small language model. `forward` returns the states at `exits` (layer counts, ascending; the
    last is the whole model)."""

    def __init__(self, model: Any, exits: Sequence[int]) -> None:
        super().__init__()
        parts = find_parts(model)
        self.exits = check_exits(exits, len(parts.layers))
        check_parts(model, parts)
        self.masked = not packs_by_positions(model)
        self.model = model
        self.scale, self.softcap = parts.scale, parts.softcap
        self._parts = (parts.norm, parts.head)  # a tuple: they are registered with the model
        self._states: dict[int, torch.Tensor] = {}
        for exit in self.exits:
            parts.layers[exit - 1].register_forward_hook(self._keep(exit))

    def _keep(self, exit: int) -> Any:
        def hook(module: nn.Module, given: Any, output: Any) -> None:
            self._states[exit] = state_of(output)

        return hook

    @property
    def head(self) -> nn.Linear:
        head: nn.Linear = self._parts[1]  # type: ignore[assignment]
        return head

    def forward(self, batch: dict[str, torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """(per exit [N, D] states after the final norm, [N] labels)."""
        labels_BT = batch["labels"]
        self.model.base_model(**packed_inputs(batch, self.head.weight.dtype, self.masked))
        states, self._states = self._states, {}
        learned_BT = labels_BT != IGNORED
        norm = self._parts[0]
        return [norm(states[exit][learned_BT]) for exit in self.exits], labels_BT[learned_BT]

    @property
    def sizes(self) -> DraftSizes:
        config = self.model.config.get_text_config()
        wide = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        return DraftSizes(config.num_hidden_layers, config.hidden_size, wide, config.vocab_size)

    def edges(self) -> list[nn.Parameter]:
        return [self.model.get_input_embeddings().weight, self.head.weight]

    def try_pass(self, batch: dict[str, torch.Tensor]) -> tuple[list[torch.Tensor], torch.Tensor]:
        found: tuple[list[torch.Tensor], torch.Tensor] = self(batch)
        return found

    def drafters(self, num_draft_tokens: int) -> dict[str, Drafter]:
        """Each exit as the plain model that ends there."""
        from draftsmith.infer.drafters.small_lm import SmallLM

        columns = exit_curves(self.exits).lengths
        return {
            column: SmallLM(first_layers(self.model, exit), num_draft_tokens=num_draft_tokens)
            for column, exit in zip(columns, self.exits)
        }

    def layers(self) -> list[nn.Module]:
        return list(find_parts(self.model).layers)

    def save(self, folder: Path, tokenizer: Any, template_fingerprint: str) -> None:
        if has_lora(self.model):
            merge_lora(self.model)
        save_model(folder, self.model, tokenizer, exits=self.exits, template_fingerprint=template_fingerprint)


def check_exits(exits: Sequence[int], num_layers: int) -> tuple[int, ...]:
    """`exits`, checked to be ascending and to end with the whole depth."""
    if len(set(exits)) != len(exits) or list(exits) != sorted(exits) or not exits or exits[0] < 1:
        raise ValueError(f"exits {list(exits)} must be layer counts in ascending order, from 1 on")
    if exits[-1] != num_layers:
        raise ValueError(f"exits {list(exits)} must end with the draft's depth, {num_layers} layers")
    return tuple(exits)


def packed_inputs(batch: Batch, dtype: torch.dtype, masked: bool) -> dict[str, Any]:
    """What a model of `dtype` is called with, to read packed rows. `masked`: it needs a mask to separate documents."""
    position_ids_BT = batch["position_ids"]
    device = position_ids_BT.device.type
    used = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype
    return {
        "input_ids": batch["input_ids"],
        "position_ids": position_ids_BT,
        "attention_mask": document_mask(position_ids_BT, used) if masked else None,
        "use_cache": False,
    }


def packs_by_positions(model: Any) -> bool:
    """Whether the model separates documents by position ids that restart at 0; if not, a 4-D mask has to. ValueError
    where neither works. Tested with gradients: none may reach an earlier document."""
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
    """[B, 1, T, T] additive mask: causal attention within each document."""
    document_BT = (position_ids_BT == 0).cumsum(-1)
    same = document_BT[:, :, None] == document_BT[:, None, :]
    seen = torch.ones_like(same[0]).tril() & same
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill(~seen, torch.finfo(dtype).min)[:, None]


@dataclass(frozen=True, slots=True)
class TrainContext:
    """What a run gives its objective before the first step.

    Args:
        target: the target model in its own dtype; the objective may move it to another device but not change it.
        draft: the model in training.
        corpus: all samples, including held-out ones.
        max_length: tokens of a packed row.
        device: cpu or cuda.
        seed: the run's seed.
        workers: opens what builds a cache; by default this process.
        reload: the same in another worker, without a draft.
    """

    target: Any
    draft: Any
    corpus: Corpus
    max_length: int
    device: str
    seed: int = 0
    workers: Callable[[], AbstractContextManager[Workers]] = open_workers
    reload: Callable[[], TrainContext] | None = None
