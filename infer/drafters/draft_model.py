"""A draft model, and how it is run.

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
from draftsmith.infer.models.load import load_model
from draftsmith.infer.models.runner.entries import Entries

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Rows = Sequence[Any]
Reaches = Sequence[Sequence[float]]


@dataclass(frozen=True, slots=True)
class DraftModel:
    """A causal LM, and the tokenizer and the name that it was loaded with, where it was loaded by name."""

    model: Any
    tokenizer: PreTrainedTokenizerBase | None = None
    origin: str = ""

    @classmethod
    def of(cls, model: Any, dtype: str, device: str) -> DraftModel:
        """`model` itself, or loaded from a folder or Hub name."""
        if not isinstance(model, str):
            return cls(model.eval())
        loaded, tokenizer = load_model(model, dtype=dtype, device=device, for_decoding=True)
        return cls(loaded.eval(), tokenizer, model)


@dataclass(frozen=True, slots=True)
class DraftOutput:
    """[N, V] logits of all rows' nodes, row after row, and the layer at which each left a model with exits."""

    logits_NV: torch.Tensor
    exits: list[int] = field(default_factory=list)


class DraftForward(Protocol):
    """How the draft model is run. `lm` is its cache and forward pass, `entry` the name of the pass that every new node
    goes through."""

    lm: Any
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
