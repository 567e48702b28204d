"""SD2: a sorted draft that is run only as deep as each node is worth (S2D, arXiv 2407.01955).

One model with several exits; `selection` chooses the exit of each node from the distribution that stands there, before
anything is drawn from it (infer/drafters/exit_choice.py), and layers that were left out are filled in when something
deeper needs them (infer/models/exit_lm.py). The same checkpoint serves several targets of one tokenizer: what is
calibrated lies beside it, a file per target. How the tree is grown stands in infer/drafters/lm_drafter.py.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from draftsmith.infer.contract.draft import Draft
from draftsmith.infer.contract.protocols import Budget, Feedback, Target, Verdict
from draftsmith.infer.contract.row import Row
from draftsmith.infer.costs.calibration import given_calibration, given_costs
from draftsmith.infer.costs.pass_costs import Costs, PassCost
from draftsmith.infer.costs.policy import Policy
from draftsmith.infer.drafters.draft_forward import ExitForward
from draftsmith.infer.drafters.exit_choice import Cost, ExitChoice, Fixed, LevelThreshold, Threshold
from draftsmith.infer.drafters.lm_drafter import Limits, LMDrafter
from draftsmith.infer.models.architectures import prepare
from draftsmith.infer.models.cached_lm import weight_bytes
from draftsmith.infer.models.exit_lm import ExitLM
from draftsmith.infer.models.load import check_same_tokenizer, load_model

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from draftsmith.infer.contract.protocols import PassTimer

log = logging.getLogger(__name__)

# Where nothing was measured: a pass takes as long as its weights take to read, and 1.4 times that more for 64 tokens.
# A target that does not say how much it reads is taken to be so many times the draft.
ASSUMED_TOKENS, ASSUMED_GROWTH, ASSUMED_TARGET = 64, 1.4, 8.0


class SD2:
    """A sorted draft as drafter: the exit is chosen per node.

    Args:
        model: a folder, a Hub name, or a model that is already there.
        exits: numbers of layers after which the draft can be left; not given: the checkpoint's own `sorted_exits`.
        selection: cost (what is gained against what it takes), threshold (leave where the likeliest token is surer than
            a value), level_threshold (the published rule for trees: the surest node of a level decides for all of it),
            or fixed (always leave at `exit`).
        exit: of selection fixed.
        thresholds: one per exit, of the selections that have them; not given: 0.5 for each but the last, and 0.
        num_draft_tokens: how deep to draft at most.
        top_k: children per node; 1 drafts a chain.
        nodes: the most nodes of a tree; a chain may be num_draft_tokens long.
        width: how many nodes of a row are expanded per pass at most.
        min_confidence: go no deeper below a node less likely than this; not looked at where costs decide.
        sample: draw from the draft's own distribution instead of taking the likeliest.
        replacement: for sampled trees, whether the children of a node are drawn independently.
        eager: run every layer for every token at once (the same drafts, and more work).
        calibration: a file, auto (what `draftsmith calibrate` left for this draft and target), or none.
        costs: likewise, what passes cost on this machine.
        dtype: of the weights, where `model` is a name.
        device: likewise.
    """

    name = "sd2"
    features: tuple[str, ...] = ()

    def __init__(
        self,
        model: Any,
        exits: Sequence[int] | None = None,
        selection: Literal["cost", "threshold", "level_threshold", "fixed"] = "cost",
        exit: int | None = None,
        thresholds: Sequence[float] | None = None,
        num_draft_tokens: int = 8,
        top_k: int = 4,
        nodes: int = 32,
        width: int = 4,
        min_confidence: float = 0.15,
        sample: bool = False,
        replacement: bool = False,
        eager: bool = False,
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
        self.exits = _exits(exits, config, model.config)
        self.exit_sources = {exit: f"{self.name}:{exit}" for exit in self.exits}
        self.choice = _choice(selection, exit, thresholds, len(self.exits), top_k)
        self.lm = ExitLM(model, self.exits, prepare(model), eager=eager)
        reader = ExitForward(self.lm, self.choice, list(self.exit_sources.values()))
        self.drafter = LMDrafter(reader, config, limits, self.exit_sources)

    @property
    def forward_seconds(self) -> float:
        return self.lm.forward_seconds

    @property
    def bytes_moved(self) -> int:
        return self.lm.bytes_moved

    def pass_timers(self) -> dict[str, PassTimer]:
        """What there is to time: each block of layers, with the head that its exit is read through."""
        from draftsmith.infer.models.pass_timer import ExitPassTimer

        return {name: ExitPassTimer(self.lm, block) for block, name in enumerate(self.exit_sources.values())}

    def bind(self, target: Target) -> None:
        check_same_tokenizer(
            self.tokenizer, self.drafter.draft_vocab_size, target.tokenizer, target.vocab_size, "the draft model"
        )
        known = given_calibration(self.calibration, self.origin, target)
        costs = given_costs(self.costs, self.origin, target)
        names = list(self.exit_sources.values())
        if isinstance(self.choice, Cost):
            if known is None or costs is None:
                log.warning(
                    "%s has no %s for this target: `draftsmith calibrate` measures them; until then they are assumed",
                    self.origin or "the sorted draft",
                    " and no ".join(
                        word for word, there in (("calibration", known), ("costs", costs)) if there is None
                    ),
                )
            costs = costs or assumed_costs(self.lm, names, target)
        policy = Policy(costs, names[0]) if costs is not None else None
        if isinstance(self.choice, Cost):
            assert policy is not None
            self.choice.know(policy, names, self.exits, known.covered if known is not None else {})
        self.drafter.know(target.vocab_size, known, policy)

    def open(self, rows: Sequence[Row], feedback: Sequence[Feedback]) -> None:
        self.drafter.open(rows)

    def close(self, rows: Sequence[Row]) -> None:
        self.drafter.close(rows)

    def propose(self, rows: Sequence[Row], budgets: Sequence[Budget]) -> list[Draft]:
        return self.drafter.propose(rows, budgets)

    def observe(self, rows: Sequence[Row], verdicts: Sequence[Verdict], feedback: Sequence[Feedback]) -> None:
        self.drafter.observe(rows, verdicts)


def assumed_costs(lm: ExitLM, names: Sequence[str], target: Target) -> Costs:
    """Costs in proportion to the weights that a pass reads. Only their ratios matter."""
    whole = float(sum(lm.block_bytes) + lm.head_bytes)
    read = {"target": ASSUMED_TARGET * whole if target.model is None else float(weight_bytes(target.model))}
    read |= {name: float(moved + lm.head_bytes) for name, moved in zip(names, lm.block_bytes)}
    grown = 1 + ASSUMED_GROWTH
    return Costs({name: PassCost((1, ASSUMED_TOKENS), (moved, grown * moved)) for name, moved in read.items()})


def _exits(given: Sequence[int] | None, config: Any, whole: Any) -> tuple[int, ...]:
    exits = list(given or getattr(whole, "sorted_exits", None) or getattr(config, "sorted_exits", None) or ())
    layers = int(config.num_hidden_layers)
    if not exits:
        raise ValueError("the checkpoint names no sorted_exits: say after which layers it can be left, exits=[2,4,6]")
    if exits != sorted(set(exits)) or exits[0] < 1 or exits[-1] != layers:
        raise ValueError(f"exits {exits} must rise and end with the draft's {layers} layers")
    return tuple(exits)


def _choice(selection: str, exit: int | None, thresholds: Sequence[float] | None, exits: int, top_k: int) -> ExitChoice:
    if (exit is not None) != (selection == "fixed"):
        raise ValueError("exit belongs to selection=fixed, which needs it")
    if thresholds is not None and "threshold" not in selection:
        raise ValueError(f"selection={selection} takes no thresholds")
    if selection == "fixed":
        assert exit is not None
        return Fixed(exit)
    values = [0.5] * (exits - 1) + [0.0] if thresholds is None else list(thresholds)
    rules = {"threshold": Threshold, "level_threshold": LevelThreshold}
    if selection in rules:
        return rules[selection](values)
    if selection != "cost":
        raise ValueError(f"unknown selection {selection!r}: cost, threshold, level_threshold, fixed")
    return Cost(min(top_k, 2))
