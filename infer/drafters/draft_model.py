"""A draft model, and how large its drafts are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from draftsmith.infer.contract.arguments import at_least
from draftsmith.infer.contract.protocols import Target, ranks_of
from draftsmith.infer.models.load import check_model, load_config, load_model
from draftsmith.infer.models.products.int8 import Int8
from draftsmith.infer.models.products.replace import replace_products, restore_products
from draftsmith.infer.models.tensor_parallel.leading_runner import LeadingRunner
from draftsmith.infer.text.tokenizer import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# What to draft for rows with a temperature: tokens that win the target's race under the draft's distribution
# (coupled.py), tokens drawn from it (drawn.py), or its likeliest ones. auto: drawn, and coupled as part of a mix.
Sample = Literal["auto", "coupled", "drawn", "likeliest"]

# The default depth of coupled drafts: confidence and costs decide how much of it is drafted.
COUPLED = 8
# The default depth of drawn drafts: with costs the most, as they decide what pays, and without.
DRAWN_PRICED, DRAWN = 12, 4
# The probability of the likeliest tokens from which on taking them outright is accepted more often than drawing them:
# measured with two, three and four children (LOG.md has the table).
PEAKED = 0.3

Rows = Sequence[Any]
Reaches = Sequence[Sequence[float]]


@dataclass(frozen=True, slots=True)
class DraftModel:
    """A causal LM with its config, and the tokenizer and the name that it was loaded with, where it was loaded by name.

    `dtype`: as asked for. `follows_dtype`, `follows_device`: it takes its target's, because none was asked for.
    `tp`: ranks to split it over, which are its target's; `model` is None then, until it is loaded for a target."""

    model: Any
    config: Any
    tokenizer: PreTrainedTokenizerBase | None = None
    origin: str = ""
    dtype: str = "auto"
    follows_dtype: bool = False
    follows_device: bool = False
    tp: int = 1

    @classmethod
    def of(cls, model: Any, dtype: str, device: str, tp: int = 1) -> DraftModel:
        """`model` itself, or loaded from a folder or Hub name."""
        at_least(1, tp=tp)
        if tp > 1:
            if not isinstance(model, str):
                raise ValueError("tp splits a draft that every rank can load: give its folder or Hub name")
            check_model(model, dtype, tp=tp)
            return cls(None, load_config(model), load_tokenizer(model), model, dtype, dtype == "auto", True, tp)
        if not isinstance(model, str):
            return cls(model.eval(), model.config)
        loaded, tokenizer = load_model(model, dtype=dtype, device=device, for_decoding=True)
        return cls(loaded.eval(), loaded.config, tokenizer, model, dtype, dtype == "auto", device == "auto")

    def may_choose(self, int8: Int8) -> Int8:
        """What `int8` says; auto is off for a model that was given as an object, whose passes nobody asked to time, and
        for one that is split."""
        if int8 is True and self.tp > 1:
            raise ValueError("int8 drafts are not split over ranks: leave out int8 or tp")
        return False if int8 == "auto" and (not self.origin or self.tp > 1) else int8

    def follow(self, target: Any) -> bool:
        """Take the dtype and the device of the target's model, as far as they were left open; whether that changed any.

        A draft is often trained in float32, and in its target's bfloat16 it takes a half to a quarter of the time. What
        it proposes may change by rounding; the text does not."""
        return follow(self.model, target.get_input_embeddings().weight, self.follows_dtype, self.follows_device)

    def split(self, target: Target, exits: Sequence[int], eager: bool) -> LeadingRunner:
        """Load it over the ranks of its target."""
        has = ranks_of(target)
        if has != self.tp:
            raise ValueError(
                f"{self.origin}[tp={self.tp}] is to be split over the ranks of its target, which has {has}: give both "
                "the same number, or leave out the draft's"
            )
        over_ranks: Any = target
        weight = over_ranks.model.get_input_embeddings().weight
        follows = self.follows_dtype and weight.is_floating_point()
        dtype = str(weight.dtype).removeprefix("torch.") if follows else self.dtype
        runner: LeadingRunner = over_ranks.shares.draft_runner(self.origin, dtype, exits, eager)
        return runner


def follow(model: Any, wanted: torch.Tensor, dtype_too: bool, device_too: bool) -> bool:
    """Move `model` to the dtype and the device of this weight of its target; whether that changed any."""
    own = next(model.parameters())
    dtype = wanted.dtype if dtype_too and wanted.is_floating_point() else own.dtype
    device = wanted.device if device_too else own.device
    if (dtype, device) == (own.dtype, own.device):
        return False
    restore_products(model)
    model.to(device=device, dtype=dtype)
    replace_products(model)
    return True


@dataclass(frozen=True, slots=True)
class Limits:
    """The size of a tree of likeliest tokens: depth, children per node, nodes, nodes expanded per pass.

    Nodes below `min_confidence` are not expanded; measured costs override it.
    """

    num_draft_tokens: int
    top_k: int
    nodes: int
    width: int
    min_confidence: float

    def __post_init__(self) -> None:
        at_least(1, num_draft_tokens=self.num_draft_tokens, top_k=self.top_k, nodes=self.nodes, width=self.width)
        if not 0 <= self.min_confidence <= 1:
            raise ValueError(f"min_confidence must lie between 0 and 1, not {self.min_confidence}")

    def depth(self, priced: bool) -> int:
        """The most tokens in a row."""
        return self.num_draft_tokens


@dataclass(frozen=True, slots=True)
class DrawnLimits:
    """The size of a drawn draft: depth (None: by default), children per node (1: a chain) and nodes.

    `replacement`: children are drawn independently. `peaked`: where the likeliest top_k - 1 tokens have at least this
    probability, they are taken outright and one is drawn from the rest; not with replacement.
    """

    num_draft_tokens: int | None
    top_k: int
    nodes: int
    replacement: bool = False
    peaked: float = PEAKED

    def __post_init__(self) -> None:
        if not 0 <= self.peaked <= 1:
            raise ValueError(f"peaked must lie between 0 and 1, not {self.peaked}")

    def depth(self, priced: bool) -> int:
        """The most tokens in a row; `priced`: costs decide how many of them are drawn."""
        return self.num_draft_tokens or (DRAWN_PRICED if priced else DRAWN)


@dataclass(frozen=True, slots=True)
class DraftLimits:
    """The sizes of a drafter's drafts: `likeliest` of trees of likeliest tokens, which greedy rows get, and for rows
    with a temperature `drawn` or `coupled`: both are there if it depends on whether the drafter is part of a mix, and
    if both are None, these rows get the likeliest tokens too."""

    likeliest: Limits
    coupled: Limits | None = None
    drawn: DrawnLimits | None = None

    @property
    def nodes(self) -> int:
        """The most nodes of any draft."""
        return max(self.likeliest.nodes, 0 if self.drawn is None else self.drawn.nodes)


def given_limits(
    depth: int,
    num_draft_tokens: int | None,
    top_k: int | None,
    nodes: int,
    width: int,
    min_confidence: float,
    sample: Sample | bool,
    replacement: bool,
    peaked: float | None,
    children: int = 4,
) -> DraftLimits:
    """What the user asked for. By default, trees of likeliest tokens are `depth` deep and have `children` below a node,
    and drawn drafts are chains."""

    def outright(depth: int) -> Limits:
        most = depth if num_draft_tokens is None else num_draft_tokens
        return Limits(most, children if top_k is None else top_k, nodes, width, min_confidence)

    if isinstance(sample, bool):
        sample = "drawn" if sample else "likeliest"
    if sample not in get_args(Sample):
        raise ValueError(f"unknown sample {sample!r}: {', '.join(get_args(Sample))}")
    likeliest = outright(depth)
    if sample not in ("auto", "drawn"):
        if replacement or peaked is not None:
            raise ValueError("replacement and peaked are for drawn drafts: add sample=drawn")
        return DraftLimits(likeliest, coupled=outright(COUPLED) if sample == "coupled" else None)
    if peaked is not None and (likeliest.top_k == 1 or top_k is None or replacement):
        raise ValueError("peaked is for trees drawn without replacement: give top_k=2 or more with it")
    threshold = PEAKED if peaked is None else peaked
    drawn = DrawnLimits(num_draft_tokens, top_k or 1, nodes, replacement, threshold)
    return DraftLimits(likeliest, coupled=outright(COUPLED) if sample == "auto" else None, drawn=drawn)
