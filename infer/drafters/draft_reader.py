"""How a draft model reads rows and their drafts. LMDrafter knows about drafts and this protocol, and nothing of models.

TextReader reads a row's tokens with a causal LM; those of heads, which read the target's states, are in heads/.

Legend: B rows, N nodes, V vocabulary of the draft, K candidates.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch

from draftsmith.infer.contract.draft import ROOT
from draftsmith.infer.contract.protocols import Feedback, PassTimer, Target, Verdict
from draftsmith.infer.contract.row import Row
from draftsmith.infer.costs.pass_costs import Costs
from draftsmith.infer.drafters.draft_model import DraftModel, Reaches, Rows
from draftsmith.infer.drafters.exit_choice import Pricing
from draftsmith.infer.models.load import check_same_tokenizer
from draftsmith.infer.models.pass_timer import TimerOnceBound
from draftsmith.infer.models.positions import max_positions
from draftsmith.infer.models.runner.entries import Entries
from draftsmith.infer.models.runner.model_runner import ModelRunner
from draftsmith.infer.models.tensor_parallel.leading_runner import LeadingRunner

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Tokens of a pass along a text: bounds the memory of the logits.
CHUNK = 128

DraftRunner = ModelRunner | LeadingRunner


class DraftTree(Protocol):
    """The tokens and parents of a draft's nodes, or of a growing tree's leaves."""

    @property
    def tokens(self) -> list[int]: ...

    @property
    def parents(self) -> list[int]: ...


@dataclass(frozen=True, slots=True)
class DraftOutput:
    """[N, V] logits of all rows' nodes, row after row, and the layer at which each left a model with exits. `ids_V`:
    the target's id of each column, where the draft's vocabulary is a part of the target's. `sources`: of each node's
    candidates, if the reader names them."""

    logits_NV: torch.Tensor
    exits: list[int] = field(default_factory=list)
    ids_V: torch.Tensor | None = None
    sources: list[str] = field(default_factory=list)

    def over(self, vocab_size: int) -> torch.Tensor:
        """The logits in columns that are the target's ids, as many as `vocab_size` where they are spread; -inf for
        tokens that the draft does not have."""
        if self.ids_V is None:
            return self.logits_NV
        spread = self.logits_NV.new_full((len(self.logits_NV), vocab_size), -torch.inf)
        spread[:, self.ids_V] = self.logits_NV
        return spread

    def best(self, start: int, end: int, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """[n, K] the likeliest tokens at nodes `start` up to `end`, as the target's ids, and their probabilities."""
        logits_NV = self.logits_NV[start:end].float()
        top_NK = torch.topk(logits_NV, min(count, logits_NV.shape[-1]), dim=-1)
        tokens_NK = top_NK.indices if self.ids_V is None else self.ids_V[top_NK.indices]
        return tokens_NK, (top_NK.values - torch.logsumexp(logits_NV, -1, keepdim=True)).exp()


class DraftReader(Protocol):
    """A draft model with what it keeps of its rows.

    `entry`: the name of the pass that every new node goes through, `reading`: of the passes that `read` makes;
    `features`: as of a Drafter. `draft_vocab_size`: how many ids the draft has, `vocab_size`: how many of them the
    target has too, once bound. `max_depth`: how deep it can draft. `at_once`: the pass over the ROOT gives the
    candidates of every depth, which do not depend on the path; `depth_sources`: their sources by depth.
    """

    entry: str
    reading: str
    features: tuple[str, ...]
    origin: str
    tokenizer: PreTrainedTokenizerBase | None
    draft_vocab_size: int
    vocab_size: int
    max_positions: int
    max_depth: int
    at_once: bool
    depth_sources: tuple[str, ...]

    @property
    def forward_seconds(self) -> float: ...

    @property
    def bytes_moved(self) -> int: ...

    def pass_timers(self) -> dict[str, PassTimer]:
        """By name; before `bind` these names may be all that can be asked for."""
        ...

    def assumed_costs(self, target: Target) -> Costs | None:
        """The costs to use where none were measured; None if it can do without."""
        ...

    def bind(self, target: Target) -> None:
        """ValueError if the draft model does not fit this target."""
        ...

    def open(self, row: Row, nodes: int) -> None:
        """Add a row, with room for `nodes` nodes."""
        ...

    def close(self, row: Row) -> None:
        """Remove a row, if it is there."""
        ...

    def abandon(self, row: Row) -> None:
        """Drop what was drafted, and all that `row.ids` does not hold."""
        ...

    def take(self, rows: Sequence[Row], feedback: Sequence[Feedback]) -> None:
        """Note what the target has read of a prompt, without running it."""
        ...

    def can_draft(self, row: Row) -> bool:
        """Whether it has all that the row's next draft starts from."""
        ...

    def unread(self, row: Row) -> int:
        """How many of the row's tokens, besides those that the ROOT is always run with, have not been run."""
        ...

    def read(self, upto: Sequence[tuple[Row, int]]) -> None:
        """Run each row's tokens up to a position, as far as they are unread, and keep them."""
        ...

    def begin(self, rows: Sequence[Row]) -> None:
        """A new draft for each of these rows: no node was run."""
        ...

    def run(
        self,
        rows: Sequence[Row],
        nodes: Sequence[Sequence[int]],
        trees: Sequence[DraftTree],
        reaches: Reaches,
        pricing: Pricing | None,
    ) -> DraftOutput:
        """Run the nodes asked for of these rows' trees, reached with these probabilities: ROOT first, which comes with
        all that is unread, parents before their children. The policy, if any, is charged for every pass."""
        ...

    def name(self, row: Row, nodes: Mapping[int, int]) -> None:
        """From now on node `nodes[n]` is what was run as n; nodes without a name are dropped."""
        ...

    def keep(self, rows: Sequence[Row], verdicts: Sequence[Verdict], feedback: Sequence[Feedback]) -> None:
        """After a verdict: keep what was run of the committed tokens, drop the rest; `row.ids` holds them already."""
        ...


@runtime_checkable
class ReadsAlong(Protocol):
    """A reader whose distribution at a token depends on the text alone."""

    def along(self, ids: Sequence[int], start: int) -> Iterator[list[torch.Tensor]]:
        """The logits [N, V] at the positions of a text from `start` to the last but one, or to the end of the draft's
        context, chunk by chunk; of every exit. Columns are the target's ids."""
        ...


@runtime_checkable
class ReadsAhead(Protocol):
    """A reader whose distribution at a token depends on where its step started, too."""

    def ahead(self, ids: Sequence[int], start: int, depth: int) -> Iterator[list[torch.Tensor]]:
        """Of the steps that start behind each position of a text, from `start` to the last but one, or to the end of
        the draft's context, chunk by chunk: for each of `depth` depths the logits [N, V], if the text is drafted that
        far. What would lie beyond the text is left out. Columns are the target's ids."""
        ...


class DraftForward(Protocol):
    """How TextReader's model is run. `lm` is its cache and forward pass, set when it is loaded; `entry` as of a
    DraftReader, `names` of all passes. `exits`, `eager`: as of a ModelRunner."""

    lm: DraftRunner
    entry: str
    names: Sequence[str]
    exits: Sequence[int]
    eager: bool

    def assumed_costs(self, target: Target) -> Costs | None: ...

    def prefill(self, rows: Rows, tokens: Sequence[list[int]]) -> None: ...

    def read(
        self, rows: Rows, entries: Sequence[Entries], reaches: Reaches, vocab_size: int, pricing: Pricing | None
    ) -> DraftOutput:
        """Run `entries`; the last len(reaches[b]) of row b are nodes, reached with these probabilities. The policy, if
        any, is charged for every pass."""
        ...

    def timer(self, name: str) -> PassTimer: ...


@dataclass(slots=True)
class DraftEntries:
    """Of one row's draft, the uncommitted entries of a ModelRunner: first `pending` that were run with the ROOT, and
    `of` each other node that was run."""

    pending: int = 0
    of: dict[int, int] = field(default_factory=dict)

    def append(self, nodes: Sequence[int], tree: DraftTree, run: int, unread: int) -> tuple[list[int], list[int]]:
        """The nodes to run besides the ROOT, and the parents of all new entries, behind `run` that there are: if the
        ROOT is among `nodes`, which comes first, those of `unread` pending ones too."""
        parents: list[int] = []
        if list(nodes[:1]) == [ROOT]:
            parents, nodes = list(range(-1, unread - 1)), nodes[1:]
            self.pending = unread
        if nodes:
            above, first = tree.parents, run + len(parents)
            self.of.update({node: first + i for i, node in enumerate(nodes)})
            parents += [self.pending - 1 if above[node] == ROOT else self.of[above[node]] for node in nodes]
        return list(nodes), parents

    def name(self, nodes: Mapping[int, int]) -> None:
        self.of = {nodes[node]: entry for node, entry in self.of.items() if node in nodes}

    def accepted(self, verdict: Verdict) -> list[int]:
        """The entries of the accepted nodes, as far as they were run."""
        path: list[int] = []
        for node in verdict.kept_path:
            if node not in self.of:
                break
            path.append(self.of[node])
        return path


class TextReader:
    """Reads tokens with `draft`, run by what `make_forward` makes of its model. Accepted nodes stay where they were
    computed, and no token is read twice."""

    features: tuple[str, ...] = ()
    max_depth = sys.maxsize
    at_once = False
    depth_sources: tuple[str, ...] = ()

    def __init__(self, draft: DraftModel, forward: DraftForward, load: Callable[[Any], ModelRunner]) -> None:
        """`load`: makes the runner of the draft's model, unless the ranks of its target hold it together."""
        config = draft.config.get_text_config()
        self.origin = draft.origin
        self.model = draft.model
        self.tokenizer = draft.tokenizer
        self.draft_vocab_size = self.vocab_size = int(config.vocab_size)
        self.max_positions = max_positions(config)
        self._draft = draft
        self._load = load
        self._forward = forward
        self._lm: DraftRunner | None = None
        if draft.model is not None:
            self._lm = forward.lm = load(draft.model)
        self._split_for: Target | None = None
        self.entry = self.reading = forward.entry
        self._drafts: dict[Row, DraftEntries] = {}

    @property
    def lm(self) -> DraftRunner:
        assert self._lm is not None, "bind the drafter first"
        return self._lm

    @property
    def forward_seconds(self) -> float:
        return 0.0 if self._lm is None else self._lm.forward_seconds

    @property
    def bytes_moved(self) -> int:
        return 0 if self._lm is None else self._lm.bytes_moved

    def pass_timers(self) -> dict[str, PassTimer]:
        return {name: TimerOnceBound(partial(self._forward.timer, name)) for name in self._forward.names}

    def assumed_costs(self, target: Target) -> Costs | None:
        return self._forward.assumed_costs(target)

    def bind(self, target: Target) -> None:
        check_same_tokenizer(
            self.tokenizer, self.draft_vocab_size, target.tokenizer, target.vocab_size, "the draft model"
        )
        self.vocab_size = min(self.draft_vocab_size, target.vocab_size)
        if self._draft.tp > 1:
            if self._split_for is not target:
                self._lm = self._forward.lm = self._draft.split(target, self._forward.exits, self._forward.eager)
                self.model, self._split_for = self.lm.model, target
        elif target.model is not None and self._draft.follow(target.model):
            self._lm = self._forward.lm = self._load(self.model)

    def open(self, row: Row, nodes: int) -> None:
        if len(row.ids) < self.max_positions:
            self._drafts[row] = DraftEntries()
            self.lm.open(row, len(row.ids) + nodes)

    def close(self, row: Row) -> None:
        self._drafts.pop(row, None)
        if self.lm.has(row):
            self.lm.close(row)

    def abandon(self, row: Row) -> None:
        if self.lm.has(row):
            self._drafts[row].of = {}
            self.lm.shorten(row, len(row.ids) - 1)

    def take(self, rows: Sequence[Row], feedback: Sequence[Feedback]) -> None:
        """Nothing: the tokens are in `row.ids`."""

    def can_draft(self, row: Row) -> bool:
        return self.lm.has(row)

    def unread(self, row: Row) -> int:
        return len(row.ids) - self.lm.length(row) - 1

    def read(self, upto: Sequence[tuple[Row, int]]) -> None:
        fitting = [(row, end) for row, end in upto if self.lm.has(row) and end < self.max_positions]
        parts = [(row, row.ids[self.lm.length(row) : end]) for row, end in fitting]
        parts = [(row, part) for row, part in parts if part]
        self._forward.prefill([row for row, _ in parts], [part for _, part in parts])

    def begin(self, rows: Sequence[Row]) -> None:
        for row in rows:
            if row in self._drafts:
                self._drafts[row].of = {}

    def run(
        self,
        rows: Sequence[Row],
        nodes: Sequence[Sequence[int]],
        trees: Sequence[DraftTree],
        reaches: Reaches,
        pricing: Pricing | None,
    ) -> DraftOutput:
        entries = []
        for row, asked, tree in zip(rows, nodes, trees):
            unread = row.ids[self.lm.length(row) :]
            new, parents = self._drafts[row].append(asked, tree, self.lm.uncommitted(row), len(unread))
            tokens = tree.tokens if new else []
            pending = unread if len(new) < len(asked) else []
            entries.append(Entries([*pending, *(tokens[node] for node in new)], parents))
        return self._forward.read(rows, entries, reaches, self.vocab_size, pricing)

    def name(self, row: Row, nodes: Mapping[int, int]) -> None:
        if row in self._drafts:
            self._drafts[row].name(nodes)

    def keep(self, rows: Sequence[Row], verdicts: Sequence[Verdict], feedback: Sequence[Feedback]) -> None:
        ended = [
            (row, verdict) for row, verdict in zip(rows, verdicts) if self.lm.has(row) and self.lm.uncommitted(row)
        ]
        drafts = [self._drafts[row] for row, _ in ended]
        kept = [[*range(draft.pending), *draft.accepted(verdict)] for draft, (_, verdict) in zip(drafts, ended)]
        self.lm.commit([row for row, _ in ended], kept)

    @torch.inference_mode()
    def along(self, ids: Sequence[int], start: int) -> Iterator[list[torch.Tensor]]:
        lm, row = self.lm, object()
        last = min(len(ids), self.max_positions) - 1
        lm.open(row, len(ids))
        try:
            lm.prefill([row], [list(ids[: min(start, last)])], blocks=max(len(lm.exits), 1))
            for first in range(start, last, CHUNK):
                logits = self._logits(row, list(ids[first : min(first + CHUNK, last)]))
                yield [logits_NV[:, : self.vocab_size] for logits_NV in logits]
        finally:
            lm.close(row)

    def _logits(self, row: object, tokens: list[int]) -> list[torch.Tensor]:
        """[N, V] of each exit for tokens behind the row's, which are committed."""
        chain, every = [Entries.chain(tokens)], [list(range(len(tokens)))]
        if self.lm.exits:
            states = self.lm.enter([row], chain)
            logits = [self.lm.logits(states[0])]
            for block in range(1, len(self.lm.exits)):
                logits.append(self.lm.logits(self.lm.deepen([row], block, every)[0]))
        else:
            logits = [self.lm.forward([row], chain, eagerly=True).logits_NV]
        self.lm.commit([row], every)
        return logits
