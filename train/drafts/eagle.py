"""What an EAGLE-3 head to train is made of (arXiv 2503.01840): its shape, its start and its draft vocabulary.

The embedding is the target's and stays frozen. The output head starts from the target's rows of the draft vocabulary,
the final norm from the target's; the rest is random.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from draftsmith.train.drafts.shapes import SHAPE

if TYPE_CHECKING:  # `--help` reads the builder, and should not wait for torch
    from draftsmith.infer.heads.eagle import EagleDesign, EagleHead
    from draftsmith.train.drafts.eagle_draft import EagleDraft
    from draftsmith.train.drafts.trainable import BuildContext

SIZES = tuple(name for name in SHAPE if name != "hidden_size")
SWITCHES = ("norm_before_residual", "norm_output", "norm_before_fc", "fc_norm")


class EagleBuilder:
    """The options of a head; those that change nothing for engines are the default (vLLM and SGLang take such heads).

    Args:
        unrolls: how many tokens deep it is trained to draft on its own states (training-time test); 1: only on the
            target's states.
        num_layers: its layers.
        layers: the target's layers before which it reads the state; default: 2, half the depth, and the third from the
            end.
        draft_vocab: tokens that it can draft, the most frequent ones of the answers; 0: all of the target's.
        shape: intermediate_size, num_attention_heads, num_key_value_heads, head_dim, where they differ from the
            target's.
        rope_theta: base of its rotary positions.
        norm_before_residual: its first layer adds to the normed state; SGLang does not know this.
        norm_output: it is fed its state after the final norm.
        norm_before_fc: one norm over the target's states before they are joined.
        fc_norm: a norm for each of them.
        freeze_head: its output head stays the target's.
        init: fresh, or the folder of a head to go on from.
    """

    def __init__(
        self,
        unrolls: int = 3,
        num_layers: int = 1,
        layers: Sequence[int] | None = None,
        draft_vocab: int = 32000,
        shape: dict[str, int] | None = None,
        rope_theta: float = 10000.0,
        norm_before_residual: bool = False,
        norm_output: bool = False,
        norm_before_fc: bool = False,
        fc_norm: bool = False,
        freeze_head: bool = False,
        init: str = "fresh",
    ) -> None:
        self.unrolls = unrolls
        self.num_layers = num_layers
        self.layers = layers
        self.draft_vocab = draft_vocab
        self.shape = shape
        self.rope_theta = rope_theta
        self.norm_before_residual = norm_before_residual
        self.norm_output = norm_output
        self.norm_before_fc = norm_before_fc
        self.fc_norm = fc_norm
        self.freeze_head = freeze_head
        self.init = init

    def check(self, strategy: str, checkpointing: bool) -> None:
        """ValueError for options that do not fit together, or not to the run's; reads no file."""
        from draftsmith.train.drafts.heads import check_head_options

        check_head_options(strategy, False, unrolls=self.unrolls, num_layers=self.num_layers)
        if self.draft_vocab < 0:
            raise ValueError(f"--draft_vocab {self.draft_vocab}: it must not be negative; 0 is the whole vocabulary")
        if self.layers is not None and (not self.layers or min(self.layers) < 0):
            raise ValueError(f"--layers {list(self.layers)}: give the numbers of target layers, such as 2 16 29")
        for name, size in (self.shape or {}).items():
            if name not in SIZES or size < 1:
                raise ValueError(f"--shape {name} {size}: a head has sizes {', '.join(SIZES)}, and the target's width")
        if self.fc_norm and self.num_layers == len(self.layers or (2, 3, 4)):
            raise ValueError(f"--fc_norm with {self.num_layers} layers: give a number other than that of the states")
        if self.init != "fresh" and not Path(self.init).is_dir():
            raise ValueError(f"--init {self.init}: neither fresh nor the folder of a head")

    def build(self, run: BuildContext) -> EagleDraft:
        import torch

        from draftsmith.train.drafts.eagle_draft import EagleDraft, scale_states

        with torch.random.fork_rng():
            torch.manual_seed(run.seed)
            head = self._fresh(run) if self.init == "fresh" else self._trained_before(run)
        if not (head.design.norm_before_fc or head.design.fc_norm):
            scale_states(head, run, fresh=self.init == "fresh")
        head.requires_grad_(True)
        assert head.lm_head is not None
        head.lm_head.requires_grad_(not self.freeze_head)
        head.lend(run.target.get_input_embeddings(), None)
        if run.compile:
            for layer in head.model.layers:
                layer.compile()
        return EagleDraft(head.to(run.dtype).train(), self.unrolls, run)

    def _fresh(self, run: BuildContext) -> EagleHead:
        from draftsmith.infer.heads.eagle import EagleHead, rows_of
        from draftsmith.infer.heads.fresh_eagle_config import fresh_eagle_config
        from draftsmith.train.drafts.draft_vocabulary import draft_vocabulary
        from draftsmith.train.drafts.eagle_draft import start_from

        theirs = run.target.config.get_text_config()
        config = fresh_eagle_config(theirs, self.num_layers, self.rope_theta, **(self.shape or {}))
        ids_V = None
        if 0 < self.draft_vocab < config.vocab_size:
            always = {*run.special_ids, *stop_ids(run.target)}
            ids_V = rows_of(
                draft_vocabulary(run.corpus, config.vocab_size, self.draft_vocab, always), config.vocab_size
            )
        head = EagleHead(config, self._design(run.target), ids_V)
        start_from(run.target, head)
        return head

    def _design(self, target: Any) -> EagleDesign:
        from draftsmith.infer.heads.eagle import EagleDesign, default_features

        text = target.config.get_text_config()
        count = int(text.num_hidden_layers)
        if self.layers is None and count < 3:
            raise ValueError(f"the target has {count} layers, too few for the usual choice: give --layers")
        features = default_features(count) if self.layers is None else tuple(f"layer:{k}" for k in self.layers)
        beyond = [k for k in self.layers or () if k > count]
        if beyond:
            raise ValueError(f"--layers {list(self.layers or ())}: the target's last state is before layer {count}")
        return EagleDesign(3, features, int(text.hidden_size), **{name: getattr(self, name) for name in SWITCHES})

    def _trained_before(self, run: BuildContext) -> EagleHead:
        """The head in the folder `init`, which keeps its shape."""
        from draftsmith.infer.heads.folders import load_eagle

        head = load_eagle(self.init, run.target.config)
        if head.design.version != 3 or head.lm_head is None or head.embed_tokens is not None:
            raise ValueError(f"{self.init} is not an EAGLE-3 head with an output head and the target's embedding")
        given = {name for name, default in vars(EagleBuilder()).items() if getattr(self, name) != default}
        other = given & {"num_layers", "layers", "draft_vocab", "shape", "rope_theta", *SWITCHES}
        if other:
            raise ValueError(f"{self.init} keeps its shape: leave out --{' and --'.join(sorted(other))}")
        return head


def stop_ids(target: Any) -> Iterable[int]:
    """The tokens at which the target stops."""
    for config in (target.generation_config, target.config):
        found = getattr(config, "eos_token_id", None)
        yield from [found] if isinstance(found, int) else found or []
