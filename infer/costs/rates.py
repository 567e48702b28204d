"""Acceptance rates learned while decoding: what a drafter's confidence is worth where no calibration was measured.

One decaying rate per source, rank among siblings and range of confidence. What the drafter says itself is the prior, so
a drafter is believed until it was seen to be wrong, and a rate that is no longer observed returns to the prior: then
the drafter is tried again. Only outcomes enter, in the order of decoding, so rates are reproducible.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from draftsmith.infer.contract.draft import ROOT, Draft
from draftsmith.infer.contract.protocols import Verdict
from draftsmith.infer.costs.calibration import rank_start

# Ranges of confidence, of equal width.
BINS = 10
# Decay of a rate per observation.
KEPT = 0.99
# The prior counts like this many observations: a drafter's own word, and a measured curve.
OWN_WORD, MEASURED = 2.0, 16.0
# Per step, a rate that is not observed forgets this share of its observations, divided by the prior's weight. Trying a
# useless drafter again then costs at most this share of plain decoding.
FORGOTTEN = 0.02


@dataclass(slots=True)
class Rate:
    """`hits` of `tries`, both decayed; `seen`: the step in which it was last brought up to date."""

    hits: float = 0.0
    tries: float = 0.0
    seen: int = 0

    def value(self, prior: float, weight: float) -> float:
        return (self.hits + weight * prior) / (self.tries + weight)

    def observe(self, hits: float, tries: float, kept: float) -> None:
        self.hits = kept * self.hits + hits
        self.tries = kept * self.tries + tries

    def forget(self, share: float) -> None:
        self.hits *= 1 - share
        self.tries *= 1 - share


class Rates:
    """The rates of all sources."""

    def __init__(self) -> None:
        self._step = 0
        self._rates: dict[tuple[str, int, int], Rate] = {}

    def next_step(self) -> None:
        self._step += 1

    def corrected(self, source: str, rank: int, confidence: float, measured: float | None) -> float:
        """The probability that a candidate of this confidence is accepted, given that its parent was.

        `measured`: what a calibration says about it, if there is one.
        """
        prior, weight = (confidence, OWN_WORD) if measured is None else (measured, MEASURED)
        rate = self._rates.get(self._key(source, rank, confidence))
        if rate is None:
            return min(prior, 1.0)
        kept = (1 - FORGOTTEN / weight) ** (self._step - rate.seen)
        return min((kept * rate.hits + weight * prior) / (kept * rate.tries + weight), 1.0)

    def observe(self, draft: Draft, verdict: Verdict, measured: Sequence[str] = ()) -> None:
        """Count the trials at every node that was reached; `measured` names the sources that have a calibration.

        Committed token i follows node i - 1 of the path, and what a stop cut off was not up for acceptance.
        """
        for parent, token in zip((ROOT, *verdict.path), verdict.committed):
            for rank, trial in enumerate(draft.trials.get(parent, ())):
                weight = MEASURED if trial.source in measured else OWN_WORD
                self.note(trial.source, rank, trial.confidence, draft.tokens[trial.node] == token, weight)

    def note(self, source: str, rank: int, confidence: float, right: bool, weight: float = OWN_WORD) -> None:
        """Count one candidate. `weight`: of the prior that its probability was corrected with."""
        rate = self._rates.setdefault(self._key(source, rank, confidence), Rate(seen=self._step))
        rate.forget(1 - (1 - FORGOTTEN / weight) ** (self._step - rate.seen))
        rate.seen = self._step
        rate.observe(right, 1.0, KEPT)

    def _key(self, source: str, rank: int, confidence: float) -> tuple[str, int, int]:
        return source, rank_start(rank), min(int(max(confidence, 0.0) * BINS), BINS - 1)
