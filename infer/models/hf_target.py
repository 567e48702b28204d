"""A Hugging Face causal LM as target: the contract's verbs over one cached model.

The newest token of a row is always pending: it enters the cache with the next step's tree.

Legend: B rows, Q queries, V vocabulary, T positions, D hidden.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils.rnn import pad_sequence

from draftsmith.infer.contract.distribution import NodeDistribution
from draftsmith.infer.contract.draft import ROOT, Draft
from draftsmith.infer.contract.protocols import DraftShape, Feedback, PassTimer, Verdict
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.models.architectures import prepare_target
from draftsmith.infer.models.cached_lm import PREFILL_CHUNK, CachedLM, Entries
from draftsmith.infer.models.chain_runner import ChainPlan, ChainRunner
from draftsmith.infer.models.positions import max_positions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


# Rows with more pending tokens are prefilled first.
PENDING_AT_ONCE = 16
# Of the fingerprint: weights sampled evenly per parameter, so that a large model takes a moment, and the parts of the
# config that shapes do not show.
SAMPLED_WEIGHTS = 64
CONFIG_KEYS = (
    "model_type", "vocab_size", "num_attention_heads", "num_key_value_heads", "hidden_act", "rope_parameters",
    "rms_norm_eps", "layer_norm_eps", "sliding_window", "final_logit_softcapping", "attn_logit_softcapping",
)  # fmt: skip


@dataclass(slots=True)
class HFScores:
    """The logits of one pass: those of row b's prefix at query `roots[b]`, those of its nodes behind it."""

    logits_BQV: torch.Tensor
    rows: Sequence[Row]
    drafts: Sequence[Draft]
    roots: list[int]
    choices_BQ: list[list[int]] | None

    def distribution(self, index: int) -> NodeDistribution:
        root, end = self.roots[index], self.roots[index] + 1 + len(self.drafts[index])
        choices_N = self.choices_BQ[index][root:end] if self.choices_BQ is not None else None
        return NodeDistribution(self.logits_BQV[index, root:end], self.rows[index], self.drafts[index], choices_N)


class ChainPasses:
    """The methods of CachedLM over a ChainRunner: padded logits, prompts in chunks, one row per commit."""

    def __init__(self, runner: ChainRunner) -> None:
        self.runner = runner
        self.model = runner.model
        self.buckets = runner.buckets
        self.device, self.dtype = runner.device, runner.dtype
        self.open, self.close, self.has = runner.open, runner.close, runner.has
        self.length, self.uncommitted = runner.length, runner.uncommitted
        layers = int(runner.model.config.get_text_config().num_hidden_layers)
        self._layers = (*(f"layer:{layer}" for layer in range(layers)), "last")

    @property
    def forward_seconds(self) -> float:
        return self.runner.forward_seconds

    @property
    def bytes_moved(self) -> int:
        return self.runner.bytes_moved

    def forward(
        self, rows: Sequence[Any], entries: Sequence[Entries], hidden: bool = False, whole: bool = False
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """Run new `entries` of `rows`: logits [B, Q, V], right-padded with zeros, and hidden states if asked."""
        output = self.runner.forward(rows, entries, self._layers if hidden else (), whole)
        counts = [len(entry.tokens) for entry in entries]
        found = (output.logits_NV, *(output.taps[name] for name in self._layers if hidden))
        logits_BQV, *layers = (pad_sequence(list(one.split(counts)), batch_first=True) for one in found)
        return logits_BQV, tuple(layers)

    def prefill(
        self, rows: Sequence[Any], tokens: Sequence[list[int]], hidden: bool = False
    ) -> list[list[tuple[torch.Tensor, ...]]]:
        """Run `tokens` of each row into the cache in chunks; hidden states per row and chunk if asked.

        A family that reads one token at a time behind a state gets a prompt in one piece, as `generate` gives it."""
        longest = max((len(tokens_T) for tokens_T in tokens), default=0)
        chunk = max(longest, 1) if self.runner.plan.single else PREFILL_CHUNK
        states: list[list[tuple[torch.Tensor, ...]]] = [[] for _ in rows]
        for offset in range(0, longest, chunk):
            live = [i for i, tokens_T in enumerate(tokens) if len(tokens_T) > offset]
            parts = [tokens[i][offset : offset + chunk] for i in live]
            chosen = [rows[i] for i in live]
            _, layers = self.forward(chosen, [Entries.chain(part) for part in parts], hidden, whole=True)
            for b, i in enumerate(live):
                states[i].append(tuple(layer[b, : len(parts[b])] for layer in layers))
            self.runner.commit(chosen, [range(len(part)) for part in parts])
        return states

    def commit(self, row: Any, kept: list[int]) -> None:
        self.runner.commit([row], [kept])


class HFTarget:
    """Runs `model` as the target. `buckets`: numbers of queries to pad to; None: what suits the device.

    A model with recurrent layers verifies chains, by a ChainRunner. After a draft that was accepted in part, accepted
    tokens may stay unread there: they are pending again, and the next step's pass reads them."""

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase | None = None, buckets: tuple[int, ...] | None = None
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        plan = prepare_target(model)
        self.draft_shape: DraftShape = "chain" if isinstance(plan, ChainPlan) else "tree"
        self.lm: CachedLM | ChainPasses = (
            ChainPasses(ChainRunner(model, plan)) if isinstance(plan, ChainPlan) else CachedLM(model, plan, buckets)
        )
        self.buckets = self.lm.buckets
        self.vocab_size = int(model.config.get_text_config().vocab_size)
        self.num_layers = int(model.config.get_text_config().num_hidden_layers)
        self.max_positions = max_positions(model.config.get_text_config())
        self._features: dict[Row, tuple[str, ...]] = {}
        self._states: dict[Row, list[tuple[torch.Tensor, ...]]] = {}
        self._pending: dict[Row, int] = {}
        # The number of tokens whose states were handed out: tokens that are read again are not handed out again.
        self._given: dict[Row, int] = {}

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
        from draftsmith.infer.models.pass_timer import CachedPassTimer, ChainPassTimer

        if isinstance(self.lm, ChainPasses):
            return {"target": ChainPassTimer(self.lm.runner)}
        return {"target": CachedPassTimer(self.lm)}

    def fingerprint(self) -> str:
        """Equal for the same weights and architecture in any dtype, as far as rounding to bfloat16 hides the dtype."""
        config = self.model.config.get_text_config()
        facts: list[Any] = [[key, getattr(config, key, None)] for key in CONFIG_KEYS]
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
        for name, parameter in sorted(self.model.named_parameters()):
            flat = parameter.detach().reshape(-1)
            where = torch.linspace(0, flat.numel() - 1, min(SAMPLED_WEIGHTS, flat.numel()), dtype=torch.float64)
            sample = flat[where.long().to(flat.device)].to("cpu", torch.float32).to(torch.bfloat16)
            digest.update(f"{name}{tuple(parameter.shape)}".encode())
            digest.update(sample.view(torch.int16).numpy().tobytes())
        return digest.hexdigest()

    def admit(self, rows: Sequence[Row], features: Sequence[str] = ()) -> list[Feedback]:
        for row in rows:
            self._check(row)
            for name in features:
                self._layer(name)
        for row in rows:
            self.lm.open(row, min(len(row.ids) + row.left + 1, self.max_positions) + 64)
            self._features[row] = tuple(features)
            self._states[row] = []
            self._given[row] = len(row.ids) - 1
        states = self.lm.prefill(rows, [row.ids[:-1] for row in rows], hidden=bool(features))
        return [self._feedback(row, 0, chunks, len(row.ids) - 1) for row, chunks in zip(rows, states)]

    def unread(self, row: Row) -> int:
        """How many of the row's tokens besides the newest are not in the cache."""
        return len(row.ids) - 1 - self.lm.length(row)

    def release(self, rows: Sequence[Row]) -> None:
        for row in rows:
            self.lm.close(row)
            del self._features[row], self._states[row], self._given[row]
            self._pending.pop(row, None)

    def score(self, rows: Sequence[Row], drafts: Sequence[Draft]) -> HFScores:
        hidden = any(self._features[row] for row in rows)
        late = [row for row in rows if len(row.ids) - self.lm.length(row) > PENDING_AT_ONCE]
        if late:
            chunks = self.lm.prefill(late, [row.ids[self.lm.length(row) : -1] for row in late], hidden)
            if hidden:
                self._states.update(zip(late, chunks))
        entries, roots = [], []
        for row, draft in zip(rows, drafts):
            pending = row.ids[self.lm.length(row) :]
            last = len(pending) - 1
            parents = [*range(-1, last), *(last if parent == ROOT else last + 1 + parent for parent in draft.parents)]
            entries.append(Entries(pending + draft.tokens, parents))
            roots.append(last)
            self._pending[row] = len(pending)
        logits_BQV, layers = self.lm.forward(rows, entries, hidden=hidden)
        if hidden:
            for b, row in enumerate(rows):
                self._states[row].append(tuple(layer[b] for layer in layers))
        return HFScores(logits_BQV, rows, drafts, roots, self._choices(logits_BQV, rows))

    def commit(self, rows: Sequence[Row], verdicts: Sequence[Verdict]) -> list[Feedback]:
        feedback = []
        for row, verdict in zip(rows, verdicts):
            pending = self._pending[row]
            kept = [*range(pending), *(pending + node for node in verdict.kept_path)]
            start, end = self._given[row], self.lm.length(row) + len(kept)
            self._given[row] = end
            self.lm.commit(row, kept)
            chunks = self._states[row]
            if chunks:
                where = torch.tensor(kept, device=self.lm.device)
                chunks[-1] = tuple(layer[where] for layer in chunks[-1])
            feedback.append(self._feedback(row, start, chunks, end - start))
            self._states[row] = []
        return feedback

    def _choices(self, logits_BQV: torch.Tensor, rows: Sequence[Row]) -> list[list[int]] | None:
        """The argmax at every query if any row is greedy; -1 where the largest logit is not finite (`max` propagates
        NaN), which is an error only at nodes that the rule visits."""
        if not any(row.settings.greedy for row in rows):
            return None
        best_BQ, choice_BQ = logits_BQV.max(-1)
        choices: list[list[int]] = choice_BQ.masked_fill(~torch.isfinite(best_BQ), -1).tolist()
        return choices

    def _check(self, row: Row) -> None:
        if len(row.ids) >= self.max_positions:
            raise ValueError(
                f"prompt {row.key} has {len(row.ids)} tokens, but the target's context ends at {self.max_positions}"
            )
        if not 0 <= min(row.ids) <= max(row.ids) < self.vocab_size:
            raise ValueError(f"prompt {row.key} has a token id outside the target's vocabulary of {self.vocab_size}")

    def _layer(self, name: str) -> int:
        """The index of a named feature in transformers' hidden states; `last` is after the final norm."""
        if name == "last":
            return -1
        kind, _, number = name.partition(":")
        if kind == "layer" and number.isdigit() and int(number) < self.num_layers:
            return int(number)
        raise ValueError(f"unknown feature {name!r}: use 'last', or 'layer:k' for the state before layer k")

    def _feedback(self, row: Row, start: int, chunks: list[tuple[torch.Tensor, ...]], count: int) -> Feedback:
        """The last `count` states of `chunks`, from position `start`."""
        names = self._features[row]
        if not names or not chunks:
            return Feedback(start)
        layers = {name: torch.cat([chunk[self._layer(name)] for chunk in chunks]) for name in names}
        return Feedback(start, {name: states_TD[len(states_TD) - count :] for name, states_TD in layers.items()})
