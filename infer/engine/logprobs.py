"""The target's log-probability of every committed token, after processors, temperature and truncation.

Both are verification rules, so the engine's own passes give them: `NotingRule` of a text while it is decoded,
`ForcedRule` of one that is known already (teacher forcing).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from draftsmith.infer.contract.draft import ROOT, Draft
from draftsmith.infer.contract.protocols import Rule, Target, TargetDistribution, Verdict
from draftsmith.infer.contract.rng import StepRng
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.costs.policy import Policy
from draftsmith.infer.drafters.controls import oracle
from draftsmith.infer.engine.engine import BUDGET, Engine
from draftsmith.infer.rules.named import as_rule


class NotingRule:
    """A verification rule, with a note of the log-probability of each token that it commits, by row and position."""

    def __init__(self, rule: str | Rule | None = None) -> None:
        self.rule = as_rule(rule)
        self._noted: dict[str, dict[int, float]] = {}

    def __call__(self, draft: Draft, distribution: TargetDistribution, rng: StepRng) -> Verdict:
        verdict = self.rule(draft, distribution, rng)
        tokens = [*(draft.tokens[node] for node in verdict.path), verdict.next_token]
        noted = self._noted.setdefault(rng.row, {})
        for depth, (node, token) in enumerate(zip((ROOT, *verdict.path), tokens)):
            prob = float(distribution.probs(node)[token])
            noted[rng.position + depth] = math.log(prob) if prob > 0 else -math.inf
        return verdict

    def take(self, key: str, prompt_tokens: int, new_tokens: int) -> list[float]:
        """The log-probabilities of a row's new tokens; they are forgotten here."""
        noted = self._noted.pop(key, {})
        return [noted[prompt_tokens + i] for i in range(new_tokens)]


class ForcedRule:
    """Commits known texts (ids by row key, with their prompts), whatever the target would have drawn."""

    def __init__(self, texts: Mapping[str, Sequence[int]]) -> None:
        self.texts = texts

    def __call__(self, draft: Draft, distribution: TargetDistribution, rng: StepRng) -> Verdict:
        ahead = self.texts[rng.row][rng.position :]
        path = list(range(len(draft)))
        assert draft.tokens == list(ahead[: len(path)]), "the draft is not the text that is forced"
        trials = [draft.trials[node - 1][0] for node in path]
        return Verdict(path, trials, ahead[len(path)])


def score_texts(
    target: Target, texts: Mapping[str, tuple[Sequence[int], Sequence[int]]], settings: Settings, batch_size: int = 8
) -> dict[str, list[float]]:
    """The target's log-probabilities of the tokens of answers: row key -> (prompt, answer) in, row key -> one for each
    token out. -inf where the settings exclude a token."""
    drafter = oracle(BUDGET.depth)
    drafter.bind(target)
    drafter.learn({key: answer for key, (_, answer) in texts.items()})
    rule = NotingRule(ForcedRule({key: [*prompt, *answer] for key, (prompt, answer) in texts.items()}))
    rows = [
        Row(key, list(prompt), settings, Stops(len(answer)), target.tokenizer)
        for key, (prompt, answer) in texts.items()
    ]
    # An empty policy limits nothing.
    with Engine(target, drafter, batch_size=batch_size, rule=rule, policy=Policy()) as engine:
        engine.run(rows, strict=True)
    return {key: rule.take(key, len(prompt), len(answer)) for key, (prompt, answer) in texts.items()}
