"""A draft: the token tree that is scored, and the ordered trials that the verifier makes in it.

Nodes are *what is scored*; trials are *what is tried, in which order, and which distribution each token came from*.
They are separate because several trials may name one node, and because the order of trials affects the distribution.

A trial's distribution must be the distribution of its token given everything that decided that the trial exists and its
place in the order. So trials are append-only: nothing here sorts, merges or removes one. Trees that hold outright
trials only may be cut by any rule before they become a draft.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

ROOT = -1


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """The distribution that a trial's token came from.

    `draft_probs` None: a point mass (a retrieved token, a top-k token). Otherwise the distribution of one draw, after
    the draft's own temperature and truncation: dense over the vocabulary, or over `ids` if the draft has a subset.
    `with_replacement` False: each draw excludes the earlier draws of the same group.
    """

    draft_probs: torch.Tensor | None = None
    ids: torch.Tensor | None = None
    with_replacement: bool = True

    @property
    def outright(self) -> bool:
        return self.draft_probs is None

    def dense(self, vocab_size: int, device: torch.device) -> torch.Tensor:
        """The distribution over the whole vocabulary, float64."""
        assert self.draft_probs is not None
        probs = self.draft_probs.to(device=device, dtype=torch.float64)
        if self.ids is None and probs.numel() == vocab_size:
            return probs
        dense_V = torch.zeros(vocab_size, dtype=torch.float64, device=device)
        if self.ids is not None:
            dense_V[self.ids.to(device)] = probs
            return dense_V
        if probs.numel() > vocab_size:
            if bool(probs[vocab_size:].any()):
                raise ValueError(f"draft_probs are not 0 for ids beyond the target's vocabulary of {vocab_size}")
            return probs[:vocab_size]
        dense_V[: probs.numel()] = probs
        return dense_V


OUTRIGHT = Group()


class Trial(NamedTuple):
    """One attempt below a parent: the node, the distribution its token came from, the source, and its confidence."""

    node: int
    group: Group
    source: str
    confidence: float


@dataclass(slots=True)
class Draft:
    """One row's token tree. Parents come before their children; ROOT is the row's newest token.

    `exits`: for drafters with early exits, (depth, exit) of each expanded node. `whole`: a policy verifies all of it or
    nothing, because the drafter learns from what the target says at its nodes. `also`: for a node that several sources
    named, those besides its first trial's.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    trials: dict[int, list[Trial]] = field(default_factory=dict)
    probes: set[int] = field(default_factory=set)
    exits: list[tuple[int, int]] = field(default_factory=list)
    whole: bool = False
    also: dict[int, tuple[str, ...]] = field(default_factory=dict)
    _children: dict[tuple[int, int], int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def depth(self) -> int:
        return max(self.depths, default=0)

    @property
    def num_trials(self) -> int:
        return sum(len(trials) for trials in self.trials.values())

    def node(self, parent: int, token: int) -> int:
        """The node of `token` under `parent`, added if it is new."""
        key = (parent, token)
        node = self._children.get(key)
        if node is None:
            node = len(self.tokens)
            self._children[key] = node
            self.tokens.append(token)
            self.parents.append(parent)
            self.depths.append(1 if parent == ROOT else self.depths[parent] + 1)
        return node

    def child(self, parent: int, token: int) -> int | None:
        """The node of `token` under `parent`, or None."""
        return self._children.get((parent, token))

    def outright(self, parent: int, token: int, source: str, confidence: float = 1.0) -> int:
        """Append an outright trial; a second one for the same token could never be accepted and is skipped."""
        node = self.node(parent, token)
        self.probes.discard(node)
        trials = self.trials.setdefault(parent, [])
        if not any(trial.node == node and trial.group.outright for trial in trials):
            trials.append(Trial(node, OUTRIGHT, source, confidence))
        return node

    def sampled(self, parent: int, token: int, group: Group, source: str, confidence: float) -> int:
        """Append a trial whose token was drawn from `group`; a duplicate is a separate trial."""
        node = self.node(parent, token)
        self.probes.discard(node)
        self.trials.setdefault(parent, []).append(Trial(node, group, source, confidence))
        return node

    def probe(self, parent: int, token: int) -> int:
        """A node that is scored and never accepted."""
        known = self.child(parent, token)
        node = self.node(parent, token)
        if known is None:
            self.probes.add(node)
        return node

    def chain(self, tokens: list[int], source: str, confidences: list[float] | None = None) -> Draft:
        """Append `tokens` below the root as one outright chain."""
        parent = ROOT
        for i, token in enumerate(tokens):
            parent = self.outright(parent, token, source, 1.0 if confidences is None else confidences[i])
        return self

    def is_chain(self) -> bool:
        return all(parent == node - 1 for node, parent in enumerate(self.parents))

    def check(self, vocab_size: int) -> None:
        """ValueError if no rule could verify this draft."""
        if not len(self.tokens) == len(self.parents) == len(self.depths):
            raise ValueError(
                f"the draft has {len(self.tokens)} tokens, {len(self.parents)} parents and {len(self.depths)} depths"
            )
        if self.tokens and not (0 <= min(self.tokens) and max(self.tokens) < vocab_size):
            bad = next(token for token in self.tokens if not 0 <= token < vocab_size)
            raise ValueError(f"the drafter proposed token id {bad}, outside the target's vocabulary of {vocab_size}")
        for node, parent in enumerate(self.parents):
            if not ROOT <= parent < node:
                raise ValueError(f"draft node {node} has parent {parent}: parents must come before their children")
            depth = 1 if parent == ROOT else self.depths[parent] + 1
            if self.depths[node] != depth:
                raise ValueError(f"draft node {node} says that its depth is {self.depths[node]}; it is {depth}")
        for parent, trials in self.trials.items():
            for trial in trials:
                self._check_trial(parent, trial)

    def _check_trial(self, parent: int, trial: Trial) -> None:
        if not 0 <= trial.node < len(self.tokens):
            raise ValueError(f"a trial of {trial.source} names node {trial.node}, and there are {len(self.tokens)}")
        if self.parents[trial.node] != parent:
            raise ValueError(
                f"a trial of {trial.source} below node {parent} names node {trial.node}, whose parent is "
                f"{self.parents[trial.node]}: it would be accepted on a path that it is not on"
            )
        if trial.node in self.probes:
            raise ValueError(f"a trial of {trial.source} names node {trial.node}, a probe: probes are never accepted")
