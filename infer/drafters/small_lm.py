"""A small language model of the target's vocabulary as drafter: chains, top-k trees, sampled chains and trees.

Legend: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from draftsmith.infer.contract.protocols import PassTimer, Target
from draftsmith.infer.costs.pass_costs import Costs
from draftsmith.infer.drafters.draft_model import DraftModel, DraftOutput, Limits, Reaches, Rows
from draftsmith.infer.drafters.exit_choice import Pricing
from draftsmith.infer.drafters.lm_drafter import LMDrafter
from draftsmith.infer.models.architectures import prepare
from draftsmith.infer.models.decoding_runner import decoding_runner
from draftsmith.infer.models.int8 import Int8, chosen
from draftsmith.infer.models.pass_timer import CachedPassTimer
from draftsmith.infer.models.runner.entries import Entries

NAME = "small"


def SmallLM(
    model: Any,
    num_draft_tokens: int = 4,
    top_k: int = 4,
    nodes: int = 14,
    width: int = 2,
    min_confidence: float = 0.15,
    sample: bool = False,
    replacement: bool = False,
    calibration: Any = "auto",
    costs: Any = "auto",
    dtype: str = "auto",
    device: str = "auto",
    int8: Int8 = "auto",
) -> LMDrafter:
    """A small causal LM as drafter.

    Args:
        model: a folder, a Hub name, or a loaded model.
        num_draft_tokens: the greatest depth.
        top_k: children per node; 1 drafts a chain, for targets without tree attention.
        nodes: the most nodes of a tree; a chain is limited by num_draft_tokens only.
        width: how many nodes of a row the draft model expands per pass.
        min_confidence: do not expand nodes whose probability of being reached is below this; measured costs override
            it.
        sample: draw from the draft's own distribution (at the row's temperature and truncation) instead of taking the
            likeliest tokens; greedy rows are still drafted for greedily.
        replacement: for sampled trees, draw the children of a node independently.
        calibration: a file, auto (what `draftsmith calibrate` measured for this draft and target, if it did), or none.
        costs: measured pass costs: a file, auto, or none.
        dtype: of the weights, if `model` is a name; auto: the target's.
        device: where to load `model`, if it is a name; auto: the target's.
        int8: run the draft's products in int8, on a CPU only; auto: if that is faster, timed when it is loaded by name.
            The target's text does not change.
    """
    limits = Limits(num_draft_tokens, top_k, nodes, width, min_confidence, sample, replacement)
    draft = DraftModel.of(model, dtype, device)
    layers = int(draft.model.config.get_text_config().num_hidden_layers)
    choice = draft.may_choose(int8)
    return LMDrafter(
        NAME, draft, partial(WholeForward, int8=choice, width=width), limits, {layers: NAME}, calibration, costs
    )


class WholeForward:
    """Runs every node through the whole model."""

    def __init__(self, model: Any, int8: Int8 = False, width: int = 1) -> None:
        plan = prepare(model)
        self.lm = decoding_runner(chosen(model, plan, int8, width), plan)
        self.entry = NAME

    def assumed_costs(self, target: Target) -> Costs | None:
        return None

    def prefill(self, rows: Rows, tokens: Sequence[list[int]]) -> None:
        self.lm.prefill(rows, tokens)

    def read(
        self, rows: Rows, entries: Sequence[Entries], reaches: Reaches, vocab_size: int, pricing: Pricing | None
    ) -> DraftOutput:
        if pricing is not None:
            pricing.policy.charge(NAME, {row: len(entry.tokens) for row, entry in zip(rows, entries)})
        output = self.lm.forward(rows, entries, wanted=[len(nodes) for nodes in reaches])
        return DraftOutput(output.logits_NV[:, :vocab_size])

    def pass_timers(self) -> dict[str, PassTimer]:
        return {NAME: CachedPassTimer(self.lm)}
