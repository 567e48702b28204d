"""The head that a target's own checkpoint brings, for multi-token prediction (MTP, arXiv 2412.19437), as drafter.

It was trained for one step, which is run again and again: its normed output takes the place of the target's next state.
"""

from __future__ import annotations

from typing import Any

from draftsmith.infer.contract.protocols import Target
from draftsmith.infer.drafters.draft_model import Sample, given_limits
from draftsmith.infer.drafters.heads.pair_reader import PairReader
from draftsmith.infer.drafters.lm_drafter import LMDrafter
from draftsmith.infer.heads.mtp_folder import load_mtp
from draftsmith.infer.models.load import check_model, choose_device

NAME = "mtp"


def MTP(
    model: Any = None,
    num_draft_tokens: int | None = None,
    top_k: int | None = None,
    nodes: int = 14,
    width: int = 3,
    min_confidence: float = 0.15,
    sample: Sample | bool = "auto",
    replacement: bool = False,
    peaked: float | None = None,
    calibration: Any = "auto",
    costs: Any = "auto",
    dtype: str = "auto",
    device: str = "auto",
) -> LMDrafter:
    """A target's own MTP head as drafter.

    Args:
        model: another folder or Hub name whose head to use, or a loaded head; by default the target's own checkpoint.
        num_draft_tokens: the greatest depth; by default 3, 8 for coupled drafts, and for drawn ones 12 with measured
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
        dtype: of the weights, if they are loaded here; auto: the target's.
        device: where to load the head; auto: the target's.
    """
    limits = given_limits(3, num_draft_tokens, top_k, nodes, width, min_confidence, sample, replacement, peaked)
    if model is not None and not isinstance(model, str):
        reader = PairReader(NAME, lambda target: (model, ""))
    else:
        if model is not None:
            check_model(model, dtype, device)

        def load(target: Target) -> tuple[Any, str]:
            assert target.model is not None
            name = model or str(getattr(target.model.config, "_name_or_path", ""))
            if not name:
                raise ValueError("mtp reads the head in the target's own checkpoint, and this target has none")
            return load_mtp(name, target.model.config, dtype).to(choose_device(device)), name

        reader = PairReader(NAME, load, model or "", dtype == "auto", device == "auto")
    return LMDrafter(NAME, reader, limits, {0: NAME}, calibration, costs)
