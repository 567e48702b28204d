"""Generation from a list of rows: they join as others end, up to `batch_size` at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from draftsmith.infer.contract.protocols import Budget, Drafter, Rule, Target
from draftsmith.infer.contract.row import Row
from draftsmith.infer.contract.trace import Generation, StepTrace
from draftsmith.infer.costs.policy import Policy
from draftsmith.infer.engine.step import admit, release, step
from draftsmith.infer.rules.token import rejection

BUDGET = Budget(nodes=64, depth=64)


@dataclass(slots=True)
class _Live:
    began: float
    admitted: float = 0.0
    first: float = 0.0


def generate(
    target: Target,
    drafter: Drafter,
    rows: Sequence[Row],
    *,
    batch_size: int = 1,
    budget: Budget = BUDGET,
    rule: Rule = rejection,
    policy: Policy | None = None,
    on_tokens: Callable[[Row, list[int]], None] | None = None,
    on_done: Callable[[Generation], None] | None = None,
) -> list[Generation]:
    """Decode `rows` to their stops; results are in the order given. `drafter` must be bound to `target`.

    `policy`: how much to draft; by default the one of this target and drafter. `on_tokens(row, tokens)` is called after
    every step with what a row has just committed, `on_done` when a row ends.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    policy = Policy.of(target, drafter) if policy is None else policy
    waiting = list(rows)[::-1]
    live: dict[Row, _Live] = {}
    traces: dict[Row, list[StepTrace]] = {row: [] for row in rows}
    done: dict[Row, Generation] = {}
    try:
        while waiting or live:
            joining = [waiting.pop() for _ in range(min(batch_size - len(live), len(waiting)))]
            if joining:
                began = time.perf_counter()
                admit(target, drafter, joining)
                took = (time.perf_counter() - began) / len(joining)
                live.update({row: _Live(began, took) for row in joining})
            now = list(live)
            for row, trace in zip(now, step(target, drafter, now, budget, rule, policy)):
                traces[row].append(trace)
                live[row].first = live[row].first or time.perf_counter() - live[row].began
                if on_tokens is not None:
                    on_tokens(row, row.ids[-trace.committed :])
            ended = [row for row in now if row.stop]
            for row in ended:
                done[row] = _generation(row, live.pop(row), traces[row])
                if on_done is not None:
                    on_done(done[row])
            if ended:
                release(target, drafter, ended, policy)
    finally:
        if live:
            release(target, drafter, list(live), policy)
    return [done[row] for row in rows]


def _generation(row: Row, times: _Live, traces: list[StepTrace]) -> Generation:
    return Generation(
        row=row.key,
        token_ids=row.new_ids,
        stop=row.stop,
        prompt_tokens=row.prompt_tokens,
        text="" if row.tokenizer is None else str(row.tokenizer.decode(row.new_ids, skip_special_tokens=True)),
        traces=traces,
        first_s=times.first,
        prefill_s=times.admitted,
        seconds=time.perf_counter() - times.began,
    )
