"""The step: one target pass over all live rows, in the four verbs of infer/contract/protocols.py."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Sequence

from draftsmith.infer.contract.draft import Draft
from draftsmith.infer.contract.protocols import Budget, Drafter, Rule, Target, Verdict
from draftsmith.infer.contract.row import Row
from draftsmith.infer.contract.trace import StepTrace
from draftsmith.infer.engine.chains import CutDraft, cut_to_chain, row_budget
from draftsmith.infer.rules.token import rejection

_step_numbers = itertools.count()


def admit(target: Target, drafter: Drafter, rows: Sequence[Row]) -> None:
    """Let `rows` join at the next step; prefill happens here."""
    feedback = target.admit(rows, drafter.features)
    try:
        drafter.open(rows, feedback)
    except BaseException:
        target.release(rows)
        raise


def release(target: Target, drafter: Drafter, rows: Sequence[Row]) -> None:
    """Let `rows` leave."""
    target.release(rows)
    drafter.close(rows)


def step(
    target: Target, drafter: Drafter, rows: Sequence[Row], budget: Budget, rule: Rule = rejection
) -> list[StepTrace]:
    """Decode one step of `rows`, which must be admitted and live. Returns one trace per row."""
    target_before, draft_before = target.forward_seconds, drafter.forward_seconds
    moved_before = target.bytes_moved + drafter.bytes_moved
    t0 = time.perf_counter()
    drafts = drafter.propose(rows, [_limit(budget, row, target) for row in rows])
    for draft in drafts:
        _check(draft, target)
    cuts: list[CutDraft] = []
    if target.draft_shape == "chain":
        cuts = [cut_to_chain(draft) for draft in drafts]
        drafts = [cut.draft for cut in cuts]
    t1 = time.perf_counter()
    scores = target.score(rows, drafts)
    t2 = time.perf_counter()
    verdicts = []
    for index, (row, draft) in enumerate(zip(rows, drafts)):
        verdict = rule(draft, scores.distribution(index), row.stream())
        tokens = [draft.tokens[node] for node in verdict.path]
        verdict.committed, verdict.stop = row.cut([*tokens, verdict.next_token])
        verdicts.append(verdict)
    t3 = time.perf_counter()
    feedback = target.commit(rows, verdicts)
    for row, verdict in zip(rows, verdicts):
        row.ids.extend(verdict.committed)
        row.stop = verdict.stop or ("context" if len(row.ids) >= target.max_positions else "")
    own = [cut.undone(verdict) for cut, verdict in zip(cuts, verdicts)] if cuts else verdicts
    drafter.observe(rows, own, feedback)
    t4 = time.perf_counter()
    number = next(_step_numbers)
    traces = []
    for row, draft, verdict in zip(rows, drafts, verdicts):
        trace = _trace(row, draft, verdict, number, len(rows))
        trace.propose_s, trace.score_s, trace.verify_s, trace.commit_s = t1 - t0, t2 - t1, t3 - t2, t4 - t3
        trace.target_forward_s = target.forward_seconds - target_before
        trace.draft_forward_s = drafter.forward_seconds - draft_before
        trace.bytes_moved = target.bytes_moved + drafter.bytes_moved - moved_before
        traces.append(trace)
    return traces


def _limit(budget: Budget, row: Row, target: Target) -> Budget:
    """The budget, without the depth that the row could not keep: one token is always the target's own."""
    left = min(row.left, target.max_positions - len(row.ids)) - 1
    if target.draft_shape == "none":
        return Budget(0, 0)
    return row_budget(Budget(budget.nodes if left > 0 else 0, max(min(budget.depth, left), 0)), row, target)


def _check(draft: Draft, target: Target) -> None:
    draft.check(target.vocab_size)
    if target.draft_shape == "none" and len(draft):
        raise ValueError("this target verifies no drafts, and the drafter proposed one")


def _trace(row: Row, draft: Draft, verdict: Verdict, number: int, batch: int) -> StepTrace:
    accepted = min(len(verdict.path), len(verdict.committed))
    credited = [trial.source for trial in verdict.accepted[:accepted]]
    own = ["target"] * (len(verdict.committed) - accepted)
    # A node is credited to its first trial's source, however many propose it; probes have none.
    first: dict[int, str] = {}
    for trials in draft.trials.values():
        for trial in trials:
            first.setdefault(trial.node, trial.source)
    return StepTrace(
        row=row.key,
        step=number,
        batch=batch,
        context=len(row.ids) - len(verdict.committed),
        nodes=len(draft) - len(draft.probes),
        trials=draft.num_trials,
        depth=draft.depth,
        accepted=accepted,
        committed=len(verdict.committed),
        tried=verdict.tried,
        nodes_by_source=dict(Counter(first.values())),
        exits=draft.exits,
        committed_sources=credited + own,
    )
