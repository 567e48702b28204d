"""What a draft model adds to trees of outright candidates, its own or those that it builds with others.

Legend: N nodes, K candidates, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from draftsmith.infer.contract.protocols import Budget
from draftsmith.infer.contract.row import Row
from draftsmith.infer.costs.policy import Policy
from draftsmith.infer.drafters.draft_reader import DraftOutput
from draftsmith.infer.drafters.drawn import Asked
from draftsmith.infer.drafters.exit_choice import Pricing
from draftsmith.infer.drafters.heads.learned_rates import LearnedRates
from draftsmith.infer.drafters.tree_builder import Candidate, Expandable, TreePricing

if TYPE_CHECKING:
    from draftsmith.infer.drafters.lm_drafter import LMDrafter

# (row, source, one node's raw confidences, best first) -> probabilities of acceptance.
Calibrated = Callable[[Row, str, list[float]], list[float]]


class LMExpansion:
    """A draft model's part in one step's trees: asked for the candidates below some nodes, it runs these nodes in one
    pass. `limits`: of each row; `exits[b]`: (depth, exit) of each node of row b that was run."""

    def __init__(
        self,
        drafter: LMDrafter,
        rows: Sequence[Row],
        limits: Sequence[Budget],
        trees: Sequence[Expandable],
        policy: Policy,
        calibrated: Calibrated,
        learned: LearnedRates | None = None,
    ) -> None:
        self.limits = limits
        self.exits: list[list[tuple[int, int]]] = [[] for _ in rows]
        self._drafter = drafter
        self._reader = drafter.reader
        self._rows = rows
        self._trees = trees
        self._policy = policy
        self._calibrated = calibrated
        self._learned = learned
        # By (row, depth), where candidates do not depend on the path.
        self._known: dict[tuple[int, int], list[Candidate]] = {}

    def pricing(self, policy: Policy) -> TreePricing:
        pending = self._drafter.pending(self._rows)
        return TreePricing(policy, self._rows, self._reader.entry, pending, self._reader.at_once)

    def expand(self, asked: Asked) -> list[list[list[Candidate]]]:
        """The candidates below the asked (row, nodes): ROOT first, parents before their children, and nothing below a
        node that was not asked for."""
        if not self._reader.at_once:
            return self._expand(asked)
        depth = [tree.depth for tree in self._trees]
        new = [(b, {depth[b](node): node for node in nodes if (b, depth[b](node)) not in self._known})
               for b, nodes in asked]  # fmt: skip
        new = [(b, nodes) for b, nodes in new if nodes]
        if new:
            found = self._expand([(b, [*nodes.values()]) for b, nodes in new])
            self._known |= {(b, at): one for (b, nodes), some in zip(new, found) for at, one in zip(nodes, some)}
        return [[self._known[b, depth[b](node)] for node in nodes] for b, nodes in asked]

    def _expand(self, asked: Asked) -> list[list[list[Candidate]]]:
        drafter, trees = self._drafter, self._trees
        some = [self._rows[b] for b, _ in asked]
        reaches = [[trees[b].reach(node) for node in nodes] for b, nodes in asked]
        pricing = Pricing(self._policy, coupled=drafter.couples) if self._policy.costs is not None else None
        output = self._reader.run(some, [nodes for _, nodes in asked], [trees[b] for b, _ in asked], reaches, pricing)
        left = iter(output.exits)
        for b, nodes in asked if output.exits else ():
            self.exits[b] += [(trees[b].depth(node) + 1, next(left)) for node in nodes]
        positions = [[len(self._rows[b].ids) + trees[b].depth(node) for node in nodes] for b, nodes in asked]
        return self._candidates(output, some, positions)

    def name(self, b: int, nodes: Mapping[int, int]) -> None:
        """The numbers by which row b's verdict will name the nodes that were run; those without one are dropped."""
        self._reader.name(self._rows[b], nodes)

    def _candidates(
        self, output: DraftOutput, rows: Sequence[Row], positions: Sequence[Sequence[int]]
    ) -> list[list[list[Candidate]]]:
        """Each node's candidates, best first, with their calibrated probabilities. `positions`: of the tokens that
        follow each row's nodes."""
        drafter, found, at = self._drafter, [], 0
        for row, some in zip(rows, positions):
            best_NK = drafter.best(row, output, at, some)
            nodes = []
            for n, (tokens, raw) in enumerate(zip(*(each.tolist() for each in best_NK)), start=at):
                source = drafter.source(output, n)
                raw = [one for one in raw if one > 0]  # the row's truncation may exclude some
                if self._learned is not None:
                    self._learned.note(row, some[n - at], source, tokens, raw)
                probs = self._calibrated(row, source, raw)
                nodes.append([Candidate(token, prob, source) for token, prob in zip(tokens, probs)])
            found.append(nodes)
            at += len(some)
        return found
