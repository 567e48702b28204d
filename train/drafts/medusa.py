"""Medusa heads to train on a frozen target (Medusa-1, arXiv 2401.10774): residual blocks that change nothing at first,
and the target's output matrix for each head."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `--help` reads this class, and should not wait for torch
    from draftsmith.infer.contract.protocols import Drafter
    from draftsmith.train.drafts.heads import HeadsDraft
    from draftsmith.train.drafts.trainable import BuildContext


class MedusaBuilder:
    """The draft of `draftsmith train medusa`.

    Args:
        num_heads: heads; head i predicts the token i + 2 places after the state that it reads, counted from 0.
        num_layers: residual blocks of each head.
        init: target (the target's output matrix, blocks that change nothing), or the folder of trained heads to
            continue from.
    """

    def __init__(self, num_heads: int = 4, num_layers: int = 1, init: str = "target") -> None:
        self.num_heads = num_heads
        self.num_layers = num_layers
        self.init = init

    def check(self, strategy: str, checkpointing: bool) -> None:
        from draftsmith.train.drafts.heads import check_head_options

        check_head_options(strategy, checkpointing, num_heads=self.num_heads, num_layers=self.num_layers)

    def build(self, run: BuildContext) -> HeadsDraft:
        import torch

        from draftsmith.infer.heads.folders import load_medusa, save_medusa
        from draftsmith.infer.heads.medusa import MedusaHeads
        from draftsmith.train.drafts.heads import HeadsDraft, begin_heads, check_trained, ready

        if self.init == "target":
            config = run.target.config.get_text_config()
            with torch.random.fork_rng():
                torch.manual_seed(run.seed)
                heads = MedusaHeads(config.hidden_size, config.vocab_size, self.num_heads, self.num_layers)
            begin_heads(heads, run)
        else:
            heads = load_medusa(self.init, run.target.config)
            check_trained(self.init, heads, self.num_heads, self.num_layers)
        write = partial(save_medusa, trained_for=run.trained_for)
        return HeadsDraft(ready(heads, run), medusa_drafter, write, run.target.dtype.itemsize * heads.width)


def medusa_drafter(heads: Any, depth: int) -> Drafter:
    from draftsmith.infer.drafters.heads.medusa import Medusa

    return Medusa(heads, num_draft_tokens=depth)
