"""Generation from a list of rows, in one call: an engine that lives as long as they do."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from draftsmith.infer.contract.protocols import Budget, Drafter, Rule, Target
from draftsmith.infer.contract.row import Row
from draftsmith.infer.contract.trace import Generation
from draftsmith.infer.costs.policy import Policy
from draftsmith.infer.engine.engine import BUDGET, CHUNK, Engine
from draftsmith.infer.rules.named import DEFAULT


def generate(
    target: Target,
    drafter: Drafter,
    rows: Sequence[Row],
    *,
    batch_size: int = 1,
    budget: Budget = BUDGET,
    rule: str | Rule = DEFAULT,
    policy: Policy | None = None,
    on_tokens: Callable[[Row, list[int]], None] | None = None,
    on_done: Callable[[Generation], None] | None = None,
) -> list[Generation]:
    """`Engine.run`, which raises the first row's error. A whole batch is read at once: its rows start together."""
    chunk = CHUNK * max(batch_size, 1)
    with Engine(target, drafter, batch_size=batch_size, budget=budget, rule=rule, policy=policy, chunk=chunk) as engine:
        return engine.run(rows, on_tokens=on_tokens, on_done=on_done, strict=True)
