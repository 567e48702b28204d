"""The target's likeliest tokens at everything it read, refused nodes too: what a drafter gets that asks for `top:K`.

A drafter names it among its `features`, beside the states that it reads. Ids and logits come from the pass that scores
the drafts, before processors and temperature.

Legend: N tokens that were read, K likeliest tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from draftsmith.infer.contract.draft import ROOT

PREFIX = "top:"


@dataclass(frozen=True, slots=True, eq=False)
class TopTokens:
    """`tokens[i]` was read below `parents[i]`, an index into this list, or ROOT: directly behind `row.ids[:start]`.

    `ids_NK[i]` are the likeliest next tokens there, likeliest first, and `logits_NK[i]` their raw logits; where logits
    are not finite, the ids are -1. A drafter may get more than the K that it asked for. Parents come before their
    children. The nodes are those that were scored, which need not be numbered as in the draft that was proposed.
    """

    start: int
    tokens: list[int]
    parents: list[int]
    ids_NK: np.ndarray
    logits_NK: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)

    def path(self, index: int) -> list[int]:
        """The tokens from the first one read down to this one."""
        path: list[int] = []
        while index != ROOT:
            path.append(self.tokens[index])
            index = self.parents[index]
        return path[::-1]


def top_asked(features: Sequence[str]) -> int:
    """The largest K of the `top:K` among `features`, 0 if there is none; ValueError for one that is no number."""
    asked = 0
    for name in features:
        if name.startswith(PREFIX):
            number = name.removeprefix(PREFIX)
            if not number.isdecimal() or int(number) < 1:
                raise ValueError(f"unknown feature {name!r}: write top:8 for the 8 likeliest tokens")
            asked = max(asked, int(number))
    return asked


def states_asked(features: Sequence[str]) -> tuple[str, ...]:
    """`features` without `top:K`: the states."""
    return tuple(name for name in features if not name.startswith(PREFIX))


def no_top(name: str) -> ValueError:
    """For a drafter that asked and got none."""
    return ValueError(f"{name} reads the target's likeliest tokens at every node, and this target does not give them")
