"""A draft model, how it is run, and how large its drafts are.

Legend: B rows, N nodes, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from draftsmith.infer.contract.protocols import PassTimer, Target
from draftsmith.infer.costs.pass_costs import Costs
from draftsmith.infer.drafters.exit_choice import Pricing
from draftsmith.infer.models.int8 import Int8
from draftsmith.infer.models.load import load_model
from draftsmith.infer.models.prepack import can_prepack, prepack, unpack
from draftsmith.infer.models.runner.entries import Entries
from draftsmith.infer.models.runner.model_runner import ModelRunner

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Rows = Sequence[Any]
Reaches = Sequence[Sequence[float]]


@dataclass(frozen=True, slots=True)
class DraftModel:
    """A causal LM, and the tokenizer and the name that it was loaded with, where it was loaded by name.

    `follows_dtype`, `follows_device`: it takes its target's, because none was asked for."""

    model: Any
    tokenizer: PreTrainedTokenizerBase | None = None
    origin: str = ""
    follows_dtype: bool = False
    follows_device: bool = False

    @classmethod
    def of(cls, model: Any, dtype: str, device: str) -> DraftModel:
        """`model` itself, or loaded from a folder or Hub name."""
        if not isinstance(model, str):
            return cls(model.eval())
        loaded, tokenizer = load_model(model, dtype=dtype, device=device, for_decoding=True)
        return cls(loaded.eval(), tokenizer, model, dtype == "auto", device == "auto")

    def may_choose(self, int8: Int8) -> Int8:
        """What `int8` says; auto is off for a model that was given as an object, whose passes nobody asked to time."""
        return False if int8 == "auto" and not self.origin else int8

    def follow(self, target: Any) -> bool:
        """Take the dtype and the device of the target's model, as far as they were left open; whether that changed any.

        A draft is often trained in float32, and in its target's bfloat16 it takes a half to a quarter of the time. What
        it proposes may change by rounding; the text does not."""
        own, wanted = self.model.get_input_embeddings().weight, target.get_input_embeddings().weight
        dtype = wanted.dtype if self.follows_dtype and wanted.is_floating_point() else own.dtype
        device = wanted.device if self.follows_device else own.device
        if (dtype, device) == (own.dtype, own.device):
            return False
        unpack(self.model)
        self.model.to(device=device, dtype=dtype)
        if can_prepack(self.model):
            prepack(self.model)
        return True


@dataclass(frozen=True, slots=True)
class DraftOutput:
    """[N, V] logits of all rows' nodes, row after row, and the layer at which each left a model with exits."""

    logits_NV: torch.Tensor
    exits: list[int] = field(default_factory=list)


class DraftForward(Protocol):
    """How the draft model is run. `lm` is its cache and forward pass, `entry` the name of the pass that every new node
    goes through."""

    lm: ModelRunner
    entry: str

    def assumed_costs(self, target: Target) -> Costs | None:
        """The costs to use where none were measured; None if it can do without."""
        ...

    def prefill(self, rows: Rows, tokens: Sequence[list[int]]) -> None: ...

    def read(
        self, rows: Rows, entries: Sequence[Entries], reaches: Reaches, vocab_size: int, pricing: Pricing | None
    ) -> DraftOutput:
        """Run `entries`; the last len(reaches[b]) of row b are nodes, reached with these probabilities. The policy, if
        any, is charged for every pass."""
        ...

    def pass_timers(self) -> dict[str, PassTimer]: ...


@dataclass(frozen=True, slots=True)
class Limits:
    """The size of a draft: depth, children per node, nodes, nodes expanded per pass.

    Nodes below `min_confidence` are not expanded; measured costs override it. `sample`: draw from the draft's own
    distribution, with or without replacement.
    """

    num_draft_tokens: int
    top_k: int
    nodes: int
    width: int
    min_confidence: float
    sample: bool = False
    replacement: bool = False

    def __post_init__(self) -> None:
        for what in ("num_draft_tokens", "top_k", "nodes", "width"):
            if getattr(self, what) < 1:
                raise ValueError(f"{what} must be at least 1, not {getattr(self, what)}")
        if not 0 <= self.min_confidence <= 1:
            raise ValueError(f"min_confidence must lie between 0 and 1, not {self.min_confidence}")
