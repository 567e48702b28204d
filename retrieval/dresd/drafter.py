"""DReSD (arXiv 2502.15572): draft what the target said next when its hidden state was similar.

The state that predicted the newest token is looked up among the stored ones. Neighbours whose stored token is not the
newest token are left out (the filtering token); the continuations of the others, best first, make one tree. The store's
calibration turns similarity into a probability p. Neighbours that agree add up: each weighs w = p / (1 - p), and a
token's probability is its weights over 1 + all weights, so a single neighbour gives its p. All tokens are outright.

Legend: T positions, N queries, D hidden, C neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from draftsmith.infer.contract.draft import ROOT, Draft
from draftsmith.infer.contract.protocols import Budget, Feedback, PassTimer, Target, Verdict
from draftsmith.infer.contract.row import Row
from draftsmith.infer.costs.policy import Policy
from draftsmith.infer.drafters.tree_builder import Candidate, Growth, grow_looked_up
from draftsmith.infer.models.load import check_same_tokenizer
from draftsmith.infer.text.tokenizer import tokenizer_fingerprint
from draftsmith.retrieval.dresd.store import DresdStore


@dataclass(slots=True)
class _State:
    """A row's newest state, and the position of the token that it predicted."""

    position: int = -1
    state_D: torch.Tensor | None = None


@dataclass(slots=True)
class _Neighbours:
    """A row's usable neighbours, best first: continuations, and the odds of their first and of later tokens.

    `members` maps a leaf of the growing tree to the neighbours that pass through it; `leaves` counts the leaves."""

    continuations: list[list[int]]
    first: list[float]
    later: list[float]
    members: dict[int, list[int]] = field(default_factory=dict)
    leaves: int = 0


class Dresd:
    """Drafts from a store of the target's states and the tokens that followed them.

    Args:
        store: the store's folder; it must have been built for this target.
        num_drafts: how many continuations make the tree.
        len_drafts: how many tokens of each.
        neighbours: how many neighbours to look up, before the filtering token.
        min_similarity: leave out neighbours of a lower cosine; -1 keeps all.
        min_confidence: leave out nodes whose path is less probable than this.
        nodes: the most nodes of the tree.
        effort: how many candidates an approximate index examines; 0 for its default.
        checksums: compare the whole store with its checksums when it is opened.
        threads: of a search with many queries.
        calibration: how often candidates of each confidence are accepted: a file, auto (what `draftsmith calibrate`
            measured for this store and target, if it did) or none.
        costs: measured costs of the target's passes: a file, auto or none. With costs, each tree is cut to the nodes
            worth verifying.
    """

    name = "dresd"
    forward_seconds = 0.0
    bytes_moved = 0

    def __init__(
        self,
        store: str,
        num_drafts: int = 10,
        len_drafts: int = 10,
        neighbours: int = 50,
        min_similarity: float = -1.0,
        min_confidence: float = 0.05,
        nodes: int = 32,
        effort: int = 0,
        checksums: bool = True,
        threads: int = 1,
        calibration: Any = "auto",
        costs: Any = "auto",
    ) -> None:
        for what, value in (
            ("num_drafts", num_drafts), ("len_drafts", len_drafts), ("neighbours", neighbours), ("nodes", nodes),
            ("threads", threads),
        ):  # fmt: skip
            if value < 1:
                raise ValueError(f"{what} must be at least 1, not {value}")
        if not -1 <= min_similarity <= 1:
            raise ValueError(f"min_similarity must be between -1 and 1, not {min_similarity}")
        if not 0 <= min_confidence < 1:
            raise ValueError(f"min_confidence must be at least 0 and below 1, not {min_confidence}")
        self.store = DresdStore(store, checksums, effort, threads)
        self.origin = str(self.store.path)
        self.features: tuple[str, ...] = (self.store.manifest["feature"],)
        self.num_drafts = num_drafts
        self.len_drafts = len_drafts
        self.neighbours = neighbours
        self.min_similarity = min_similarity
        self.min_confidence = min_confidence
        self.nodes = nodes
        self.calibration = calibration
        self.costs = costs
        self._states: dict[Row, _State] = {}

    def pass_timers(self) -> dict[str, PassTimer]:
        return {}

    def bind(self, target: Target) -> None:
        check_fits(self.store, target)

    def open(self, rows: Sequence[Row]) -> None:
        self._states |= {row: _State() for row in rows}

    def read(self, rows: Sequence[Row], feedback: Sequence[Feedback]) -> None:
        for row, given in zip(rows, feedback):
            self._remember(row, given)

    def close(self, rows: Sequence[Row]) -> None:
        for row in rows:
            del self._states[row]

    def observe(self, rows: Sequence[Row], verdicts: Sequence[Verdict], feedback: Sequence[Feedback]) -> None:
        for row, given in zip(rows, feedback):
            self._remember(row, given)

    def abandon(self, rows: Sequence[Row]) -> None:
        pass

    def propose(self, rows: Sequence[Row], budgets: Sequence[Budget], policy: Policy | None = None) -> list[Draft]:
        growths = [Growth(Budget(min(self.nodes, b.nodes), min(self.len_drafts, b.depth))) for b in budgets]
        # A row has no query if no state predicted its newest token (a prompt of one token, a new turn).
        able = [
            b
            for b, row in enumerate(rows)
            if growths[b].budget.nodes and growths[b].budget.depth and self._states[row].position == len(row.ids) - 1
        ]
        if able:
            for b, neighbours in zip(able, self._look_up([rows[b] for b in able])):
                self._grow(growths[b], neighbours)
        return [growth.draft()[0] for growth in growths]

    def _remember(self, row: Row, given: Feedback) -> None:
        states_TD = given.features.get(self.features[0])
        if states_TD is not None and len(states_TD):
            self._states[row] = _State(given.start + len(states_TD), states_TD[-1].clone())

    def _look_up(self, rows: Sequence[Row]) -> list[_Neighbours]:
        """The neighbours of all rows in one search."""
        states = [self._states[row].state_D for row in rows]
        keys_NK = self.store.project(torch.stack([state_D for state_D in states if state_D is not None]))
        sims_NC, offsets_NC = self.store.search(keys_NK, self.neighbours)
        return [self._usable(row.ids[-1], *near) for row, *near in zip(rows, sims_NC, offsets_NC)]

    def _usable(self, newest: int, sims_C: np.ndarray, offsets_C: np.ndarray) -> _Neighbours:
        near_C = (offsets_C >= 0) & (sims_C >= self.min_similarity)
        sims_C, offsets_C = sims_C[near_C], offsets_C[near_C]
        same_C = self.store.tokens[offsets_C] == newest
        sims_C, offsets_C = sims_C[same_C][: self.num_drafts], offsets_C[same_C][: self.num_drafts]
        continuations = [self.store.continuation(int(offset), self.len_drafts) for offset in offsets_C]
        first_C, later_C = self.store.calibration.first(sims_C), self.store.calibration.later(sims_C)
        return _Neighbours(continuations, (first_C / (1 - first_C)).tolist(), (later_C / (1 - later_C)).tolist())

    def _grow(self, growth: Growth, neighbours: _Neighbours) -> None:
        neighbours.members[ROOT] = list(range(len(neighbours.continuations)))
        grow_looked_up(growth, lambda leaf: self._children(growth, neighbours, leaf))

    def _children(self, growth: Growth, neighbours: _Neighbours, leaf: int) -> list[Candidate]:
        """The tokens with which the neighbours below a leaf continue, best first; records who continues with each."""
        depth = 0 if leaf == ROOT else growth.leaves[leaf].depth
        path_prob = 1.0 if leaf == ROOT else growth.leaves[leaf].reach
        odds = neighbours.later if depth else neighbours.first
        groups: dict[int, list[int]] = {}
        for member in neighbours.members[leaf]:
            if depth < len(neighbours.continuations[member]):
                groups.setdefault(neighbours.continuations[member][depth], []).append(member)
        total = 1.0 + sum(odds[member] for members in groups.values() for member in members)
        probs = {token: sum(odds[member] for member in members) / total for token, members in groups.items()}
        kept = [token for token in groups if path_prob * probs[token] >= self.min_confidence]
        kept.sort(key=lambda token: -probs[token])
        # `grow_looked_up` numbers leaves in the order in which their candidates are returned.
        for number, token in enumerate(kept, start=neighbours.leaves):
            neighbours.members[number] = groups[token]
        neighbours.leaves += len(kept)
        return [Candidate(token, probs[token], self.name) for token in kept]


def check_fits(store: DresdStore, target: Target) -> None:
    """Refuse a store that was built for another target, tokenizer or chat template."""
    manifest = store.manifest
    tokenizer = target.tokenizer
    if manifest.get("tokenizer") is not None and tokenizer is not None:
        if tokenizer_fingerprint(tokenizer) != manifest["tokenizer"]:
            raise ValueError(f"{store.path} was built with another tokenizer: build a store for this target")
    else:
        check_same_tokenizer(None, store.vocab_size, tokenizer, target.vocab_size, f"the store {store.path}")
    if target.model is None:
        raise ValueError("dresd needs the target's hidden states, and recorded answers have none: give a target")
    if target.fingerprint() != manifest["target"]:
        raise ValueError(
            f"{store.path} was built from another target's states: build a store for this target with "
            "`draftsmith store build dresd --target`"
        )
    template = manifest.get("template")
    if template and template["name"] == "chat" and tokenizer is not None:
        from draftsmith.infer.text.templates import find_template

        current = find_template("chat", tokenizer, template.get("kwargs"), template.get("system"))
        if current.fingerprint() != template["fingerprint"]:
            raise ValueError(
                f"{store.path} was built with another chat template than this target's tokenizer has: "
                "build the store again"
            )
