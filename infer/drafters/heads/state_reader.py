"""Reads rows with heads that have no cache: they start from the target's newest state and keep nothing of a draft.

Legend: B rows, N nodes, V vocabulary, H width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from draftsmith.infer.contract.draft import ROOT
from draftsmith.infer.contract.protocols import Feedback, PassTimer, Target, Verdict
from draftsmith.infer.contract.row import Row
from draftsmith.infer.costs.pass_costs import Costs
from draftsmith.infer.drafters.draft_model import Reaches, follow
from draftsmith.infer.drafters.draft_reader import DraftOutput, DraftTree
from draftsmith.infer.drafters.exit_choice import Pricing
from draftsmith.infer.drafters.heads.newest_states import ANY_LENGTH, NewestStates
from draftsmith.infer.drafters.heads.prefixed_states import PrefixedStates
from draftsmith.infer.drafters.heads.text_states import text_states
from draftsmith.infer.heads.folders import trained_for
from draftsmith.infer.models.layers import parameter_bytes
from draftsmith.infer.models.load import check_model, choose_device
from draftsmith.infer.models.pass_timer import CachedPassTimer
from draftsmith.infer.models.runner.clock import PassClock

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

# The state that heads read.
LAST = "last"
# Steps along a text whose drafts are computed together: bounds the memory of the logits.
AHEAD_CHUNK = 128

# The tokens from a row's newest one down to a node: of the ROOT, the newest alone.
Path = list[int]
# Runs some heads: in a pass that is timed and counted, over these numbers of nodes of the rows.
RunHeads = Callable[[Callable[[], torch.Tensor], Mapping[Row, int], Sequence[nn.Module]], torch.Tensor]


class StatelessHeads(Protocol):
    """How the heads of one method are run.

    `depth`: how deep they draft. `at_once`, `depth_sources`: as of a DraftReader.
    """

    name: str
    heads: Any
    depth: int
    at_once: bool
    depth_sources: tuple[str, ...]

    def lend(self, embedding: nn.Module) -> None:
        """Take the target's input embedding; ValueError if it does not fit."""
        ...

    def begin(self, rows: Sequence[Row]) -> None:
        """Forget what was kept for the last drafts of these rows."""
        ...

    def score(
        self, rows: Sequence[Row], states: Sequence[torch.Tensor], paths: Sequence[Sequence[Path]], run: RunHeads
    ) -> DraftOutput:
        """The distributions below the nodes of rows with these states [H]; `paths[b]`: of row b's nodes."""
        ...

    def logits(self, depth: int, states_NH: torch.Tensor, paths: Sequence[Path]) -> torch.Tensor:
        """[N, V] of the head for tokens below `depth` drafted ones; `paths`: from the newest token on."""
        ...

    def timed(self, nodes: int) -> torch.Tensor:
        """What one pass computes for `nodes` nodes."""
        ...


def loaded(model: Any, load: Callable[..., Any], dtype: str, device: str) -> tuple[Any, str]:
    """`model` itself, or heads loaded from a folder or Hub name; and the name."""
    if not isinstance(model, str):
        return model.eval(), ""
    check_model(model, dtype, device)
    where = choose_device(device) if device != "auto" else torch.device("cpu")
    return load(model, dtype=dtype).to(where), model


def follows(origin: str, dtype: str, device: str) -> tuple[bool, bool]:
    """Whether heads take their target's dtype and device: where they were loaded by name and none was asked for."""
    return bool(origin) and dtype == "auto", bool(origin) and device == "auto"


def depth_of(asked: int | None, heads: int, what: str) -> int:
    """How deep to draft with this number of heads."""
    if asked is not None and asked > heads:
        raise ValueError(f"{what} has {heads} heads, one per drafted token: num_draft_tokens is at most {heads}")
    return heads if asked is None else asked


class StateReader:
    """A DraftReader over `method`, whose heads may have a `prefix` layer. `follows_dtype`, `follows_device`: the heads
    take their target's, because none was asked for."""

    features: tuple[str, ...] = (LAST,)
    tokenizer: PreTrainedTokenizerBase | None = None

    def __init__(
        self, method: StatelessHeads, origin: str = "", follows_dtype: bool = False, follows_device: bool = False
    ) -> None:
        self.method = method
        self.origin = origin
        self.entry = method.name
        self.max_depth = method.depth
        self.at_once = method.at_once
        self.depth_sources = method.depth_sources
        self.draft_vocab_size = self.vocab_size = int(method.heads.vocab_size)
        self._follows = (follows_dtype, follows_device)
        self._target: Target | None = None
        self._place()

    def _place(self) -> None:
        """Set up what depends on the heads' dtype and device."""
        self._weight = next(self.method.heads.heads.parameters())
        self._clock = PassClock(self._weight.device)
        self._moved = 0
        prefix = getattr(self.method.heads, "prefix", None)
        self.states = NewestStates(LAST) if prefix is None else PrefixedStates(LAST, prefix)
        self.max_positions = self.states.max_positions
        # States wait for the prefix layer alone.
        self.reading = self.entry if prefix is None else f"{self.entry} prefix"

    @property
    def shape(self) -> str:
        """As `plan` names heads."""
        return f"{self.method.name}:{len(self.method.heads.heads)}"

    @property
    def prefix(self) -> PrefixedStates | None:
        return self.states if isinstance(self.states, PrefixedStates) else None

    @property
    def forward_seconds(self) -> float:
        return self._clock.seconds + (self.prefix.lm.forward_seconds if self.prefix else 0.0)

    @property
    def bytes_moved(self) -> int:
        return self._moved + (self.prefix.lm.bytes_moved if self.prefix else 0)

    def pass_timers(self) -> dict[str, PassTimer]:
        found: dict[str, PassTimer] = {self.entry: HeadPassTimer(self.method, self._weight.device)}
        if self.prefix is not None:
            blank = self._weight.new_zeros((1, self.method.heads.width))
            found[self.reading] = CachedPassTimer(self.prefix.lm, lambda tokens: blank.expand(tokens, -1))
        return found

    def assumed_costs(self, target: Target) -> Costs | None:
        return None

    def bind(self, target: Target) -> None:
        model, name = target.model, self.method.name
        if model is None:
            raise ValueError(f"{name} reads the target's states, and recorded answers have none: it needs the target")
        head = model.get_output_embeddings().weight
        heads = self.method.heads
        if heads.width != head.shape[1]:
            raise ValueError(
                f"{self.origin or name}: the heads read states of width {heads.width}, and the target's are "
                f"{head.shape[1]} wide: they are another target's"
            )
        if heads.vocab_size > target.vocab_size:
            raise ValueError(
                f"{self.origin or name}: the heads draft {heads.vocab_size} tokens, and the target has "
                f"{target.vocab_size}: they are another target's"
            )
        made_for = trained_for(self.origin) if self.origin else None
        if made_for is not None and made_for.fingerprint not in ("", target.fingerprint()):
            log.warning("%s was trained with another target, %s: expect little of it", self.origin, made_for.name)
        follow(heads, model.get_input_embeddings().weight, *self._follows)
        self._place()
        self._target = target
        self.method.lend(model.get_input_embeddings())

    def open(self, row: Row, nodes: int) -> None:
        self.states.open(row, nodes)

    def close(self, row: Row) -> None:
        self.method.begin([row])
        self.states.close([row])

    def abandon(self, row: Row) -> None:
        self.method.begin([row])
        self.states.abandon(row)

    def take(self, rows: Sequence[Row], feedback: Sequence[Feedback]) -> None:
        self.states.take(rows, feedback)

    def can_draft(self, row: Row) -> bool:
        return self.states.there(row)

    def unread(self, row: Row) -> int:
        return self.states.unread(row)

    def read(self, upto: Sequence[tuple[Row, int]]) -> None:
        self.states.read(upto)

    def begin(self, rows: Sequence[Row]) -> None:
        self.method.begin(rows)

    @torch.inference_mode()
    def run(
        self,
        rows: Sequence[Row],
        nodes: Sequence[Sequence[int]],
        trees: Sequence[DraftTree],
        reaches: Reaches,
        pricing: Pricing | None,
    ) -> DraftOutput:
        paths = [[path_to(row, node, tree) for node in some] for row, some, tree in zip(rows, nodes, trees)]
        waiting = self.states.pending(rows)
        if waiting and pricing is not None:
            pricing.policy.charge(self.reading, waiting, entering=False)
        states = [state_H.to(self._weight) for state_H in self.states.newest(rows)]
        passes = 0

        def run(compute: Callable[[], torch.Tensor], tokens: Mapping[Row, int], read: Sequence[nn.Module]) -> Any:
            nonlocal passes
            if pricing is not None:
                pricing.policy.charge(self.entry, tokens, entering=not passes)
            passes += 1
            begun = self._clock.begin()
            made = compute()
            self._clock.end(begun)
            self._moved += parameter_bytes(read)
            return made

        return self.method.score(rows, states, paths, run)

    def name(self, row: Row, nodes: Mapping[int, int]) -> None:
        pass

    def keep(self, rows: Sequence[Row], verdicts: Sequence[Verdict], feedback: Sequence[Feedback]) -> None:
        self.states.take(rows, feedback)

    @torch.inference_mode()
    def ahead(self, ids: Sequence[int], start: int, depth: int) -> Iterator[list[torch.Tensor]]:
        """A step that starts behind a position reads the state before it. The drafted tokens are the text's own."""
        depth, last = min(depth, self.max_depth), min(len(ids), self.max_positions) - 1
        parts = [one.features[LAST].to(self._weight) for one in text_states(self._target, ids, self.features)]
        states_TH = self.states.along(torch.cat(parts)) if parts else self._weight.new_zeros((0, 0))
        if start == 0 and last > 0:  # nothing was read before the first token
            yield [self._weight.new_full((1, self.vocab_size), -torch.inf)] * depth
        for first in range(max(start, 1), last, AHEAD_CHUNK):
            chunk, found = range(first, min(first + AHEAD_CHUNK, last)), list[torch.Tensor]()
            for k in range(depth):
                inside = range(chunk.start, min(chunk.stop, len(ids) - k))
                paths = [list(ids[at : at + k + 1]) for at in inside]
                if not paths:
                    break
                found.append(self.method.logits(k, states_TH[chunk.start - 1 : inside.stop - 1], paths))
            yield found


def path_to(row: Row, node: int, tree: DraftTree) -> Path:
    tokens, parents = tree.tokens, tree.parents
    path: Path = []
    while node != ROOT:
        path.append(tokens[node])
        node = parents[node]
    return [row.ids[-1], *path[::-1]]


class HeadPassTimer:
    """Times the passes of heads, which have no context."""

    buckets: Sequence[int] = ()
    max_positions = ANY_LENGTH

    def __init__(self, method: StatelessHeads, device: torch.device) -> None:
        self.method = method
        self.device = device
        self._rows = 0

    def place(self, rows: int, context: int) -> None:
        self._rows = rows

    @torch.inference_mode()
    def run(self, tokens: int) -> None:
        self.method.timed(self._rows * tokens).argmax(-1).tolist()

    def close(self) -> None:
        self._rows = 0
