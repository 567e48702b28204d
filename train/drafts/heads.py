"""Medusa's and Hydra's heads in training: the states that each head's output matrix is applied to.

The target has read the text up to position s and predicts token s + 1. So does head i, from the target's state at
s - 1 - i; Hydra's heads also from the tokens after that state, up to token s. A head learns where it drafts, in an
answer of which the target has written at least one token: where all tokens from s - i to s + 1 are learned ones.

Legend: B rows, T positions, K heads, N positions at which the first head learns, H width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import LlamaConfig

from draftsmith.infer.heads.hydra import HydraHead, HydraHeads
from draftsmith.infer.heads.medusa import MedusaHead, MedusaHeads
from draftsmith.infer.models.layers import find_parts
from draftsmith.train.data.batches import IGNORED, Batch
from draftsmith.train.data.row_streams import row_generators
from draftsmith.train.drafts.exits import document_mask
from draftsmith.train.drafts.trainable import BuildContext, DraftSizes

if TYPE_CHECKING:
    from draftsmith.infer.contract.protocols import Drafter


@dataclass(frozen=True, slots=True)
class FutureRows:
    """`at_N`: the positions s, as indices into the batch's B x T; `labels_N`: the tokens after them; `kept_KN`: where
    each head learns."""

    at_N: torch.Tensor
    labels_N: torch.Tensor
    kept_KN: torch.Tensor


def future_rows(labels_BT: torch.Tensor, num_heads: int) -> FutureRows:
    """A row's last position has no label, so that no run of labels reaches into the next row."""
    labels_P = labels_BT.flatten()
    learned_P = labels_P != IGNORED
    kept = []
    run_P = learned_P
    for back in range(1, num_heads + 1):
        run_P = run_P & nn.functional.pad(learned_P, (back, 0))[: len(learned_P)]
        kept.append(run_P)
    at_N = kept[0].nonzero()[:, 0]
    return FutureRows(at_N, labels_P[at_N], torch.stack(kept)[:, at_N])


class HeadsDraft(nn.Module):
    """The Trainable of both.

    Args:
        model: the heads.
        drafter: makes what validation decodes with.
        write: saves the finished heads in a folder.
        feature_bytes: of the target's state of a token.
        embedding: the target's, for heads that read tokens.
        dropout: before each block, and before the output matrix.
        seed: of the dropout.
    """

    def __init__(
        self,
        model: MedusaHeads | HydraHeads,
        drafter: Callable[[Any, int], Drafter],
        write: Callable[[Path, Any], None],
        feature_bytes: int,
        embedding: nn.Module | None = None,
        dropout: float = 0.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model = model
        self._dropout = dropout
        self._seed = seed
        self.prefix = getattr(model, "prefix", None)
        self._drafter = drafter
        self._write = write
        self._feature_bytes = feature_bytes
        self._embedding = (embedding,)  # a tuple: it is the target's, and not trained

    @property
    def outputs(self) -> list[nn.Linear]:
        return [head.lm_head for head in _heads(self.model)]

    def forward(self, batch: Batch, last_BTH: torch.Tensor) -> tuple[list[torch.Tensor], FutureRows]:
        """([N, H] what each head's output matrix is applied to, the positions); `last_BTH`: the target's states."""
        heads = _heads(self.model)
        rows = future_rows(batch["labels"], len(heads))
        dtype = self.outputs[0].weight.dtype
        read_BTH = last_BTH.to(dtype)
        if self.prefix is not None:
            mask = document_mask(batch["position_ids"], dtype)
            read_BTH = self.prefix(
                inputs_embeds=read_BTH, position_ids=batch["position_ids"], attention_mask=mask
            ).logits
        states_PH, ids_P = read_BTH.flatten(0, 1), batch["input_ids"].flatten()
        dropped = self._dropped(batch, rows)
        found = []
        for number, head in enumerate(heads):
            given = [states_PH[(rows.at_N - 1 - number).clamp_min(0)]]
            if self._embedding[0] is not None:
                path = [ids_P[(rows.at_N - back).clamp_min(0)] for back in range(number, -1, -1)]
                given += [self._embed(ids_N).to(dtype) for ids_N in path]
            state = torch.cat(given, -1) if len(given) > 1 else given[0]
            for block in head.blocks:
                state = block(dropped(state))
            found.append(dropped(state))
        return found, rows

    def _dropped(self, batch: Batch, rows: FutureRows) -> Callable[[torch.Tensor], torch.Tensor]:
        """Dropout whose draws are a row's own."""
        if not (self.training and self._dropout):
            return lambda state: state
        device, keep = rows.at_N.device, 1 - self._dropout
        count, length = batch["labels"].shape
        own_B = (rows.at_N // length).bincount(minlength=count).tolist()
        streams = row_generators(batch["rows"].tolist(), self._seed, "dropout", device)

        def dropped(state: torch.Tensor) -> torch.Tensor:
            drawn = [torch.rand((own, state.shape[1]), generator=stream, device=device)
                     for own, stream in zip(own_B, streams)]  # fmt: skip
            return state * (torch.cat(drawn) < keep) / keep

        return dropped

    @torch.no_grad()
    def _embed(self, ids_N: torch.Tensor) -> torch.Tensor:
        (embedding,) = self._embedding
        assert embedding is not None
        if next(embedding.parameters()).device != ids_N.device:
            embedding.to(ids_N.device)
        out: torch.Tensor = embedding(ids_N)
        return out

    @property
    def sizes(self) -> DraftSizes:
        width, count = self.model.width, len(self.model.heads)
        reads = 1 if self._embedding[0] is None else count + 1
        return DraftSizes(
            int(self.prefix is not None), width, reads * width, self.model.vocab_size, count, self._feature_bytes
        )

    def edges(self) -> list[nn.Parameter]:
        return [each for output in self.outputs for each in output.parameters()]

    def try_pass(self, batch: Batch) -> tuple[list[torch.Tensor], FutureRows]:
        weight = self.outputs[0].weight
        last_BTH = weight.new_zeros((*batch["labels"].shape, self.model.width))
        return self.forward(batch, last_BTH)

    def drafters(self, num_draft_tokens: int) -> dict[str, Drafter]:
        """One drafter, as deep as there are heads."""
        return {"accepted_length": self._drafter(self.model, min(num_draft_tokens, len(self.model.heads)))}

    def layers(self) -> list[nn.Module]:
        """None: the losses read all heads at once."""
        return []

    def save(self, folder: Path, tokenizer: Any, template_fingerprint: str) -> None:
        self._write(folder, self.model)


def _heads(model: MedusaHeads | HydraHeads) -> list[MedusaHead | HydraHead]:
    return list(model.heads)  # type: ignore[arg-type]


@torch.no_grad()
def begin_heads(heads: MedusaHeads | HydraHeads, run: BuildContext) -> None:
    """Start as the target's own output on the unchanged state, but for a cap on its logits: with its output matrix, and
    with blocks that give the state alone."""
    parts = find_parts(run.target)
    theirs: Any = parts.head
    for head in _heads(heads):
        for block in head.blocks:
            inner: Any = block.linear
            nn.init.zeros_(inner.weight)
            nn.init.zeros_(inner.bias)
            if isinstance(first := getattr(block, "res_connection", None), nn.Linear):
                nn.init.eye_(first.weight)
                nn.init.zeros_(first.bias)
        head.lm_head.weight.copy_(theirs.weight * parts.scale)
        if head.lm_head.bias is not None:
            nn.init.zeros_(head.lm_head.bias)
            if theirs.bias is not None:
                head.lm_head.bias.copy_(theirs.bias * parts.scale)


def check_trained(name: str, heads: MedusaHeads | HydraHeads, num_heads: int, num_layers: int) -> None:
    """ValueError if loaded heads are not of these numbers."""
    have, wanted = (len(heads.heads), heads.num_layers), (num_heads, num_layers)
    if have != wanted:
        raise ValueError(
            f"{name} has {have[0]} heads of {have[1]} blocks, and trained heads keep their shape: give --num_heads "
            f"{have[0]} --num_layers {have[1]}"
        )


def ready(heads: MedusaHeads | HydraHeads, run: BuildContext) -> Any:
    """`heads` as they are trained."""
    if run.compile:
        for head in _heads(heads):
            for block in head.blocks:
                block.compile()
    return heads.to(run.dtype).requires_grad_(True).train()


def prefix_config(target_config: Any) -> LlamaConfig:
    """One layer of Llama's with the sizes and rotations of the target's."""
    names = (
        "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "hidden_act",
        "rms_norm_eps", "max_position_embeddings", "vocab_size", "rope_parameters",
    )  # fmt: skip
    given = {name: value for name in names if (value := getattr(target_config, name, None)) is not None}
    given.setdefault("intermediate_size", 4 * given["hidden_size"])
    if "rope_type" not in given.get("rope_parameters", {"rope_type": ""}):  # a family with several rotations
        del given["rope_parameters"]
    return LlamaConfig(**given, num_hidden_layers=1, attn_implementation="eager")


def check_head_options(strategy: str, checkpointing: bool, **counts: int) -> None:
    """ValueError for options of a run that are for language models, and for numbers below 1."""
    for name, count in counts.items():
        if count < 1:
            raise ValueError(f"--{name} {count}: it must be at least 1")
    if strategy.startswith("deepspeed"):
        raise ValueError(f"strategy {strategy} is for language models: heads train under ddp or fsdp")
    if checkpointing:
        raise ValueError("gradient checkpointing is for drafts of many layers, and heads keep little: leave it out")
