"""The protocols of a target, a drafter and a verification rule. A step of decoding calls them in four verbs:

    drafts   = drafter.propose(rows, budgets, policy)              a token tree per row
    scores   = target.score(rows, drafts)                          one forward pass
    verdicts = [rule(draft, scores.distribution(i), rng) for i, draft in enumerate(drafts)]
    feedback = target.commit(rows, verdicts); drafter.observe(rows, verdicts, feedback)

Before its first step a row joins (`admit`, `open`) and its prompt is read in chunks (`prefill`, `read`). If anything
raises on the way, `abandon` drops what was not committed, and the same calls can be made again.

Legend: B rows, N nodes, V vocabulary, D hidden, T positions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch

from draftsmith.infer.contract.draft import Draft, Trial
from draftsmith.infer.contract.top_tokens import TopTokens
from draftsmith.infer.contract.trace import Tried

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from draftsmith.infer.contract.rng import StepRng
    from draftsmith.infer.contract.row import Row

DraftShape = Literal["tree", "chain", "none"]


@dataclass(frozen=True, slots=True)
class Budget:
    """The limits of one row's draft in one step."""

    nodes: int
    depth: int


class TargetDistribution(Protocol):
    """The target's distribution at the nodes of one row's draft, computed on request. ROOT (-1) is the prefix itself.

    `greedy`: temperature 0, so the distribution is a point mass on `choice(node)`.
    """

    greedy: bool
    vocab_size: int

    def choice(self, node: int) -> int: ...

    def probs(self, node: int) -> torch.Tensor:
        """[V], sums to one: the distribution after processors, temperature and truncation."""
        ...

    def draw(self, node: int) -> int:
        """The target's own token after `node`: a draw that the row's seed, its key and the position decide, whatever
        was drafted."""
        ...


class Scores(Protocol):
    """The result of one target pass: a distribution per row."""

    def distribution(self, index: int) -> TargetDistribution: ...


@dataclass(slots=True)
class Verdict:
    """What a rule decided for one row.

    `path` holds the accepted nodes, `accepted` the trials that accepted them, `next_token` the target's own token after
    them, `tried` every trial that was reached. `committed` is what the row keeps (path tokens, then next_token) after
    stops and limits, and `stop` names the one that cut it.

    `jointly`: drawn trials were accepted for what was drawn below them as well, so how often is no estimate of the
    acceptance of a token given its parent.
    """

    path: list[int]
    accepted: list[Trial]
    next_token: int
    tried: list[Tried] = field(default_factory=list)
    committed: list[int] = field(default_factory=list)
    stop: str = ""
    jointly: bool = False

    @property
    def kept_path(self) -> list[int]:
        """The accepted nodes that enter the cache: those of all committed tokens but the last, which stays pending."""
        return self.path[: max(len(self.committed) - 1, 0)]


class Rule(Protocol):
    """A verification rule; those of this project are in `draftsmith.infer.rules`, `block` is the default."""

    def __call__(self, draft: Draft, distribution: TargetDistribution, rng: StepRng) -> Verdict: ...


@dataclass(slots=True)
class Feedback:
    """What has just entered the target's cache of one row: `count` tokens, from position `start`.

    `features[name]` is [T, D], one state per such position, as the drafter's `features` names them; state i predicted
    token i + 1. `top`, for a drafter that asks for `top:K`: the likeliest tokens at all that was read, which after a
    commit includes the refused nodes.
    """

    start: int
    count: int = 0
    features: dict[str, torch.Tensor] = field(default_factory=dict)
    top: TopTokens | None = None


class PassTimer(Protocol):
    """A model whose passes can be timed. `buckets`: as of a Target; `max_positions`: the longest context it can run."""

    @property
    def buckets(self) -> Sequence[int]: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def max_positions(self) -> int: ...

    def place(self, rows: int, context: int) -> None:
        """Set up `rows` rows with `context` committed tokens each, without computing them."""
        ...

    def run(self, tokens: int) -> None:
        """One pass of `tokens` tokens per row, as decoding makes it; none of them is committed."""
        ...

    def close(self) -> None:
        """Drop the rows."""
        ...


@runtime_checkable
class Target(Protocol):
    """The model whose distribution is preserved.

    `draft_shape`: a "chain" target gets the likeliest chain of each draft (infer/engine/chains.py), "none" no drafts.
    `buckets` are the padded numbers of tokens per pass that it prefers; `model` is None for recorded answers.
    """

    draft_shape: DraftShape
    buckets: tuple[int, ...]
    vocab_size: int
    max_positions: int
    tokenizer: PreTrainedTokenizerBase | None
    model: Any | None

    @property
    def forward_seconds(self) -> float:
        """Seconds spent inside the model's forward passes so far."""
        ...

    @property
    def bytes_moved(self) -> int:
        """Bytes of weights that those passes have read."""
        ...

    def admit(self, rows: Sequence[Row], features: Sequence[str] = ()) -> None:
        """Check `rows` and make room for them; reads nothing. If it raises, none of them was admitted."""
        ...

    def unread(self, row: Row) -> int:
        """How many of the row's tokens besides the newest are not in the cache: a target that verifies chains may leave
        accepted tokens to be read with the next draft."""
        ...

    def unread_alone(self, row: Row) -> int:
        """How many that would be, had the row been decoded alone: what is drawn for it must not depend on others."""
        ...

    def prefill(self, rows: Sequence[Row], limit: int) -> list[Feedback]:
        """Read up to `limit` unread tokens of each row into the cache; never the newest one."""
        ...

    def abandon(self, rows: Sequence[Row]) -> None:
        """After an error inside a prefill or a step: drop what `row.ids` does not hold or was not committed.

        The rows can go on from there. Calling it twice, or without an error, changes nothing.
        """
        ...

    def release(self, rows: Sequence[Row]) -> None:
        """Let `rows` leave, whatever state they are in."""
        ...

    def score(self, rows: Sequence[Row], drafts: Sequence[Draft]) -> Scores:
        """One pass over each row's pending tokens and its tree."""
        ...

    def commit(self, rows: Sequence[Row], verdicts: Sequence[Verdict]) -> list[Feedback]:
        """Keep the accepted nodes in the cache and drop the rest; called before `row.ids` gets the committed tokens."""
        ...

    def fingerprint(self) -> str:
        """Identifies the weights and the architecture; ValueError without a model."""
        ...

    def pass_timers(self) -> dict[str, PassTimer]:
        """Its passes, by the name that their measured costs go by; empty without a model."""
        ...


@runtime_checkable
class Sharded(Protocol):
    """A target that may be split over several ranks: then `model` holds a share of its weights. `ranks`: how many;
    `parameters`: those of the whole model."""

    @property
    def ranks(self) -> int: ...

    @property
    def parameters(self) -> int: ...


def ranks_of(target: Target) -> int:
    return target.ranks if isinstance(target, Sharded) else 1


@runtime_checkable
class Drafter(Protocol):
    """Proposes a token tree per row.

    `features` names the target states that it reads, and `top:K` for the K likeliest tokens at every node
    (infer/contract/top_tokens.py). `origin` is the folder or Hub name that it was made from, beside
    which its calibration is kept; "" if there is none. It may have the attributes `calibration` and `costs`: what the
    user gave to be used with it, a file, "auto" or "none" (see Policy.of in infer/costs/policy.py). One that has
    `draws`, and it is true, draws its drafts for rows with a temperature: the answers have plain decoding's
    distribution, not its tokens.
    """

    name: str
    features: tuple[str, ...]
    origin: str

    @property
    def forward_seconds(self) -> float:
        """Seconds spent inside a draft model's forward passes so far; 0 without one."""
        ...

    @property
    def bytes_moved(self) -> int:
        """Bytes of weights that those passes have read."""
        ...

    def bind(self, target: Target) -> None:
        """Once, before the first row; ValueError if this drafter does not fit this target."""
        ...

    def open(self, rows: Sequence[Row]) -> None:
        """Rows join. If it raises, none of them is open."""
        ...

    def read(self, rows: Sequence[Row], feedback: Sequence[Feedback]) -> None:
        """Called after each chunk of a prompt or a new turn: its tokens `row.ids[start : start + count]` have entered
        the target's cache. The last chunk may end with the newest token of the prompt: then `row.ids` holds the row's
        first token already, for which nothing was drafted. After an error the chunks of some rows may be missing."""
        ...

    def close(self, rows: Sequence[Row]) -> None: ...

    def propose(self, rows: Sequence[Row], budgets: Sequence[Budget], policy: Any = None) -> list[Draft]:
        """A draft for each row within its budget. `policy`: the engine's (infer/costs/policy.py), or None. It cuts
        outright drafts to what pays, so most drafters need none; a tree that is built with it is not cut again.

        Called again with the same rows after `abandon`, it proposes the same.
        """
        ...

    def abandon(self, rows: Sequence[Row]) -> None:
        """Drop what was drafted in a step that failed; `row.ids` holds what was committed."""
        ...

    def observe(self, rows: Sequence[Row], verdicts: Sequence[Verdict], feedback: Sequence[Feedback]) -> None:
        """Called after the commit: `row.ids` already holds the committed tokens."""
        ...

    def pass_timers(self) -> dict[str, PassTimer]:
        """The passes of its draft model, by the name that their measured costs go by; empty without one."""
        ...


@runtime_checkable
class DraftsUnread(Protocol):
    """A drafter that may propose for a row before the end of its prompt is read; if `drafts_unread` is true it does,
    and hears of those tokens from `observe`."""

    @property
    def drafts_unread(self) -> bool: ...


@runtime_checkable
class Couples(Protocol):
    """A drafter whose drafts for rows with a temperature may share the noise of the target's own draws (infer/drafters/
    coupled.py); `couples`: whether they do. They fit texts that were drawn with this noise, and no others."""

    @property
    def couples(self) -> bool: ...


@runtime_checkable
class DraftsOutright(Protocol):
    """A drafter that can be made to draw nothing: calibrations are measured of outright candidates. `may_couple`:
    whether those share the noise of the target's draws."""

    @property
    def may_couple(self) -> bool: ...

    def outright(self) -> AbstractContextManager[None]:
        """Inside, all its candidates are outright, as in a mix."""
        ...


def drafts_unread(drafter: Drafter) -> bool:
    return isinstance(drafter, DraftsUnread) and drafter.drafts_unread


def couples(drafter: Drafter) -> bool:
    return isinstance(drafter, Couples) and drafter.couples


@runtime_checkable
class LeavesEarly(Protocol):
    """A drafter whose candidates come from exits of one model, so that one pass over a text gives all of them.

    `exit_sources` maps each exit (a number of layers, ascending; the last is the whole model) to the source that its
    candidates are credited to.
    """

    model: Any
    exit_sources: Mapping[int, str]


@runtime_checkable
class NamesDepths(Protocol):
    """A drafter that credits the candidates of each depth to a source of their own. `depth_sources`: from depth 1 on;
    empty if it does not."""

    depth_sources: Sequence[str]


@runtime_checkable
class DocumentLearner(Protocol):
    """A drafter that can take in documents while it is in use."""

    def add_document(self, ids: Sequence[int]) -> None: ...


@runtime_checkable
class LearnsAnswers(Protocol):
    """A drafter that gets better with the answers that the target has finished. `learns`: whether it was asked to.

    The engine calls `add_answer` when a row, or a turn of it, has come to its stop; not for one that was aborted or
    failed. What it learns changes its drafts, and so never the text.
    """

    learns: bool

    def add_answer(self, row: Row) -> None: ...


@runtime_checkable
class AnswerLearner(Protocol):
    """A control that needs the plain answers, token ids by row key. `exact`: it drafts the answers themselves."""

    exact: bool

    def learn(self, answers: Mapping[str, Sequence[int]]) -> None: ...
