"""A Hugging Face causal LM as target: the contract's verbs over one cached model.

The newest token of a row is always pending: it enters the cache with the next step's tree.

Legend: B rows, N queries of a pass, V vocabulary, T positions, D hidden.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from draftsmith.infer.contract.distribution import NodeDistribution
from draftsmith.infer.contract.draft import ROOT, Draft
from draftsmith.infer.contract.protocols import DraftShape, Feedback, PassTimer, Verdict
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.top_tokens import TopTokens, states_asked, top_asked
from draftsmith.infer.models.architectures import prepare_target
from draftsmith.infer.models.decoding_runner import decoding_runner
from draftsmith.infer.models.pass_timer import CachedPassTimer, chain_pass_timer
from draftsmith.infer.models.positions import max_positions
from draftsmith.infer.models.runner.chain_runner import ChainRunner
from draftsmith.infer.models.runner.entries import Entries
from draftsmith.infer.models.runner.masks import ChainPlan
from draftsmith.infer.models.runner.model_runner import ModelRunner
from draftsmith.infer.models.tensor_parallel.leading_runner import LeadingRunner
from draftsmith.infer.models.top_reader import PromptTop, read_step, unpacked

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from draftsmith.infer.models.tensor_parallel.launch import Shares


# Of the fingerprint: weights sampled evenly per parameter, so that a large model takes a moment, and the parts of the
# config that shapes do not show.
SAMPLED_WEIGHTS = 64
CONFIG_KEYS = (
    "model_type", "vocab_size", "num_attention_heads", "num_key_value_heads", "hidden_act", "rope_parameters",
    "rms_norm_eps", "layer_norm_eps", "sliding_window", "final_logit_softcapping", "attn_logit_softcapping",
)  # fmt: skip


def model_fingerprint(model: Any) -> str:
    """Equal for the same weights and architecture in any dtype, as far as rounding to bfloat16 hides the dtype."""
    config = model.config.get_text_config()
    facts: list[Any] = [[key, getattr(config, key, None)] for key in CONFIG_KEYS]
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
    for name, parameter in sorted(model.named_parameters()):
        whole = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter  # from all ranks
        flat = whole.detach().reshape(-1)
        where = torch.linspace(0, flat.numel() - 1, min(SAMPLED_WEIGHTS, flat.numel()), dtype=torch.float64)
        sample = flat[where.long().to(flat.device)].to("cpu", torch.float32).to(torch.bfloat16)
        digest.update(f"{name}{tuple(whole.shape)}".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()


@dataclass(slots=True)
class HFScores:
    """The logits of one pass: those of row b's prefix at `roots[b]`, those of its nodes behind it."""

    logits_NV: torch.Tensor
    rows: Sequence[Row]
    drafts: Sequence[Draft]
    roots: list[int]
    choices_N: list[int] | None

    def distribution(self, index: int) -> NodeDistribution:
        root, end = self.roots[index], self.roots[index] + 1 + len(self.drafts[index])
        choices = self.choices_N[root:end] if self.choices_N is not None else None
        return NodeDistribution(self.logits_NV[root:end], self.rows[index], self.drafts[index], choices)


class HFTarget:
    """Runs `model` as the target. `buckets`: numbers of tokens to pad passes to; None: those that are found to be fast.
    `shares`: the ranks that `model` is split over, this being rank 0.

    A model with recurrent layers verifies chains. After a draft that was accepted in part, accepted tokens may stay
    unread there: they are pending again, and the next step's pass reads them."""

    def __init__(
        self,
        model: Any,
        tokenizer: PreTrainedTokenizerBase | None = None,
        buckets: tuple[int, ...] | None = None,
        shares: Shares | None = None,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        plan = prepare_target(model)
        self.draft_shape: DraftShape = "tree"
        self.lm: ModelRunner | ChainRunner | LeadingRunner
        self.shares = shares
        if shares is not None:
            self.lm = shares.runner(model, plan)
        elif isinstance(plan, ChainPlan):
            self.draft_shape = "chain"
            self.lm = ChainRunner(model, plan)
        else:
            self.lm = decoding_runner(model, plan, buckets)
        self.buckets = self.lm.buckets
        self.vocab_size = int(model.config.get_text_config().vocab_size)
        self.max_positions = max_positions(model.config.get_text_config())
        # By row: the states that it asked for, and of how many likeliest tokens.
        self._features: dict[Row, tuple[str, ...]] = {}
        self._top: dict[Row, int] = {}
        self._tops: dict[Row, TopTokens] = {}
        self._states: dict[Row, dict[str, torch.Tensor]] = {}
        self._pending: dict[Row, int] = {}
        # The number of tokens whose states were handed out: tokens that are read again are not handed out again.
        self._given: dict[Row, int] = {}
        # How many tokens of a row would be in the cache, had it been decoded alone.
        self._alone: dict[Row, int] = {}

    @property
    def forward_seconds(self) -> float:
        return self.lm.forward_seconds

    @property
    def bytes_moved(self) -> int:
        return self.lm.bytes_moved

    @property
    def generation_config(self) -> Any:
        """The sampling defaults from the model's generation_config.json."""
        return self.model.generation_config

    @property
    def eos_ids(self) -> frozenset[int]:
        """All tokens that end an answer (generation_config.json may list several)."""
        named = self.model.generation_config.eos_token_id
        if named is None and self.tokenizer is not None:
            named = self.tokenizer.eos_token_id
        return frozenset([named] if isinstance(named, int) else named or [])

    def stops(self, max_new_tokens: int, ids: Iterable[int] = (), strings: Iterable[str] = ()) -> Stops:
        """The model's own stop ids and stop strings, and these."""
        named = self.model.generation_config.stop_strings
        own = [named] if isinstance(named, str) else named or []
        return Stops(max_new_tokens, self.eos_ids.union(ids), tuple(dict.fromkeys([*own, *strings])))

    @property
    def embedding(self) -> torch.nn.Module:
        """The input embedding, for drafters that need it."""
        return self.model.get_input_embeddings()

    @property
    def head(self) -> torch.nn.Module:
        """The output head, for drafters that need it."""
        return self.model.get_output_embeddings()

    def pass_timers(self) -> dict[str, PassTimer]:
        """Timers by pass name: the target's own passes."""
        timer = chain_pass_timer(self.lm) if isinstance(self.lm, ChainRunner) else CachedPassTimer(self.lm)
        return {"target": timer}

    @property
    def ranks(self) -> int:
        """How many ranks hold the weights."""
        return 1 if self.shares is None else self.shares.ranks.size

    @property
    def parameters(self) -> int:
        """Of the whole model."""
        if self.shares is not None:
            return self.shares.parameters
        return sum(parameter.numel() for parameter in self.model.parameters())

    def fingerprint(self) -> str:
        return model_fingerprint(self.model) if self.shares is None else self.shares.fingerprint

    def close(self) -> None:
        """End the other ranks, if there are any: the target is of no use afterwards."""
        if self.shares is not None:
            self.shares.end()

    def admit(self, rows: Sequence[Row], features: Sequence[str] = ()) -> None:
        for row in rows:
            row.check(self.vocab_size, self.max_positions)
        states, top = states_asked(features), top_asked(features)
        for name in states:
            self.lm.taps.check(name)
        try:
            for row in rows:
                self._open(row, states)
                self._features[row], self._top[row] = states, top
                self._given[row] = self._alone[row] = 0
        except BaseException:
            self.release(rows)
            raise

    def _open(self, row: Row, features: Sequence[str]) -> None:
        """Open a row; what another row has read of the same beginning is not read again, unless features are wanted."""
        if not isinstance(self.lm, ChainRunner) and not features:
            shared = {
                other: min(row.begins_as(other), self.lm.length(other))
                for other in self._features
                if not self.lm.uncommitted(other)
            }
            source = max(shared, key=lambda other: shared[other], default=None)
            if source is not None and shared[source]:
                self.lm.fork(source, row, shared[source], len(row.ids))
                return
        self.lm.open(row, len(row.ids))

    def unread(self, row: Row) -> int:
        return max(len(row.ids) - 1 - self.lm.length(row), 0)

    def unread_alone(self, row: Row) -> int:
        return max(len(row.ids) - 1 - self._alone[row], 0) if self.draft_shape == "chain" else self.unread(row)

    def prefill(self, rows: Sequence[Row], limit: int) -> list[Feedback]:
        starts = {row: self.lm.length(row) for row in rows}
        chosen = [row for row in rows if self.unread(row)]
        if isinstance(self.lm, ChainRunner) and self.lm.plan.single:
            limit = self.max_positions  # a second chunk would go token by token
        parts = [row.ids[starts[row] : min(starts[row] + limit, len(row.ids) - 1)] for row in chosen]
        names = list(dict.fromkeys(name for row in chosen for name in self._features[row]))
        most = max((self._top[row] for row in chosen), default=0)
        seen = PromptTop(most, {row for row in chosen if self._top[row]}) if most else None
        states = dict(zip(chosen, self.lm.prefill(chosen, parts, names, on_logits=seen)))
        tops = seen.taken(self.lm.transfers, starts, dict(zip(chosen, parts))) if seen is not None else {}
        self._alone.update((row, self.lm.length(row)) for row in chosen)
        return [
            self._feedback(row, start, self.lm.length(row), states.get(row, {}), tops.get(row))
            for row, start in starts.items()
        ]

    def abandon(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self.lm.shorten(row, len(row.ids) - 1)
            self._states.pop(row, None)
            self._pending.pop(row, None)
            self._tops.pop(row, None)
            self._given[row] = min(self._given[row], len(row.ids) - 1)
            self._alone[row] = min(self._alone[row], self.lm.length(row))

    def release(self, rows: Sequence[Row]) -> None:
        for row in rows:
            if self.lm.has(row):
                self.lm.close(row)
            by_row: list[dict[Row, Any]] = [self._features, self._top, self._tops, self._states, self._pending]
            for known in (*by_row, self._given, self._alone):
                known.pop(row, None)

    def score(self, rows: Sequence[Row], drafts: Sequence[Draft]) -> HFScores:
        names = list(dict.fromkeys(name for row in rows for name in self._features[row]))
        entries, wanted, roots, at = [], [], [], 0
        for row, draft in zip(rows, drafts):
            pending = row.ids[self.lm.length(row) :]
            last = len(pending) - 1
            parents = [*range(-1, last), *(last if parent == ROOT else last + 1 + parent for parent in draft.parents)]
            entries.append(Entries(pending + draft.tokens, parents))
            new = self._new(row)
            roots.append(at + new - 1)
            wanted.append(new + len(draft))
            at += wanted[-1]
            self._pending[row] = len(pending)
        output = self.lm.forward(rows, entries, names, wanted)
        choices, words = self._read(output.logits_NV, rows, wanted)
        if choices is not None and -1 in choices and isinstance(self.lm, ModelRunner) and self.lm.captured is not None:
            # In a captured pass one row's NaN reaches all rows; an eager one leaves it where it is.
            self.lm.drop(rows)
            output = self.lm.forward(rows, entries, names, wanted, eagerly=True)
            choices, words = self._read(output.logits_NV, rows, wanted)
        self._note_top(rows, drafts, words)
        counts = [len(entry.tokens) for entry in entries]
        for name in names:
            for row, states_ND in zip(rows, output.taps[name].split(counts)):
                self._states.setdefault(row, {})[name] = states_ND
        return HFScores(output.logits_NV, rows, drafts, roots, choices)

    def commit(self, rows: Sequence[Row], verdicts: Sequence[Verdict]) -> list[Feedback]:
        feedback: list[Feedback] = []
        kept: list[list[int]] = []
        for row, verdict in zip(rows, verdicts):
            pending = self._pending[row]
            path = [*range(pending), *(pending + node for node in verdict.kept_path)]
            kept.append(path)
        starts = [self.lm.length(row) for row in rows]
        token_by_token = isinstance(self.lm, ChainRunner) and self.lm.plan.single
        through = [row for row, path in zip(rows, kept) if token_by_token or len(path) == self.lm.uncommitted(row)]
        picks = [path if row in self._states else [] for row, path in zip(rows, kept)]
        places = self.lm.commit(rows, kept, [place for some in picks for place in some]).split([*map(len, picks)])
        # A pass leaves a state where the row ends, and before that where another row ends or after every token.
        self._alone.update((row, self.lm.length(row)) for row in through)
        for row, start, path, where in zip(rows, starts, kept, places):
            found = {name: states_ND[where] for name, states_ND in self._states.pop(row, {}).items()}
            feedback.append(self._feedback(row, start, start + len(path), found, self._tops.pop(row, None)))
        return feedback

    def _new(self, row: Row) -> int:
        """Of how many of the row's last tokens its next pass must give the logits: of the newest, and for a row that
        asked for the likeliest tokens of all those that it was not given yet."""
        return len(row.ids) - max(self._given[row], self.lm.length(row)) if self._top[row] else 1

    def _feedback(
        self, row: Row, start: int, end: int, states: dict[str, torch.Tensor], top: TopTokens | None
    ) -> Feedback:
        """The tokens up to `end` are read, the newest of them, from `start` on, with these states: what was not handed
        out before."""
        given, self._given[row] = self._given[row], max(end, self._given[row])
        again = max(given - start, 0)
        return Feedback(given, max(end - given, 0), {name: one[again:] for name, one in states.items()}, top)

    def _read(
        self, logits_NV: torch.Tensor, rows: Sequence[Row], wanted: Sequence[int]
    ) -> tuple[list[int] | None, np.ndarray | None]:
        """The argmax at every query if any row is greedy; -1 where it is not finite, which is an error only at nodes
        that the rule visits. And the likeliest tokens, packed, at the queries of rows that asked for them."""
        captured = isinstance(self.lm, ModelRunner) and self.lm.captured is not None
        choices = captured or any(row.settings.greedy for row in rows)
        places, at = list[int](), 0
        for row, count in zip(rows, wanted):
            places += range(at, at + count) if self._top[row] else ()
            at += count
        return read_step(logits_NV, self.lm.transfers, choices, places, max(self._top[row] for row in rows))

    def _note_top(self, rows: Sequence[Row], drafts: Sequence[Draft], words: np.ndarray | None) -> None:
        """Keep the likeliest tokens at the new tokens of each row that asked, and at its nodes, until the commit."""
        if words is None:
            return
        ids_NK, logits_NK = unpacked(words)
        at = 0
        for row, draft in zip(rows, drafts):
            if self._top[row]:
                new = self._new(row)
                end = at + new + len(draft)
                tokens = [*row.ids[-new:], *draft.tokens]
                parents = [*range(ROOT, new - 1), *(new + parent for parent in draft.parents)]
                self._tops[row] = TopTokens(len(row.ids) - new, tokens, parents, ids_NK[at:end], logits_NK[at:end])
                at = end
