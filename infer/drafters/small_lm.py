"""A small language model of the target's vocabulary as drafter: chains, top-k trees, sampled chains and trees.

Legend: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from draftsmith.infer.contract.protocols import PassTimer, Target
from draftsmith.infer.costs.pass_costs import Costs
from draftsmith.infer.drafters.draft_model import DraftModel, Reaches, Rows, Sample, given_limits
from draftsmith.infer.drafters.draft_reader import DraftOutput, DraftRunner, TextReader
from draftsmith.infer.drafters.exit_choice import Pricing
from draftsmith.infer.drafters.lm_drafter import LMDrafter
from draftsmith.infer.models.architectures import prepare
from draftsmith.infer.models.decoding_runner import decoding_runner
from draftsmith.infer.models.pass_timer import CachedPassTimer
from draftsmith.infer.models.products.int8 import Int8, chosen
from draftsmith.infer.models.runner.entries import Entries
from draftsmith.infer.models.runner.model_runner import ModelRunner

NAME = "small"


def SmallLM(
    model: Any,
    num_draft_tokens: int | None = None,
    top_k: int | None = None,
    nodes: int = 14,
    width: int = 2,
    min_confidence: float = 0.15,
    sample: Sample | bool = "auto",
    replacement: bool = False,
    peaked: float | None = None,
    calibration: Any = "auto",
    costs: Any = "auto",
    dtype: str = "auto",
    device: str = "auto",
    int8: Int8 = "auto",
    tp: int = 1,
) -> LMDrafter:
    """A small causal LM as drafter.

    Args:
        model: a folder, a Hub name, or a loaded model.
        num_draft_tokens: the greatest depth; by default 4, 8 for coupled drafts, and for drawn ones 12 with measured
            costs and 4 without.
        top_k: children per node; 1 drafts a chain. By default 4, and 1 for drawn drafts.
        nodes: the most nodes of a tree; a chain is limited by num_draft_tokens only.
        width: how many nodes of a row the draft model expands per pass.
        min_confidence: do not expand nodes whose probability of being reached is below this; measured costs override
            it.
        sample: what to draft for rows with a temperature. drawn (or true): tokens drawn from the draft's distribution;
            coupled: the tokens that win under it when it shares the noise of the target's own draws; likeliest (or
            false): its likeliest tokens, which greedy rows always get; auto: drawn, and coupled as part of a mix.
        replacement: for drawn trees, draw the children of a node independently.
        peaked: for trees drawn without replacement; where the likeliest top_k - 1 tokens have at least this probability
            (by default 0.3), take them outright and draw one from the rest.
        calibration: a file, auto (what `draftsmith calibrate` measured for this draft and target, if it did), or none.
        costs: measured pass costs: a file, auto, or none.
        dtype: of the weights, if `model` is a name; auto: the target's.
        device: where to load `model`, if it is a name; auto: the target's.
        int8: run the draft's products in int8, on a CPU only; auto: if that is faster, timed when it is loaded by name.
            The target's text does not change.
        tp: ranks that the draft's weights are split over: the target's, as its own tp says; 1 keeps it whole on the
            first of them.
    """
    limits = given_limits(4, num_draft_tokens, top_k, nodes, width, min_confidence, sample, replacement, peaked)
    draft = DraftModel.of(model, dtype, device, tp)
    layers = int(draft.config.get_text_config().num_hidden_layers)
    in_int8 = draft.may_choose(int8)

    def load(model: Any) -> ModelRunner:
        plan = prepare(model)
        return decoding_runner(chosen(model, plan, in_int8, limits.likeliest.width), plan)

    return LMDrafter(NAME, TextReader(draft, WholeForward(), load), limits, {layers: NAME}, calibration, costs)


class WholeForward:
    """Runs every node through the whole model."""

    lm: DraftRunner
    exits: Sequence[int] = ()
    eager = False

    def __init__(self) -> None:
        self.entry = NAME
        self.names: Sequence[str] = [NAME]

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

    def timer(self, name: str) -> PassTimer:
        return CachedPassTimer(self.lm)
