"""SD2: a sorted draft that is run only as deep as each node is worth (S2D, arXiv 2407.01955).

One model with several exits; `selection` chooses the exit of each node from the distribution at that exit, before
anything is drawn from it (exit_choice.py). Skipped layers are computed when a deeper node needs them (the runner). One
checkpoint serves several targets of one tokenizer: it keeps one calibration per target beside it.

Legend: N nodes, Q queries, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from draftsmith.infer.contract.protocols import PassTimer, Target
from draftsmith.infer.costs.pass_costs import Costs, PassCost
from draftsmith.infer.drafters.draft_model import DraftModel, Reaches, Rows, Sample, given_limits
from draftsmith.infer.drafters.draft_reader import DraftOutput, DraftRunner, TextReader
from draftsmith.infer.drafters.exit_choice import Cost, ExitChoice, Fixed, Fork, LevelThreshold, Pricing, Threshold
from draftsmith.infer.drafters.lm_drafter import LMDrafter
from draftsmith.infer.models.architectures import prepare
from draftsmith.infer.models.layers import weight_bytes
from draftsmith.infer.models.pass_timer import ExitPassTimer, measured_buckets
from draftsmith.infer.models.products.int8 import Int8, chosen
from draftsmith.infer.models.runner.entries import Entries
from draftsmith.infer.models.runner.model_runner import ModelRunner

NAME = "sd2"
# Without measured costs: the time of a pass is proportional to the weights that it reads, and grows by 1.4 times that
# time up to 64 tokens. A target without a model is assumed to read 8 times as much as the draft.
ASSUMED_TOKENS, ASSUMED_GROWTH, ASSUMED_TARGET = 64, 1.4, 8.0


def SD2(
    model: Any,
    exits: Sequence[int] | None = None,
    selection: Literal["cost", "threshold", "level_threshold", "fixed"] = "cost",
    exit: int | None = None,
    thresholds: Sequence[float] | None = None,
    num_draft_tokens: int | None = None,
    top_k: int | None = None,
    nodes: int = 32,
    width: int = 4,
    min_confidence: float = 0.15,
    sample: Sample | bool = "auto",
    replacement: bool = False,
    peaked: float | None = None,
    eager: bool = False,
    calibration: Any = "auto",
    costs: Any = "auto",
    dtype: str = "auto",
    device: str = "auto",
    int8: Int8 = "auto",
    tp: int = 1,
) -> LMDrafter:
    """A sorted draft as drafter: the exit is chosen per node.

    Args:
        model: a folder, a Hub name, or a loaded model.
        exits: numbers of layers after which to exit; by default the checkpoint's own `sorted_exits`.
        selection: cost (expected gain against the time of a deeper pass), threshold (exit where the likeliest token
            has more than this probability), level_threshold (the published rule for trees: the most confident node of a
            level decides for all of it), or fixed (always exit at `exit`).
        exit: the exit of selection=fixed.
        thresholds: one per exit, for the threshold selections; by default 0.5 for each but the last, and 0.
        num_draft_tokens: the greatest depth; by default 8, and for drawn drafts 12 with measured costs and 4 without.
        top_k: children per node; 1 drafts a chain. By default 4, and 1 for drawn drafts.
        nodes: the most nodes of a tree; a chain is limited by num_draft_tokens only.
        width: the most nodes of a row that are expanded per pass.
        min_confidence: do not expand nodes whose probability of being reached is below this; costs override it.
        sample: what to draft for rows with a temperature. drawn (or true): tokens drawn from the draft's distribution;
            coupled: the tokens that win under it when it shares the noise of the target's own draws; likeliest (or
            false): its likeliest tokens, which greedy rows always get; auto: drawn, and coupled as part of a mix.
        replacement: for drawn trees, draw the children of a node independently.
        peaked: for trees drawn without replacement; where the likeliest top_k - 1 tokens have at least this probability
            (by default 0.3), take them outright and draw one from the rest.
        eager: run every layer for every token at once (the same drafts, more work).
        calibration: a file, auto (what `draftsmith calibrate` measured for this draft and target), or none.
        costs: measured pass costs: a file, auto, or none.
        dtype: of the weights, if `model` is a name; auto: the target's.
        device: where to load `model`, if it is a name; auto: the target's.
        int8: run the draft's products in int8, on a CPU only; auto: if that is faster, timed when it is loaded by name.
            The target's text does not change.
        tp: ranks that the draft's weights are split over: the target's, as its own tp says; 1 keeps it whole on the
            first of them.
    """
    limits = given_limits(8, num_draft_tokens, top_k, nodes, width, min_confidence, sample, replacement, peaked)
    draft = DraftModel.of(model, dtype, device, tp)
    found = _exits(exits, draft.config.get_text_config(), draft.config)
    sources = {exit: f"{NAME}:{exit}" for exit in found}
    in_int8 = draft.may_choose(int8)
    choice = _choice(selection, exit, thresholds, len(found), limits.likeliest.top_k)

    def load(model: Any) -> ModelRunner:
        plan = prepare(model)
        model = chosen(model, plan, in_int8, width)
        return ModelRunner(model, plan, measured_buckets(model, plan), found, eager)

    forward = ExitForward(found, choice, list(sources.values()), eager)
    return LMDrafter(NAME, TextReader(draft, forward, load), limits, sources, calibration, costs)


@dataclass(slots=True)
class _Reached:
    """A node between blocks: its row and entry, the index of its logits, and its state after the last block."""

    row: int
    entry: int
    place: int
    reach: float
    state_D: torch.Tensor


class ExitForward:
    """Runs each node as deep as `choice` says; nodes that go on from an exit share a pass. `names`: of the blocks'
    passes, in measured costs."""

    lm: DraftRunner

    def __init__(self, exits: Sequence[int], choice: ExitChoice, names: Sequence[str], eager: bool = False) -> None:
        self.exits = exits
        self.eager = eager
        self.choice = choice
        self.names = names
        self.entry = names[0]
        self.blocks = choice.deepest(exits)
        if isinstance(choice, Cost):
            choice.bind(names, exits)

    def assumed_costs(self, target: Target) -> Costs | None:
        """Only the choice by cost cannot do without."""
        return assumed_costs(self.lm, self.names, target) if isinstance(self.choice, Cost) else None

    def prefill(self, rows: Rows, tokens: Sequence[list[int]]) -> None:
        self.lm.prefill(rows, tokens, blocks=self.blocks)

    def read(
        self, rows: Rows, entries: Sequence[Entries], reaches: Reaches, vocab_size: int, pricing: Pricing | None
    ) -> DraftOutput:
        reached = self._enter(rows, entries, reaches, pricing)
        logits: list[torch.Tensor | None] = [None] * len(reached)
        exits = [0] * len(reached)
        for at in range(self.blocks):
            last = at + 1 == self.blocks or not self._may_go(rows, at, reached, pricing)
            logits_NV = self._logits(reached, vocab_size) if last or not self.choice.blind else None
            on = [False] * len(reached)
            if not last:
                on = self.choice.deeper(at, rows, self._forks(rows, at, reached, logits_NV), pricing)
            if logits_NV is None and not all(on):
                logits_NV = self._logits(reached, vocab_size)
            for i, (node, goes) in enumerate(zip(reached, on)):
                if not goes:
                    assert logits_NV is not None
                    logits[node.place], exits[node.place] = logits_NV[i], self.lm.exits[at]
            reached = self._deepen(rows, at + 1, [node for node, goes in zip(reached, on) if goes], pricing)
            if not reached:
                break
        return DraftOutput(torch.stack([one for one in logits if one is not None]), exits)

    def _may_go(self, rows: Rows, at: int, reached: Sequence[_Reached], pricing: Pricing | None) -> bool:
        forks = [Fork(node.row, node.reach, 0.0, 1) for node in reached]
        return self.choice.may_go(at, rows, forks, pricing)

    def _enter(
        self, rows: Rows, entries: Sequence[Entries], reaches: Reaches, pricing: Pricing | None
    ) -> list[_Reached]:
        if pricing is not None:
            pricing.policy.charge(self.names[0], {row: len(entry.tokens) for row, entry in zip(rows, entries)})
        states = self.lm.enter(rows, entries)
        reached: list[_Reached] = []
        for b, (row, states_QD, nodes) in enumerate(zip(rows, states, reaches)):
            uncommitted, new = self.lm.uncommitted(row), states_QD.shape[0]
            for n, reach in enumerate(nodes):
                back = len(nodes) - n
                reached.append(_Reached(b, uncommitted - back, len(reached), reach, states_QD[new - back]))
        return reached

    def _logits(self, reached: Sequence[_Reached], vocab_size: int) -> torch.Tensor:
        return self.lm.logits(torch.stack([node.state_D for node in reached]))[:, :vocab_size]

    def _forks(self, rows: Rows, at: int, reached: Sequence[_Reached], logits_NV: torch.Tensor | None) -> list[Fork]:
        tops = [0.0] * len(reached)
        if logits_NV is not None:
            scores_NV = logits_NV.float()
            tops = (scores_NV.amax(-1) - torch.logsumexp(scores_NV, -1)).exp().tolist()
        return [
            Fork(node.row, node.reach, top, self.lm.behind(rows[node.row], at + 1, [node.entry]))
            for node, top in zip(reached, tops)
        ]

    def _deepen(self, rows: Rows, block: int, going: list[_Reached], pricing: Pricing | None) -> list[_Reached]:
        """Run these nodes through a block, in one pass."""
        if not going:
            return []
        live = sorted({node.row for node in going})
        wanted = [[node.entry for node in going if node.row == b] for b in live]
        chosen = [rows[b] for b in live]
        if pricing is not None:
            tokens = {row: self.lm.behind(row, block, some) for row, some in zip(chosen, wanted)}
            pricing.policy.charge(self.names[block], tokens, entering=False)
        states = self.lm.deepen(chosen, block, wanted)
        found = {
            (b, entry): state_D
            for b, some, states_ND in zip(live, wanted, states)
            for entry, state_D in zip(some, states_ND)
        }
        for node in going:
            node.state_D = found[node.row, node.entry]
        return going

    def timer(self, name: str) -> PassTimer:
        """Of a block of layers, together with the head of its exit."""
        return ExitPassTimer(self.lm, self.names.index(name))


def assumed_costs(lm: DraftRunner, names: Sequence[str], target: Target) -> Costs:
    """Costs in proportion to the weights that a pass reads; only their ratios matter."""
    whole = float(sum(lm.block_bytes) + lm.head_bytes)
    read = {"target": ASSUMED_TARGET * whole if target.model is None else float(weight_bytes(target.model))}
    read |= {name: float(moved + lm.head_bytes) for name, moved in zip(names, lm.block_bytes)}
    grown = 1 + ASSUMED_GROWTH
    return Costs({name: PassCost((1, ASSUMED_TOKENS), (moved, grown * moved)) for name, moved in read.items()})


def _exits(given: Sequence[int] | None, config: Any, whole: Any) -> tuple[int, ...]:
    exits = list(given or getattr(whole, "sorted_exits", None) or getattr(config, "sorted_exits", None) or ())
    layers = int(config.num_hidden_layers)
    if not exits:
        raise ValueError("the checkpoint names no sorted_exits: pass the layers to exit after, e.g. exits=[2,4,6]")
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
