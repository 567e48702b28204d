"""The last check: accepted_length with the target's own answers, against the reference's."""

from __future__ import annotations

from collections.abc import Sequence

from draftsmith.infer.contract.trace import Generation
from draftsmith.infer.measure.bootstrap import MIN_PAIRS, speedup_interval
from draftsmith.infer.measure.doctor.finding import Finding
from draftsmith.infer.measure.metrics import Totals, per_answer

CHECK = "accepted_length"
# Below this hardly any draft is accepted.
FLOOR = 1.05
# The most that a draft may fall behind its reference; with few prompts, where there is no interval.
BEHIND, BEHIND_OF_FEW = 0.98, 0.9


def check_acceptance(own: Sequence[Generation], reference: Sequence[Generation] | None) -> Finding:
    """The decoded answers of both, in the same order."""
    mine = _length(own)
    if mine is None:
        return Finding.unknown(CHECK, "the target's answers end with their first token: nothing was drafted")
    found = f"{mine:.2f} on {len(own)} prompts"
    theirs = None if reference is None else _length(reference)
    if reference is not None and theirs is not None:
        interval = speedup_interval(*per_answer(own), *per_answer(reference), seed=0)
        behind = mine / theirs < BEHIND_OF_FEW if interval is None else interval[1] < BEHIND
        found += f", the reference {theirs:.2f}"
        if behind:
            return Finding.wrong(CHECK, found, "mend what is wrong above; if nothing is, export the reference again")
    if mine < FLOOR:
        return Finding.wrong(
            CHECK,
            f"{found}: the target accepts hardly any draft",
            "mend what is wrong above; if nothing is, it was trained on other text, or for another target",
        )
    if reference is None:
        found += "; --reference shows whether it should be higher"
    elif len(own) < MIN_PAIRS:
        found += f"; {MIN_PAIRS} prompts or more compare them better"
    return Finding.ok(CHECK, found)


def _length(done: Sequence[Generation]) -> float | None:
    return Totals.of(trace for one in done for trace in one.traces).accepted_length
