"""EAGLE heads as drafter: versions 1 and 2 (arXiv 2401.15077, 2406.16858; one format) and 3 (2503.01840).

The tree is grown as EAGLE-2 grows it, from the likeliest nodes by cumulated confidence, by the one builder.
"""

from __future__ import annotations

from typing import Any

from draftsmith.infer.contract.protocols import Target
from draftsmith.infer.drafters.draft_model import Sample, given_limits
from draftsmith.infer.drafters.heads.pair_reader import PairReader
from draftsmith.infer.drafters.lm_drafter import LMDrafter
from draftsmith.infer.heads.folders import load_eagle
from draftsmith.infer.models.load import check_model, choose_device

NAME = "eagle"


def Eagle(
    model: Any,
    num_draft_tokens: int | None = None,
    top_k: int | None = None,
    nodes: int = 24,
    width: int = 4,
    min_confidence: float = 0.1,
    sample: Sample | bool = "auto",
    replacement: bool = False,
    peaked: float | None = None,
    calibration: Any = "auto",
    costs: Any = "auto",
    dtype: str = "auto",
    device: str = "auto",
) -> LMDrafter:
    """An EAGLE head as drafter. It reads the target's states, so it runs with the target that it was trained for.

    Args:
        model: a folder or a Hub name of a head, or a loaded head.
        num_draft_tokens: the greatest depth; by default 6, 8 for coupled drafts, and for drawn ones 12 with measured
            costs and 4 without.
        top_k: children per node; 1 drafts a chain. By default 4, and 1 for drawn drafts.
        nodes: the most nodes of a tree; a chain is limited by num_draft_tokens only.
        width: how many nodes of a row the head expands per pass.
        min_confidence: do not expand nodes whose probability of being reached is below this; measured costs override
            it.
        sample: what to draft for rows with a temperature. drawn (or true): tokens drawn from the head's distribution;
            coupled: the tokens that win under it when it shares the noise of the target's own draws; likeliest (or
            false): its likeliest tokens, which greedy rows always get; auto: drawn, and coupled as part of a mix.
        replacement: for drawn trees, draw the children of a node independently.
        peaked: for trees drawn without replacement; where the likeliest top_k - 1 tokens have at least this probability
            (by default 0.3), take them outright and draw one from the rest.
        calibration: a file, auto (what `draftsmith calibrate` measured for this head and target, if it did), or none.
        costs: measured pass costs: a file, auto, or none.
        dtype: of the weights, if `model` is a name; auto: the target's.
        device: where to load `model`, if it is a name; auto: the target's.
    """
    limits = given_limits(6, num_draft_tokens, top_k, nodes, width, min_confidence, sample, replacement, peaked)
    if not isinstance(model, str):
        reader = PairReader(NAME, lambda target: (model, ""))
    else:
        check_model(model, dtype, device)

        def load(target: Target) -> tuple[Any, str]:
            assert target.model is not None
            return load_eagle(model, target.model.config, dtype).to(choose_device(device)), model

        reader = PairReader(NAME, load, model, dtype == "auto", device == "auto")
    return LMDrafter(NAME, reader, limits, {0: NAME}, calibration, costs)
