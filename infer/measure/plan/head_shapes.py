"""Heads that `plan` can time beside draft shapes: random ones of the target's width, as their trainers make them.

`eagle` drafts the target's whole vocabulary, `eagle:32000` that many of its tokens; `medusa:4` and `hydra:4` have four
heads; `mtp` is one layer over the target's last state, with the target's output matrix.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from draftsmith.infer.contract.protocols import PassTimer
from draftsmith.infer.costs.roofline import Work
from draftsmith.infer.drafters.heads.hydra import HydraRows
from draftsmith.infer.drafters.heads.medusa import MedusaRows
from draftsmith.infer.drafters.heads.state_reader import HeadPassTimer
from draftsmith.infer.heads.eagle import EagleDesign, EagleHead, default_features
from draftsmith.infer.heads.fresh_eagle_config import fresh_eagle_config
from draftsmith.infer.heads.hydra import HydraHeads
from draftsmith.infer.heads.medusa import MedusaHeads
from draftsmith.infer.measure.forecast.drafting import Drafting
from draftsmith.infer.measure.plan.shapes import Size
from draftsmith.infer.models.pass_timer import CachedPassTimer
from draftsmith.infer.models.runner.masks import MaskPlan
from draftsmith.infer.models.runner.model_runner import ModelRunner

# Whose number after the colon is that of heads; an EAGLE head's is that of tokens.
COUNTED = ("medusa", "hydra")
KINDS = ("eagle", *COUNTED, "mtp")
DEFAULT_HEADS = 4


@dataclass(frozen=True, slots=True)
class CandidateHead:
    """`size`: heads of Medusa and Hydra, tokens that an EAGLE head drafts (0: all of the target's)."""

    kind: str
    size: int = 0

    @classmethod
    def parse(cls, text: str) -> CandidateHead:
        """Such as eagle, eagle:32000, medusa:4, hydra:4 or mtp."""
        kind, colon, size = text.partition(":")
        if kind not in KINDS or (colon and (kind == "mtp" or not re.fullmatch(r"[1-9]\d*", size))):
            raise ValueError(f"{text!r} is no head: write eagle, eagle:TOKENS, medusa:HEADS, hydra:HEADS or mtp")
        return cls(kind, int(size) if colon else DEFAULT_HEADS if kind in COUNTED else 0)

    @classmethod
    def names(cls, text: str) -> bool:
        """Whether a word is meant for a head, not for a shape."""
        return text.partition(":")[0] in KINDS

    def __str__(self) -> str:
        return f"{self.kind}:{self.size}" if self.size else self.kind

    @property
    def depth(self) -> int:
        return self.size if self.kind in COUNTED else sys.maxsize

    def drafting(self, drafting: Drafting) -> Drafting:
        """`drafting` with the passes that this head makes."""
        return replace(drafting, passes=(1,)) if self.kind == "medusa" else drafting

    def made(self, config: Any, dtype: torch.dtype) -> nn.Module:
        """A random one, on the device in use."""
        text = config.get_text_config()
        width, vocab_size = int(text.hidden_size), int(text.vocab_size)
        if self.kind in COUNTED:
            kind: Any = MedusaHeads if self.kind == "medusa" else HydraHeads
            found: nn.Module = kind(width, vocab_size, self.size)
        else:
            if self.size > vocab_size:
                raise ValueError(f"{self} drafts more tokens than the target's {vocab_size}")
            count, third = int(text.num_hidden_layers), self.kind == "eagle"
            features = default_features(max(count, 3)) if third else ("last",)
            ids_V = torch.arange(self.size) if self.size else None
            found = EagleHead(fresh_eagle_config(text), EagleDesign(3 if third else 1, features, width), ids_V)
        return found.to(dtype).eval()

    def timer(self, config: Any, dtype: torch.dtype, device: torch.device) -> PassTimer:
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices), device:
            torch.manual_seed(0)
            head: Any = self.made(config, dtype)
        if self.kind in COUNTED:
            rows: Any = (MedusaRows if self.kind == "medusa" else HydraRows)(head, self.size)
            if self.kind == "hydra":
                rows.lend(nn.Embedding(1, head.width, device=device, dtype=dtype))
            return HeadPassTimer(rows, device)
        pair = 2 * int(head.config.hidden_size)
        return CachedPassTimer(
            ModelRunner(head, MaskPlan()), lambda tokens: torch.zeros((tokens, pair), dtype=dtype, device=device)
        )

    def sized(self, config: Any, dtype: torch.dtype) -> Size:
        """Counted on the meta device."""
        with torch.device("meta"):
            head: Any = self.made(config, dtype)
        parameters = list(head.parameters())
        every, outputs = sum(one.numel() for one in parameters), sum(one.numel() for one in self._outputs(head))
        own = every - outputs if self.kind == "mtp" else every
        token_bytes = 0
        if self.kind not in COUNTED:
            token_bytes = 2 * head.config.num_key_value_heads * head.config.head_dim * dtype.itemsize
        return Size(
            layers=1,
            parameters=own,
            layer_bytes=(every - outputs) * dtype.itemsize,
            head_bytes=outputs * dtype.itemsize,
            read_bytes=every * dtype.itemsize,
            total_bytes=own * dtype.itemsize,
            token_bytes=token_bytes,
            multiplied=every,
        )

    def work(self, config: Any, dtype: torch.dtype) -> Work:
        """What one pass multiplies and reads."""
        with torch.device("meta"):
            head: Any = self.made(config, dtype)
        run: Any = head
        if self.kind == "hydra":  # one head per pass: the middle one, for they grow by the same amount
            run = head.heads[self.size // 2]
        elif self.kind == "eagle":  # fc joins the target's states once per step
            run = nn.ModuleList([head.model, head.lm_head])
        matrices = Counter(one.numel() for one in run.parameters() if one.dim() == 2)
        attends = self.kind not in COUNTED
        return Work(
            layers=1,
            itemsize=dtype.itemsize,
            dtype=str(dtype).removeprefix("torch."),
            matrices=dict(matrices),
            token_bytes=self.sized(config, dtype).token_bytes,
            pair_flops=4 * head.config.num_attention_heads * head.config.head_dim if attends else 0,
        )

    def _outputs(self, head: Any) -> Sequence[nn.Parameter]:
        if self.kind in COUNTED:
            return [each for one in head.heads for each in one.lm_head.parameters()]
        return list(head.lm_head.parameters())


def drafting_of(heads: Sequence[CandidateHead], shape: str, drafting: Drafting) -> Drafting:
    """`drafting` with the passes of this shape, which may be a head."""
    return next((head.drafting(drafting) for head in heads if str(head) == shape), drafting)
