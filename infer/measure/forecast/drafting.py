"""A way to draft, a chain or a tree, and what a step with it costs: the one price that forecast and plan go by."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul

from draftsmith.infer.costs.pass_costs import PassCost

# Nodes of a row that SmallLM expands per pass.
TREE_WIDTH = 2


@dataclass(frozen=True, slots=True)
class Drafting:
    """Nodes verified, depth, and the tokens of each draft pass. `widths`: of a tree with a fixed shape, the children of
    every node by depth; a tree without them is grown best first."""

    name: str
    nodes: int
    depth: int
    passes: tuple[int, ...]
    tree: bool = False
    widths: tuple[int, ...] = ()

    @classmethod
    def chain(cls, length: int) -> Drafting:
        if length < 1:
            raise ValueError(f"a draft has at least one token, not {length}")
        return cls(str(length), length, length, (1,) * length)

    @classmethod
    def parse_tree(cls, text: str) -> Drafting:
        """NODESxDEPTH, or the children of each node by depth, such as 4-2-1."""
        if re.fullmatch(r"[1-9]\d*(-[1-9]\d*)+", text):
            widths = tuple(map(int, text.split("-")))
            levels = list(accumulate(widths, mul))
            return cls(text, sum(levels), len(levels), (1, *levels[:-1]), tree=True, widths=widths)
        nodes, _, depth = text.partition("x")
        if not (nodes.isdecimal() and depth.isdecimal() and 1 <= int(depth) <= int(nodes)):
            raise ValueError(
                f"{text!r} is no tree: write NODESxDEPTH, such as 14x4, with no fewer nodes than levels, or the "
                "children of each node by depth, such as 4-2-1"
            )
        return cls(text, int(nodes), int(depth), (1, *(TREE_WIDTH,) * (int(depth) - 1)), tree=True)

    @classmethod
    def parse(cls, text: str) -> Drafting:
        """By its name: that of a chain is its length."""
        return cls.chain(int(text)) if text.isdecimal() else cls.parse_tree(text)


def step_seconds(
    target: PassCost,
    drafts: Sequence[PassCost],
    drafting: Drafting | None,
    rows: int,
    context: float,
    overhead_s: float = 0.0,
) -> dict[str, float]:
    """The parts of a step of `rows` rows behind `context` tokens each; `drafting` None is a plain step.

    Every level of a draft goes through all passes of `drafts`, behind the levels above it.
    """
    passes = drafting.passes if drafting else ()
    draft_s = sum(cost.even(rows, tokens, context + depth) for depth, tokens in enumerate(passes) for cost in drafts)
    verify_s = target.even(rows, (drafting.nodes if drafting else 0) + 1, context)
    return {
        "draft_s": draft_s,
        "verify_s": verify_s,
        "overhead_s": overhead_s,
        "step_s": draft_s + verify_s + overhead_s,
    }
