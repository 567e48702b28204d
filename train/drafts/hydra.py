"""Hydra heads to train on a frozen target (arXiv 2402.05109): each reads the tokens of its path as well, in training
those of the text. Hydra++ has a prefix layer, which the target's states pass first."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `--help` reads this class, and should not wait for torch
    from draftsmith.infer.contract.protocols import Drafter
    from draftsmith.train.drafts.heads import HeadsDraft
    from draftsmith.train.drafts.trainable import BuildContext


class HydraBuilder:
    """The draft of `draftsmith train hydra`.

    Args:
        num_heads: heads; head i predicts the token i + 2 places after the state that it reads, counted from 0.
        num_layers: blocks of each head.
        prefix: a decoder layer that the target's states pass first, as in Hydra++.
        dropout: before each block and each output matrix.
        init: target (the target's output matrix, blocks that give the state alone), or the folder of trained heads to
            continue from.
    """

    def __init__(
        self,
        num_heads: int = 4,
        num_layers: int = 1,
        prefix: bool = False,
        dropout: float = 0.0,
        init: str = "target",
    ) -> None:
        self.num_heads = num_heads
        self.num_layers = num_layers
        self.prefix = prefix
        self.dropout = dropout
        self.init = init

    def check(self, strategy: str, checkpointing: bool) -> None:
        from draftsmith.train.drafts.heads import check_head_options

        check_head_options(strategy, checkpointing, num_heads=self.num_heads, num_layers=self.num_layers)
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout {self.dropout}: it must be at least 0 and below 1")

    def build(self, run: BuildContext) -> HeadsDraft:
        import torch

        from draftsmith.infer.heads.folders import load_hydra, save_hydra
        from draftsmith.infer.heads.hydra import HydraHeads
        from draftsmith.train.drafts.heads import HeadsDraft, begin_heads, check_trained, prefix_config, ready

        if self.init == "target":
            config = run.target.config.get_text_config()
            layer = prefix_config(config) if self.prefix else None
            with torch.random.fork_rng():
                torch.manual_seed(run.seed)
                heads = HydraHeads(config.hidden_size, config.vocab_size, self.num_heads, self.num_layers, layer)
            begin_heads(heads, run)
        else:
            heads = load_hydra(self.init, run.target.config)
            check_trained(self.init, heads, self.num_heads, self.num_layers)
            if (heads.prefix is not None) != self.prefix:
                has = "has no" if self.prefix else "has a"
                raise ValueError(f"{self.init} {has} prefix layer: give --prefix {str(not self.prefix).lower()}")
        write = partial(save_hydra, trained_for=run.trained_for)
        item, embedding = run.target.dtype.itemsize, run.target.get_input_embeddings()
        width = item * heads.width
        return HeadsDraft(ready(heads, run), hydra_drafter, write, width, embedding, self.dropout, run.seed)


def hydra_drafter(heads: Any, depth: int) -> Drafter:
    from draftsmith.infer.drafters.heads.hydra import Hydra

    return Hydra(heads, num_draft_tokens=depth)
