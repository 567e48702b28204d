"""Reads rows with a head over pairs: pair i is the target's state at i and token i + 1 (infer/heads/eagle.py, mtp.py).

Of a row of n tokens the pairs 0 to n - 2 are true; the newest token's own state comes when the target has read it. The
last true pair gives what follows the ROOT. Below it, a drafted token is paired with the state that the head itself gave
its parent, so a pass can run one level and no more. After a verdict all drafted pairs are dropped: those that were
accepted are run again with the target's states, together with the next ROOT.

Legend: B rows, N pairs, n pairs of a row, H width of the head, V vocabulary.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from draftsmith.infer.contract.draft import ROOT
from draftsmith.infer.contract.protocols import Feedback, PassTimer, Target, Verdict
from draftsmith.infer.contract.row import Row
from draftsmith.infer.costs.pass_costs import Costs
from draftsmith.infer.drafters.draft_model import Reaches, Rows, follow
from draftsmith.infer.drafters.draft_reader import DraftEntries, DraftOutput, DraftTree
from draftsmith.infer.drafters.exit_choice import Pricing
from draftsmith.infer.drafters.heads.pair_head import LoadHead, check_head, lend
from draftsmith.infer.drafters.heads.text_states import text_states
from draftsmith.infer.models.pass_timer import CachedPassTimer, TimerOnceBound
from draftsmith.infer.models.positions import max_positions
from draftsmith.infer.models.runner.clock import PassClock
from draftsmith.infer.models.runner.entries import Entries, PassOutput
from draftsmith.infer.models.runner.masks import MaskPlan
from draftsmith.infer.models.runner.model_runner import PREFILL_CHUNK, ModelRunner

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

# Steps whose chains are run together along a text: bounds the memory of the logits.
AHEAD_CHUNK = 32


@dataclass(slots=True)
class _RowPairs:
    """The pairs of one row: `known` true ones there are, and the states [n, H] of those that were not run are
    `waiting`. `drafted` are the states that are fed back, by uncommitted entry. `lost`: the target's states of a step
    are missing."""

    waiting: torch.Tensor
    known: int = 0
    draft: DraftEntries = field(default_factory=DraftEntries)
    drafted: dict[int, torch.Tensor] = field(default_factory=dict)
    lost: bool = False

    def forget(self) -> None:
        """Drop what was drafted."""
        self.draft, self.drafted = DraftEntries(), {}

    def ran(self, count: int) -> None:
        """The first that were waiting are kept by the runner now. A view of the others would hold them all."""
        self.waiting = self.waiting[count:].clone()

    def cut(self, known: int) -> None:
        """Drop what is known beyond `known` pairs."""
        gone = max(self.known - known, 0)
        self.known -= gone
        self.waiting = self.waiting[: max(len(self.waiting) - gone, 0)]


class PairReader:
    """A DraftReader over the head that `load` finds for a target. `name`: of its passes, and of the drafter.

    `follows_dtype`, `follows_device`: the head takes its target's, because none was asked for."""

    tokenizer: PreTrainedTokenizerBase | None = None
    max_depth = sys.maxsize
    at_once = False
    depth_sources: tuple[str, ...] = ()

    def __init__(
        self, name: str, load: LoadHead, origin: str = "", follows_dtype: bool = False, follows_device: bool = False
    ) -> None:
        self.entry = self.reading = name
        self.origin = origin
        # Known once it is bound: which states a head reads may depend on the target's number of layers.
        self.features: tuple[str, ...] = ()
        self.draft_vocab_size = self.vocab_size = 0
        self.max_positions = 0
        self._load = load
        self._follows = (follows_dtype, follows_device)
        self._target: Target | None = None
        self._lm: ModelRunner | None = None
        self._rows: dict[Row, _RowPairs] = {}

    @property
    def lm(self) -> ModelRunner:
        assert self._lm is not None, "bind the drafter first"
        return self._lm

    @property
    def head(self) -> Any:
        return self.lm.model

    @property
    def shape(self) -> str:
        """As `plan` names heads."""
        return self.entry if self.head.ids_V is None else f"{self.entry}:{len(self.head.ids_V)}"

    @property
    def forward_seconds(self) -> float:
        return 0.0 if self._lm is None else self._lm.forward_seconds + self._joining.seconds

    @property
    def bytes_moved(self) -> int:
        return 0 if self._lm is None else self._lm.bytes_moved

    def pass_timers(self) -> dict[str, PassTimer]:
        return {self.entry: TimerOnceBound(lambda: CachedPassTimer(self.lm, self.blank))}

    def assumed_costs(self, target: Target) -> Costs | None:
        return None

    def bind(self, target: Target) -> None:
        if target.model is None:
            raise ValueError(
                f"{self.entry} reads the target's states, and recorded answers have none: it needs the target itself"
            )
        if self._target is not None and target.model is self._target.model:
            self._target = target
            return
        head, self.origin = self._load(target)
        what = self.origin or self.entry
        check_head(what, head, target)
        follow(head, target.model.get_input_embeddings().weight, *self._follows)
        lend(what, head, target.model)
        self._lm = ModelRunner(head.eval(), MaskPlan())
        self._joining = PassClock(self._lm.device)
        self._target = target
        self._nothing = torch.empty((0, head.config.hidden_size), dtype=self._lm.dtype, device=self._lm.device)
        self.features = tuple(head.features)
        self.draft_vocab_size = int(head.config.vocab_size)
        self.vocab_size = target.vocab_size if head.ids_V is not None else min(self.draft_vocab_size, target.vocab_size)
        self.max_positions = max_positions(head.config)

    # rows

    def open(self, row: Row, nodes: int) -> None:
        if len(row.ids) < self.max_positions:
            self._rows[row] = _RowPairs(self._nothing)
            self.lm.open(row, len(row.ids) + nodes)

    def close(self, row: Row) -> None:
        self._rows.pop(row, None)
        if self.lm.has(row):
            self.lm.close(row)

    def abandon(self, row: Row) -> None:
        if row in self._rows:
            self._rows[row].forget()
            self._rows[row].cut(len(row.ids) - 1)
            self.lm.shorten(row, self._rows[row].known)

    @torch.inference_mode()
    def take(self, rows: Sequence[Row], feedback: Sequence[Feedback]) -> None:
        given = [(row, one) for row, one in zip(rows, feedback) if row in self._rows and one.count]
        new = [(row, one) for row, one in given if self._follows_on(row, one)]
        if not new:
            return
        begun = self._joining.begin()
        features = {name: torch.cat([one.features[name] for _, one in new]).to(self._nothing) for name in self.features}
        joined_NH = self.head.joined(features)
        for (row, one), states_NH in zip(new, joined_NH.split([one.count for _, one in new])):
            pairs = self._rows[row]
            pairs.waiting = torch.cat([pairs.waiting, states_NH])
            pairs.known += one.count
        self._joining.end(begun)

    def _follows_on(self, row: Row, given: Feedback) -> bool:
        """Whether these states follow on those that are known; after an error some may never have come."""
        pairs = self._rows[row]
        if given.start > pairs.known and not pairs.lost:
            pairs.lost = True
            log.warning("row %s lost states of the target in an interrupted step: not drafted any more", row.key)
        if given.start < pairs.known and not pairs.lost:
            pairs.cut(given.start)
            self.lm.shorten(row, pairs.known)
        return not pairs.lost

    def can_draft(self, row: Row) -> bool:
        """The target may have left accepted tokens to be read with the next draft: their states are not known yet."""
        pairs = self._rows.get(row)
        return pairs is not None and pairs.known == len(row.ids) - 1 and len(pairs.waiting) > 0

    def unread(self, row: Row) -> int:
        return max(len(self._rows[row].waiting) - 1, 0) if row in self._rows else 0

    def read(self, upto: Sequence[tuple[Row, int]]) -> None:
        """All but the newest pair: what it gives is wanted of the ROOT."""
        left = {row: min(end - 1 - self.lm.length(row), self.unread(row)) for row, end in upto if row in self._rows}
        left = {row: count for row, count in left.items() if count > 0}
        while left:
            counts = {row: min(count, PREFILL_CHUNK) for row, count in left.items()}
            self._forward(list(counts), [self._true(row, count) for row, count in counts.items()])
            self._commit(list(counts), list(counts.values()))
            left = {row: count - counts[row] for row, count in left.items() if count > counts[row]}

    def keep(self, rows: Sequence[Row], verdicts: Sequence[Verdict], feedback: Sequence[Feedback]) -> None:
        """Drafted pairs hold states of the head's own, and are dropped, accepted or not."""
        ran = [row for row in rows if row in self._rows and self.lm.uncommitted(row)]
        self._commit(ran, [self._rows[row].draft.pending for row in ran])
        self.take(rows, feedback)

    def _commit(self, rows: Sequence[Row], counts: Sequence[int]) -> None:
        self.lm.commit(rows, [range(count) for count in counts])
        for row, count in zip(rows, counts):
            self._rows[row].ran(count)
            self._rows[row].forget()

    # drafts

    def begin(self, rows: Sequence[Row]) -> None:
        for row in rows:
            if row in self._rows:
                self._rows[row].draft.of = {}

    def name(self, row: Row, nodes: Mapping[int, int]) -> None:
        if row in self._rows:
            self._rows[row].draft.name(nodes)

    def run(
        self,
        rows: Sequence[Row],
        nodes: Sequence[Sequence[int]],
        trees: Sequence[DraftTree],
        reaches: Reaches,
        pricing: Pricing | None,
    ) -> DraftOutput:
        """One pass for each level among the nodes."""
        left = [list(some) for some in nodes]
        found: dict[tuple[int, int], torch.Tensor] = {}
        while any(left):
            level = [self._ready(row, some, tree) for row, some, tree in zip(rows, left, trees)]
            live = [b for b, some in enumerate(level) if some]
            entries = [self._entries(rows[b], level[b], trees[b]) for b in live]
            if pricing is not None:
                pricing.policy.charge(self.entry, {rows[b]: len(one.tokens) for b, one in zip(live, entries)})
            output = self._forward([rows[b] for b in live], entries, [len(level[b]) for b in live])
            found |= dict(zip([(b, node) for b in live for node in level[b]], output.logits_NV))
            fed_back = output.taps[self.head.recurrent].split([len(one.tokens) for one in entries])
            for b, states_NH in zip(live, fed_back):
                last = self.lm.uncommitted(rows[b])
                own = range(last - len(level[b]), last)
                self._rows[rows[b]].drafted.update(zip(own, states_NH[-len(own) :]))
            left = [[node for node in some if node not in ran] for some, ran in zip(left, level)]
        logits_NV = torch.stack([found[b, node] for b, some in enumerate(nodes) for node in some])
        return self._output(logits_NV)

    def _output(self, logits_NV: torch.Tensor) -> DraftOutput:
        return DraftOutput(logits_NV[:, : self.vocab_size], ids_V=self.head.ids_V)

    def _ready(self, row: Row, nodes: Sequence[int], tree: DraftTree) -> list[int]:
        """The nodes whose parents were run: the ROOT, before anything else."""
        if list(nodes[:1]) == [ROOT]:
            return [ROOT]
        ran, parents = self._rows[row].draft.of, tree.parents if nodes else []
        return [node for node in nodes if parents[node] == ROOT or parents[node] in ran]

    def _entries(self, row: Row, nodes: Sequence[int], tree: DraftTree) -> Entries:
        """True pairs for the ROOT, or drafted ones."""
        pairs = self._rows[row]
        if list(nodes) == [ROOT]:
            count = len(pairs.waiting)
            pairs.draft.append(nodes, tree, 0, count)
            return self._true(row, count)
        new, parents = pairs.draft.append(nodes, tree, self.lm.uncommitted(row), 0)
        tokens = tree.tokens
        return Entries([tokens[node] for node in new], parents, torch.stack([pairs.drafted[at] for at in parents]))

    def _true(self, row: Row, count: int) -> Entries:
        """The next true pairs that were not run: the states that they hold, before the tokens join them."""
        first = self.lm.length(row) + 1
        entries = Entries.chain(row.ids[first : first + count])
        return Entries(entries.tokens, entries.parents, self._rows[row].waiting[:count])

    @torch.inference_mode()
    def _forward(self, rows: Rows, entries: Sequence[Entries], wanted: Sequence[int] | None = None) -> PassOutput:
        """Run `entries`, which hold tokens and the states before them. The logits are those of each row's last `wanted`
        pairs; None: neither these nor the states that are fed back."""
        counts = [len(one.tokens) for one in entries]
        tokens_N = torch.tensor([token for one in entries for token in one.tokens], device=self._nothing.device)
        states = [one.states for one in entries if one.states is not None]
        given = self.head.pairs(tokens_N, torch.cat(states)).split(counts)
        made = [Entries(one.tokens, one.parents, pairs_NH) for one, pairs_NH in zip(entries, given)]
        if wanted is None:
            return self.lm.forward(rows, made, wanted=[0] * len(rows))
        return self.lm.forward(rows, made, [self.head.recurrent], wanted)

    # texts

    @torch.inference_mode()
    def ahead(self, ids: Sequence[int], start: int, depth: int) -> Iterator[list[torch.Tensor]]:
        """Every true pair of a chunk starts a chain of its own: each pass adds a token to all of them."""
        row, lm = object(), self.lm
        states_TH = self._states_of(ids)
        last = min(len(ids), self.max_positions) - 1
        lm.open(row, last + AHEAD_CHUNK * depth)
        try:
            if start == 0 and last:  # nothing was read before the first token
                yield [self._nothing.new_full((1, self.vocab_size), -torch.inf)] * depth
            # The pair before a position is the last true one of a step that starts there.
            first = 0
            for end in [*range(max(start, 1), last, AHEAD_CHUNK), last]:
                chunk = range(first, max(end - 1, first))
                if chunk and end > max(start, 1):
                    yield self._chains(row, ids, states_TH, chunk, depth)
                elif chunk:
                    self._forward([row], [self._chain(ids, states_TH, chunk)])
                lm.commit([row], [range(len(chunk))])
                first = chunk.stop
        finally:
            lm.close(row)

    def _chain(self, ids: Sequence[int], states_TH: torch.Tensor, pairs: range) -> Entries:
        tokens = list(ids[pairs.start + 1 : pairs.stop + 1])
        return Entries(tokens, list(range(-1, len(pairs) - 1)), states_TH[pairs.start : pairs.stop])

    def _chains(
        self, row: object, ids: Sequence[int], states_TH: torch.Tensor, pairs: range, depth: int
    ) -> list[torch.Tensor]:
        """[N, V] of each depth below these pairs, which follow on what the row holds."""
        entries, above, found = self._chain(ids, states_TH, pairs), list(range(len(pairs))), list[torch.Tensor]()
        for step in range(depth):
            output = self._forward([row], [entries], [len(entries.tokens)])
            found.append(
                DraftOutput(output.logits_NV[:, : self.vocab_size], ids_V=self.head.ids_V).over(self.vocab_size)
            )
            tokens = list(ids[pairs.start + step + 2 : pairs.stop + step + 2])
            if not tokens:
                break
            fed_back = output.taps[self.head.recurrent][: len(tokens)]
            entries = Entries(tokens, above[: len(tokens)], fed_back)
            above = list(range(self.lm.uncommitted(row), self.lm.uncommitted(row) + len(tokens)))
        return found

    def _states_of(self, ids: Sequence[int]) -> torch.Tensor:
        """[T - 1, H] what the true pairs of a text hold."""
        parts = [self._nothing]
        for given in text_states(self._target, ids, self.features):
            parts.append(self.head.joined({name: given.features[name].to(self._nothing) for name in self.features}))
        return torch.cat(parts)

    def blank(self, count: int) -> torch.Tensor:
        """[N, 2 H] pairs of nothing, to time passes with."""
        tokens_N = torch.zeros(count, dtype=torch.long, device=self._nothing.device)
        made: torch.Tensor = self.head.pairs(tokens_N, self._nothing.new_zeros((count, self._nothing.shape[1])))
        return made
