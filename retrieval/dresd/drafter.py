"""DReSD: dense retrieval for drafting (arXiv 2502.15572). What did the target go on with when its state was like this?

The state that predicted the newest token is looked up among the stored ones. Neighbours whose stored token is not the
newest token are left out (the filtering token); the continuations of the others, best first, make one tree. A
neighbour's similarity says how likely its next token is (the store's calibration); neighbours that agree add up, as
weights w = p / (1 - p), a token being worth its weights over 1 + all weights: one neighbour alone is worth its p.

All tokens are outright: nothing is drawn here. How a store is built is not known here (dresd_build.py).

Legend: D hidden, C neighbours.
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
from draftsmith.infer.costs.calibration import given_costs
from draftsmith.infer.costs.policy import Policy
from draftsmith.infer.drafters.tree_builder import Candidate, Growth, affordable, grow
from draftsmith.infer.models.load import check_same_tokenizer
from draftsmith.infer.text.tokenizer import tokenizer_fingerprint
from draftsmith.retrieval.dresd.store import DresdStore


@dataclass(slots=True)
class _State:
    """A row's newest known state, and the position of the token that it predicted."""

    position: int = -1
    state_D: torch.Tensor | None = None


@dataclass(slots=True)
class _Found:
    """A row's usable neighbours, best first: continuations, and the odds of their first and of later tokens.

    `members` tells which neighbours pass through a leaf of the growing tree, `leaves` how many leaves there are."""

    continuations: list[list[int]]
    first: list[float]
    later: list[float]
    members: dict[int, list[int]] = field(default_factory=dict)
    leaves: int = 0


class Dresd:
    """Drafts what the target said elsewhere in like states.

    Args:
        store: the folder of the store, built for this very target.
        num_drafts: how many continuations make the tree.
        len_drafts: how many tokens of each.
        neighbours: how many neighbours are looked up, before the filtering token.
        min_similarity: the cosine below which a neighbour is left out; -1: none is.
        min_confidence: the probability of being reached and accepted below which a node is left out.
        nodes: the most nodes of the tree.
        effort: how many candidates an approximate index looks at; 0: its own default.
        checksums: compare the whole store with its checksums when it is opened.
        threads: of a search with many queries.
        costs: what passes of the target cost: a file, auto (what `draftsmith calibrate` left for this store and target,
            if it did) or none. Known, they cut each tree to the nodes that are worth verifying.
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
        costs: Any = "auto",
    ) -> None:
        for what, value in (
            ("num_drafts", num_drafts), ("len_drafts", len_drafts), ("neighbours", neighbours), ("nodes", nodes),
            ("threads", threads),
        ):  # fmt: skip
            if value < 1:
                raise ValueError(f"{what} must be at least 1, not {value}")
        if not -1 <= min_similarity <= 1:
            raise ValueError(f"min_similarity is a cosine, between -1 and 1, and not {min_similarity}")
        if not 0 <= min_confidence < 1:
            raise ValueError(f"min_confidence is a probability below 1, and not {min_confidence}")
        self.store = DresdStore(store, checksums, effort, threads)
        self.origin = str(self.store.path)
        self.features: tuple[str, ...] = (self.store.manifest["feature"],)
        self.num_drafts = num_drafts
        self.len_drafts = len_drafts
        self.neighbours = neighbours
        self.min_similarity = min_similarity
        self.min_confidence = min_confidence
        self.nodes = nodes
        self.costs = costs
        self._economy: Policy | None = None
        self._verified = 0
        self._states: dict[Row, _State] = {}

    def pass_timers(self) -> dict[str, PassTimer]:
        return {}

    def bind(self, target: Target) -> None:
        check_fits(self.store, target)
        costs = given_costs(self.costs, self.origin, target)
        self._economy = Policy(costs, None) if costs is not None else None

    def open(self, rows: Sequence[Row], feedback: Sequence[Feedback]) -> None:
        for row, given in zip(rows, feedback):
            self._states[row] = _State()
            self._remember(row, given)

    def close(self, rows: Sequence[Row]) -> None:
        for row in rows:
            del self._states[row]

    def observe(self, rows: Sequence[Row], verdicts: Sequence[Verdict], feedback: Sequence[Feedback]) -> None:
        for row, given in zip(rows, feedback):
            self._remember(row, given)
        if self._economy is not None:
            self._economy.settle(self._verified, sum(len(verdict.committed) for verdict in verdicts))

    def propose(self, rows: Sequence[Row], budgets: Sequence[Budget]) -> list[Draft]:
        growths = [Growth(Budget(min(self.nodes, b.nodes), min(self.len_drafts, b.depth))) for b in budgets]
        # A row whose newest token was not predicted by a known state (a prompt of one token, a new turn) has no query.
        asking = [
            b
            for b, row in enumerate(rows)
            if growths[b].budget.nodes and growths[b].budget.depth and self._states[row].position == len(row.ids) - 1
        ]
        if asking:
            found = self._look_up([rows[b] for b in asking])
            self._grow([growths[b] for b in asking], found)
        drafts = [growth.draft()[0] for growth in growths]
        if self._economy is not None:
            self._economy.begin([len(row.ids) for row in rows])
            drafts = affordable(drafts, self._economy)
            self._verified = max(len(draft) for draft in drafts)
        return drafts

    def _remember(self, row: Row, given: Feedback) -> None:
        states_TD = given.features.get(self.features[0])
        if states_TD is not None and len(states_TD):
            self._states[row] = _State(given.start + len(states_TD), states_TD[-1].clone())

    def _look_up(self, rows: Sequence[Row]) -> list[_Found]:
        """The neighbours of all rows in one search."""
        states = [self._states[row].state_D for row in rows]
        keys_NK = self.store.project(torch.stack([state_D for state_D in states if state_D is not None]))
        sims_NC, offsets_NC = self.store.search(keys_NK, self.neighbours)
        return [self._usable(row.ids[-1], *near) for row, *near in zip(rows, sims_NC, offsets_NC)]

    def _usable(self, newest: int, sims_C: np.ndarray, offsets_C: np.ndarray) -> _Found:
        known_C = (offsets_C >= 0) & (sims_C >= self.min_similarity)
        sims_C, offsets_C = sims_C[known_C], offsets_C[known_C]
        same_C = self.store.tokens[offsets_C] == newest
        sims_C, offsets_C = sims_C[same_C][: self.num_drafts], offsets_C[same_C][: self.num_drafts]
        calibration = self.store.calibration
        return _Found(
            [self.store.continuation(int(offset), self.len_drafts) for offset in offsets_C],
            _odds(calibration.first(sims_C)),
            _odds(calibration.later(sims_C)),
        )

    def _grow(self, growths: list[Growth], found: list[_Found]) -> None:
        def expand(asked: list[tuple[int, list[int]]]) -> list[list[list[Candidate]]]:
            return [[self._children(growths[b], found[b], leaf) for leaf in leaves] for b, leaves in asked]

        for each in found:
            each.members[ROOT] = list(range(len(each.continuations)))
        grow(growths, expand, width=self.nodes)

    def _children(self, growth: Growth, found: _Found, leaf: int) -> list[Candidate]:
        """The tokens that the neighbours below a leaf go on with, best first, and who goes on with each."""
        depth = 0 if leaf == ROOT else growth.leaves[leaf].depth
        worth = 1.0 if leaf == ROOT else growth.leaves[leaf].reach
        odds = found.later if depth else found.first
        going: dict[int, list[int]] = {}
        for member in found.members[leaf]:
            if depth < len(found.continuations[member]):
                going.setdefault(found.continuations[member][depth], []).append(member)
        total = 1.0 + sum(odds[member] for members in going.values() for member in members)
        worths = {token: sum(odds[member] for member in members) / total for token, members in going.items()}
        kept = [token for token in going if worth * worths[token] >= self.min_confidence]
        kept.sort(key=lambda token: -worths[token])
        # `grow` appends the candidates of the leaves that it asked for in their order.
        for number, token in enumerate(kept, start=found.leaves):
            found.members[number] = going[token]
        found.leaves += len(kept)
        return [Candidate(token, worths[token], self.name) for token in kept]


def check_fits(store: DresdStore, target: Target) -> None:
    """Refuse a store that was built for another target, tokenizer or chat template, with one clear line."""
    said = store.manifest
    tokenizer = target.tokenizer
    if said.get("tokenizer") is not None and tokenizer is not None:
        if tokenizer_fingerprint(tokenizer) != said["tokenizer"]:
            raise ValueError(f"{store.path} has another tokenizer than the target: its token ids mean other text")
    else:
        check_same_tokenizer(None, store.vocab_size, tokenizer, target.vocab_size, f"the store {store.path}")
    if target.model is None:
        raise ValueError("dresd reads the target's hidden states, and this target has none to lend")
    if target.fingerprint() != said["target"]:
        raise ValueError(
            f"{store.path} was built from another target's states, which this one's cannot be looked up among: "
            "build a store with `draftsmith store build dresd --target` for this one"
        )
    template = said.get("template")
    if template and template["name"] == "chat" and tokenizer is not None:
        from draftsmith.infer.text.templates import find_template

        served = find_template("chat", tokenizer, template.get("kwargs"), template.get("system"))
        if served.fingerprint() != template["fingerprint"]:
            raise ValueError(
                f"{store.path} was built with another chat template than this target's tokenizer has now: "
                "its states follow prompts of another form; build it again"
            )


def _odds(probability: np.ndarray) -> list[float]:
    return [float(odds) for odds in probability / (1.0 - probability)]
