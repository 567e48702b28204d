"""A small language model of the target's vocabulary as drafter: chains, top-k trees, sampled chains and trees.

How it drafts stands in infer/drafters/lm_drafter.py; this is the model read whole, and its settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from draftsmith.infer.contract.draft import Draft
from draftsmith.infer.contract.protocols import Budget, Feedback, Target, Verdict
from draftsmith.infer.contract.row import Row
from draftsmith.infer.costs.calibration import given_calibration, given_costs
from draftsmith.infer.costs.policy import Policy
from draftsmith.infer.drafters.draft_forward import WholeForward
from draftsmith.infer.drafters.lm_drafter import Limits, LMDrafter
from draftsmith.infer.models.architectures import prepare
from draftsmith.infer.models.cached_lm import CachedLM
from draftsmith.infer.models.load import check_same_tokenizer, load_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from draftsmith.infer.contract.protocols import PassTimer


class SmallLM:
    """A small causal LM as drafter.

    Args:
        model: a folder, a Hub name, or a model that is already there.
        num_draft_tokens: how deep to draft.
        top_k: children per node; 1 drafts a chain, which is what a target that takes no trees wants.
        nodes: the most nodes of a tree; a chain may be num_draft_tokens long.
        width: how many nodes of a row the draft model expands per pass.
        min_confidence: go no deeper below a node whose probability, multiplied down from the root, is under this;
            where costs are known they decide, and this is not looked at.
        sample: draw from the draft's own distribution (at the row's temperature and truncation) instead of taking the
            likeliest; a greedy row is drafted for greedily all the same.
        replacement: for sampled trees, whether the children of a node are drawn independently.
        calibration: a file, auto (what `draftsmith calibrate` left for this draft and target, if it did), or none.
        costs: likewise, what passes cost on this machine.
        dtype: of the weights, where `model` is a name.
        device: likewise.
    """

    name = "small"
    features: tuple[str, ...] = ()

    def __init__(
        self,
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
    ) -> None:
        limits = Limits(num_draft_tokens, top_k, nodes, width, min_confidence, sample, replacement)
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.origin = model if isinstance(model, str) else ""
        if isinstance(model, str):
            model, self.tokenizer = load_model(model, dtype=dtype, device=device, for_decoding=True)
        self.calibration = calibration
        self.costs = costs
        self.model = model.eval()
        config = model.config.get_text_config()
        self.exit_sources = {int(config.num_hidden_layers): self.name}
        self.lm = CachedLM(model, prepare(model))
        self.drafter = LMDrafter(WholeForward(self.lm, self.name), config, limits, {0: self.name})

    @property
    def forward_seconds(self) -> float:
        return self.lm.forward_seconds

    @property
    def bytes_moved(self) -> int:
        return self.lm.bytes_moved

    def pass_timers(self) -> dict[str, PassTimer]:
        """What there is to time: the draft model's own passes."""
        from draftsmith.infer.models.pass_timer import CachedPassTimer

        return {self.name: CachedPassTimer(self.lm)}

    def bind(self, target: Target) -> None:
        check_same_tokenizer(
            self.tokenizer, self.drafter.draft_vocab_size, target.tokenizer, target.vocab_size, "the draft model"
        )
        known = given_calibration(self.calibration, self.origin, target)
        costs = given_costs(self.costs, self.origin, target)
        policy = Policy(costs, self.name) if costs is not None else None
        self.drafter.know(target.vocab_size, known, policy)

    def open(self, rows: Sequence[Row], feedback: Sequence[Feedback]) -> None:
        self.drafter.open(rows)

    def close(self, rows: Sequence[Row]) -> None:
        self.drafter.close(rows)

    def propose(self, rows: Sequence[Row], budgets: Sequence[Budget]) -> list[Draft]:
        return self.drafter.propose(rows, budgets)

    def observe(self, rows: Sequence[Row], verdicts: Sequence[Verdict], feedback: Sequence[Feedback]) -> None:
        self.drafter.observe(rows, verdicts)
