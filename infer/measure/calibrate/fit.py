"""Calibration: confidence against acceptance along the target's own answers, and what passes cost here.

Half of the prompts are fitted to and the other half tells what that was worth, so that no curve is judged by text that
it has seen. A source with many observations gets an isotonic curve, one with few a logistic one. A drafter whose
candidates come from exits of one model is read in one pass over each answer (calibrate_exits.py), any other is listened
to (calibrate_replay.py); `covered` is known for exits alone. Reading files and printing are the command's.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from draftsmith.infer.contract.protocols import Drafter, LeavesEarly, Target
from draftsmith.infer.contract.row import Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.costs.calibration import (
    RANKS,
    TOP,
    Calibration,
    calibration_path,
    costs_path,
    covered_key,
    ranked_key,
)
from draftsmith.infer.costs.calibrator import Calibrator
from draftsmith.infer.costs.pass_costs import Costs
from draftsmith.infer.files.atomic import write_json
from draftsmith.infer.measure.calibrate.answers import Answered
from draftsmith.infer.measure.calibrate.exits import ExitProbabilities, read_exits
from draftsmith.infer.measure.calibrate.reliability import Observations, expected_calibration_error
from draftsmith.infer.measure.calibrate.replay import listen

# Fewer observations than these, or fewer accepted ones, give no isotonic curve worth the name.
MANY, MANY_ACCEPTED = 400, 20
# Fewer than these give a rank no curve of its own.
SOME = 30

Progress = Callable[[int, int], None]


@dataclass(slots=True)
class Calibrated:
    """What was measured for one drafter. `held_out` are the observations that no curve has seen, per source; `scores`
    what the curves are worth on them."""

    home: str
    calibration: Calibration
    scores: dict[str, dict[str, Any]]
    held_out: dict[str, Observations]
    covered_error: dict[str, float] = field(default_factory=dict)
    costs: Costs | None = None
    cost_error: dict[str, float] = field(default_factory=dict)


def halves(answers: Sequence[Answered], seed: int) -> set[int]:
    """The prompts to fit to: half of them, by lot."""
    numbers = sorted({one.number for one in answers})
    if len(numbers) < 2:
        raise ValueError(
            f"calibration needs prompts to fit to and others to check with, and has {len(numbers)} answered"
        )
    random.Random(seed).shuffle(numbers)
    return set(numbers[: (len(numbers) + 1) // 2])


def home(drafter: Drafter) -> str:
    """What a drafter was made from, by which its calibration is found again: a folder, a Hub name, or its own name."""
    return drafter.origin or drafter.name


def check_homes(drafters: Mapping[str, Drafter], target: Target) -> None:
    """Refuse, before anything is measured, what could not be written or joined afterwards."""
    fingerprint = target.fingerprint()
    for drafter in drafters.values():
        path = calibration_path(home(drafter), fingerprint)
        if path.is_file():
            Calibration.load(path)
        there = next(parent for parent in path.parents if parent.exists())
        if not os.access(there, os.W_OK):
            raise ValueError(f"{there} cannot be written to: the calibration of {home(drafter)} would have no place")


def calibrate(
    drafter: Drafter,
    target: Target,
    answers: Sequence[Answered],
    fit_on: set[int],
    settings: Settings,
    stops: Stops,
    *,
    exits: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> Calibrated:
    """The curves of a drafter that is bound to `target`, fitted to the prompts `fit_on` and judged by the others."""
    readings: dict[int, ExitProbabilities] = {}
    if isinstance(drafter, LeavesEarly):
        sources = _chosen(drafter.exit_sources, exits)
        vocab = min(int(drafter.model.config.get_text_config().vocab_size), target.vocab_size)
        readings = read_exits(drafter.model, list(sources), answers, vocab, progress)
        seen = {source: readings[exit].observations() for exit, source in sources.items()}
    else:
        seen = listen(drafter, target, answers, settings, stops, progress)
    if not seen:
        raise ValueError(f"{drafter.name} proposed nothing along these answers: there is nothing to calibrate")
    curves: dict[str, Calibrator] = {}
    scores, held_out = {}, {}
    for source, observed in seen.items():
        mine_N = np.isin(observed.prompt_N, list(fit_on))
        held_out[source] = observed.where(~mine_N)
        fitted, method = fit_curves(source, observed.where(mine_N))
        curves |= fitted
        scores[source] = score(source, fitted, held_out[source]) | {"method": method, "fitted_to": int(mine_N.sum())}
    covered, errors = cover(readings, fit_on)
    facts = {"prompts": len({one.number for one in answers}), "temperature": settings.temperature,
             "date": datetime.now(UTC).isoformat(timespec="seconds")}  # fmt: skip
    measured = {source: found | facts for source, found in scores.items()}
    calibration = Calibration(target.fingerprint(), curves, covered, measured)
    return Calibrated(home(drafter), calibration, scores, held_out, errors)


def _chosen(sources: Mapping[int, str], exits: Sequence[int] | None) -> dict[int, str]:
    unknown = sorted(set(exits or ()) - set(sources))
    if unknown:
        raise ValueError(f"exit {unknown[0]} is none of the draft's exits {', '.join(map(str, sources))}")
    return {exit: source for exit, source in sources.items() if exits is None or exit in exits}


def fit_curves(source: str, seen: Observations) -> tuple[dict[str, Calibrator], str]:
    """The curve of a source, those of its ranks that were seen often, and how the first was fitted."""
    if not len(seen):
        raise ValueError(f"{source} proposed nothing along the answers to fit to: give more --data")
    curves = {source: _fit(seen)}
    for start, end in zip(RANKS, (*RANKS[1:], None)):
        held = seen.where((seen.rank_N >= start) & (seen.rank_N < (end or np.inf)))
        if len(held) >= SOME:
            curves[ranked_key(source, start)] = _fit(held)
    return curves, "isotonic" if _often(seen) else "logistic"


def _fit(seen: Observations) -> Calibrator:
    fit = Calibrator.fit if _often(seen) else Calibrator.logistic
    return fit(seen.raw_N, seen.accepted_N)


def _often(seen: Observations) -> bool:
    return len(seen) >= MANY and int(seen.accepted_N.sum()) >= MANY_ACCEPTED


def calibrated(source: str, curves: Mapping[str, Calibrator], seen: Observations) -> np.ndarray:
    """[N] what the curves make of each confidence at its rank."""
    made_N = np.empty(len(seen))
    known = Calibration("", curves)
    for rank in np.unique(seen.rank_N).tolist():
        held_N = seen.rank_N == rank
        made_N[held_N] = known.of(source, rank).many(seen.raw_N[held_N].tolist())
    return made_N


def score(source: str, curves: Mapping[str, Calibrator], seen: Observations) -> dict[str, Any]:
    """Calibration errors: raw, with one curve for all ranks, and with each rank's own. Of all candidates, and of each
    node's likeliest (`first`)."""
    found: dict[str, Any] = {"observations": len(seen)}
    for prefix, held in (("", seen), ("first_", seen.where(seen.rank_N == 0))):
        if len(held):
            ways = {
                "ece_before": held.raw_N,
                "ece_one_curve": np.array(curves[source].many(held.raw_N.tolist())),
                "ece_after": calibrated(source, curves, held),
            }
            found[f"{prefix}accepted"] = float(held.accepted_N.mean())
            for name, said_N in ways.items():
                found[prefix + name] = expected_calibration_error(said_N, held.accepted_N)
    return found


def cover(
    readings: Mapping[int, ExitProbabilities], fit_on: set[int]
) -> tuple[dict[str, Calibrator], dict[str, float]]:
    """For exits e <= d and every k: the curve from e's likeliest token to the top k of d, and its error held out. What
    is asked of them is their differences, so all curves of an exit share their bins."""
    curves, errors = {}, {}
    for exit, reading in readings.items():
        mine_N = np.isin(reading.prompt_N, list(fit_on))
        raw_N = reading.probs_NK[:, 0]
        for deeper in (other for other in readings if other >= exit):
            for top in TOP:
                key, hit_N = covered_key(exit, deeper, top), readings[deeper].covers(top)
                curves[key] = Calibrator.binned(raw_N[mine_N], hit_N[mine_N])
                if not mine_N.all():
                    after_N = np.array(curves[key].many(raw_N[~mine_N].tolist()))
                    errors[key] = expected_calibration_error(after_N, hit_N[~mine_N])
    return curves, errors


def save(found: Mapping[str, Calibrated], target: Target) -> dict[str, dict[str, str]]:
    """Write what was measured to its places, beside what was known before; returns the files per label. Drafters that
    were made from one folder share its files."""
    files: dict[str, dict[str, str]] = {}
    costs: dict[str, Costs] = {}
    for label, one in found.items():
        path = calibration_path(one.home, one.calibration.target)
        before = Calibration.load(path) if path.is_file() else one.calibration
        known = before.target == one.calibration.target
        (before.joined(one.calibration) if known else one.calibration).save(path)
        files[label] = {"calibration": str(path)}
        if one.costs is not None:
            here = costs.get(one.home, one.costs)
            costs[one.home] = replace(one.costs, passes={**here.passes, **one.costs.passes})
            beside = costs_path(one.home, target)
            write_json(beside, costs[one.home].to_json())
            files[label]["costs"] = str(beside)
    return files


def plot_names(found: Mapping[str, Calibrated]) -> dict[tuple[str, str], Path]:
    """(label, source) -> the file name of its reliability plot."""
    return {
        (label, source): Path(f"reliability-{label}-{source}.png".replace(":", "-").replace("/", "-"))
        for label, one in found.items()
        for source in one.scores
    }
