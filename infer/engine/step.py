"""The step: one target pass over all live rows, in the four verbs of infer/contract/protocols.py."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import MutableMapping, Sequence

from draftsmith.infer.contract.draft import Draft
from draftsmith.infer.contract.protocols import (
    Budget,
    Drafter,
    Feedback,
    Rule,
    Scores,
    Target,
    Verdict,
    drafts_unread,
)
from draftsmith.infer.contract.row import Row
from draftsmith.infer.contract.trace import StepTrace
from draftsmith.infer.costs.policy import Policy
from draftsmith.infer.engine.chains import CutDraft, cut_to_chain, row_budget
from draftsmith.infer.rules.block import block

_step_numbers = itertools.count()


def step(
    target: Target,
    drafter: Drafter,
    rows: Sequence[Row],
    budget: Budget,
    rule: Rule = block,
    policy: Policy | None = None,
    joining: MutableMapping[Row, Feedback | None] | None = None,
) -> list[StepTrace]:
    """Decode one step of `rows`, which must be live. Returns one trace per row.

    `joining`: rows whose prompt is read to its end by this pass. If the drafter cannot propose for them before that,
    what enters the target's cache is put there, for its `read`.

    If it raises, each row has either all of the step's tokens or none: `abandon` the rows and it can be repeated.
    """
    target_before, draft_before = target.forward_seconds, drafter.forward_seconds
    moved_before = target.bytes_moved + drafter.bytes_moved
    t0 = time.perf_counter()
    joining = {} if joining is None else joining
    unread = {row: target.unread(row) for row in joining}
    apart = frozenset(joining) if joining and not drafts_unread(drafter) else ()
    drafted = [row for row in rows if row not in apart]
    proposed = dict(zip(drafted, _propose(target, drafter, drafted, budget, policy))) if drafted else {}
    drafts = [proposed[row] if row in proposed else Draft() for row in rows]
    cuts: list[CutDraft] = []
    if target.draft_shape == "chain":
        cuts = [cut_to_chain(draft) for draft in drafts]
        drafts = [cut.draft for cut in cuts]
    t1 = time.perf_counter()
    scores = target.score(rows, drafts)
    t2 = time.perf_counter()
    verdicts = _verify(rows, drafts, scores, rule)
    t3 = time.perf_counter()
    feedback = target.commit(rows, verdicts)
    _extend(target, rows, verdicts)
    own = [cut.undone(verdict) for cut, verdict in zip(cuts, verdicts)] if cuts else verdicts
    joining.update((row, given) for row, given in zip(rows, feedback) if row in apart)
    seen = [index for index, row in enumerate(rows) if row not in apart]
    if seen:
        drafter.observe(drafted, [own[index] for index in seen], [feedback[index] for index in seen])
        if policy is not None:
            policy.settle(drafted, [drafts[index] for index in seen], [verdicts[index] for index in seen])
    t4 = time.perf_counter()
    number = next(_step_numbers)
    traces = []
    for row, draft, verdict in zip(rows, drafts, verdicts):
        trace = _trace(row, draft, verdict, number, len(rows))
        trace.read = unread.get(row, 0)
        trace.propose_s, trace.score_s, trace.verify_s, trace.commit_s = t1 - t0, t2 - t1, t3 - t2, t4 - t3
        trace.target_forward_s = target.forward_seconds - target_before
        trace.draft_forward_s = drafter.forward_seconds - draft_before
        trace.bytes_moved = target.bytes_moved + drafter.bytes_moved - moved_before
        traces.append(trace)
    return traces


def _propose(
    target: Target, drafter: Drafter, rows: Sequence[Row], budget: Budget, policy: Policy | None
) -> list[Draft]:
    """A draft per row, checked: whatever a drafter proposes, only what the contract allows is scored."""
    limits = [_limit(budget, row, target) for row in rows]
    if policy is not None:
        policy.begin(rows)
        limits = policy.limits(rows, limits)
    drafts = drafter.propose(rows, limits, policy)
    if len(drafts) != len(rows):
        raise ValueError(f"{drafter.name} proposed {len(drafts)} drafts for {len(rows)} rows")
    for draft, limit in zip(drafts, limits):
        _check(draft, limit, target, drafter)
    return drafts if policy is None else policy.cut(rows, drafts)


def _verify(rows: Sequence[Row], drafts: Sequence[Draft], scores: Scores, rule: Rule) -> list[Verdict]:
    verdicts = []
    for index, (row, draft) in enumerate(zip(rows, drafts)):
        verdict = rule(draft, scores.distribution(index), row.stream())
        tokens = [draft.tokens[node] for node in verdict.path]
        verdict.committed, verdict.stop = row.cut([*tokens, verdict.next_token])
        verdicts.append(verdict)
    return verdicts


def _extend(target: Target, rows: Sequence[Row], verdicts: Sequence[Verdict]) -> None:
    """Append the committed tokens. An interrupt in here leaves each row before or behind the step, not in between."""
    lengths = [len(row.ids) for row in rows]
    stops = [
        verdict.stop or ("context" if length + len(verdict.committed) >= target.max_positions else "")
        for length, verdict in zip(lengths, verdicts)
    ]
    try:
        for row, verdict in zip(rows, verdicts):
            row.ids.extend(verdict.committed)
    finally:
        for row, length, stop in zip(rows, lengths, stops):
            row.stop = stop if len(row.ids) > length else ""


def _limit(budget: Budget, row: Row, target: Target) -> Budget:
    """The budget, without the depth that the row could not keep: one token is always the target's own."""
    left = min(row.left, target.max_positions - len(row.ids)) - 1
    if target.draft_shape == "none":
        return Budget(0, 0)
    return row_budget(Budget(budget.nodes if left > 0 else 0, max(min(budget.depth, left), 0)), row, target)


def _check(draft: Draft, limit: Budget, target: Target, drafter: Drafter) -> None:
    try:
        draft.check(target.vocab_size)
    except ValueError as problem:
        raise ValueError(f"{drafter.name}: {problem}") from problem
    if target.draft_shape == "none" and len(draft):
        raise ValueError(f"this target verifies no drafts, and {drafter.name} proposed one")
    if len(draft) > limit.nodes:
        raise ValueError(f"{drafter.name} proposed {len(draft)} nodes, and its budget is {limit.nodes}")
    if draft.depth > limit.depth:
        raise ValueError(f"{drafter.name} proposed a draft of depth {draft.depth}, and its budget is {limit.depth}")


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
        jointly=verdict.jointly,
        also_named=dict(Counter(name for node in verdict.path[:accepted] for name in draft.also.get(node, ()))),
    )
