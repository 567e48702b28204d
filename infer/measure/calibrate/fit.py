"""Calibration curves: fitted to half of the prompts, scored on the other half, and saved.

A source with many observations gets an isotonic curve, one with few a logistic one. `covered` curves exist only for
drafters whose candidates come from exits of one model.
"""

from __future__ import annotations

import json
import logging
import os
import random
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from draftsmith.infer.contract.protocols import Drafter, DraftsOutright, LeavesEarly, NamesDepths, Target
from draftsmith.infer.contract.row import Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.costs.calibration import (
    FORMAT,
    RANKS,
    TOP,
    BandedCalibration,
    Calibration,
    calibration_path,
    costs_path,
    covered_key,
    ranked_key,
)
from draftsmith.infer.costs.calibrator import Calibrator
from draftsmith.infer.costs.pass_costs import Costs
from draftsmith.infer.drafters.coupled import Race
from draftsmith.infer.drafters.mixed.mixed import Mixed
from draftsmith.infer.files.atomic import write_json
from draftsmith.infer.measure.calibrate.answers import Answered
from draftsmith.infer.measure.calibrate.observations import (
    ExitProbabilities,
    Observations,
    Progress,
    listen,
    read_exits,
)
from draftsmith.infer.measure.calibrate.reliability import expected_calibration_error

log = logging.getLogger(__name__)

# The least observations, and accepted ones among them, for an isotonic curve.
MANY, MANY_ACCEPTED = 400, 20
# The least observations for a rank's own curve.
SOME = 30


@dataclass(slots=True)
class Calibrated:
    """What was measured for one drafter. By source, `held_out` are the observations that no curve was fitted to, and
    `scores` the calibration errors on them."""

    home: str
    calibration: Calibration
    scores: dict[str, dict[str, Any]]
    held_out: dict[str, Observations]
    covered_error: dict[str, float] = field(default_factory=dict)
    costs: Costs | None = None
    cost_error: dict[str, float] = field(default_factory=dict)


def halves(answers: Sequence[Answered], seed: int) -> set[int]:
    """The prompts to fit to: a random half."""
    numbers = sorted({one.number for one in answers})
    if len(numbers) < 2:
        raise ValueError(
            f"calibration needs prompts to fit to and others to check with, but has {len(numbers)} answered"
        )
    random.Random(seed).shuffle(numbers)
    return set(numbers[: (len(numbers) + 1) // 2])


def home(drafter: Drafter) -> str:
    """What a drafter's calibration is found by: the folder or Hub name it was made from, or its own name."""
    return drafter.origin or drafter.name


def check_homes(drafters: Mapping[str, Drafter], target: Target) -> None:
    """Raise, before anything is measured, if results could not be saved or merged with earlier ones."""
    fingerprint = target.fingerprint()
    for label, drafter in drafters.items():
        if isinstance(drafter, Mixed):
            raise ValueError(
                f"{label} is a mix, which has no calibration of its own: calibrate its drafters ({drafter.name}), each "
                "by itself"
            )
        path = calibration_path(home(drafter), fingerprint)
        _earlier(path)
        there = next(parent for parent in path.parents if parent.exists())
        if not os.access(there, os.W_OK):
            raise ValueError(f"cannot save the calibration of {home(drafter)}: {there} is not writable")


def _earlier(path: Path) -> BandedCalibration | None:
    """The calibrations at `path` that new ones are joined with; None if there are none. Those of the format without
    temperature bands are measured again and replaced."""
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError):
        value = None
    if isinstance(value, dict) and (value.get("kind"), value.get("format")) == ("calibration", FORMAT - 1):
        log.warning("%s has format %d: its curves belong to no temperature and will be replaced", path, FORMAT - 1)
        return None
    return BandedCalibration.load(path)


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
    """The curves of a drafter that is bound to `target`, fitted to the prompts `fit_on` and scored on the others."""
    readings: dict[int, ExitProbabilities] = {}
    coupled = isinstance(drafter, DraftsOutright) and drafter.may_couple and not settings.greedy
    if isinstance(drafter, LeavesEarly):
        sources = _chosen(drafter.exit_sources, exits)
        vocab = min(int(drafter.model.config.get_text_config().vocab_size), target.vocab_size)
        race = Race.of(target) if coupled else None
        readings = read_exits(drafter.model, list(sources), answers, vocab, progress, race=race, settings=settings)
        seen = {source: readings[exit].observations() for exit, source in sources.items()}
    else:
        with drafter.outright() if isinstance(drafter, DraftsOutright) else nullcontext():
            seen = listen(drafter, target, answers, settings, stops, progress)
    if not seen:
        raise ValueError(f"{drafter.name} proposed nothing along these answers, so there is nothing to calibrate")
    curves: dict[str, Calibrator] = {}
    scores, held_out = {}, {}
    by_depth = drafter.depth_sources if isinstance(drafter, NamesDepths) else ()
    for source, observed in seen.items():
        mine_N = np.isin(observed.prompt_N, list(fit_on))
        if source in by_depth[1:] and not mine_N.any():
            continue
        held_out[source] = observed.where(~mine_N)
        fitted, method = fit_curves(source, observed.where(mine_N))
        curves |= fitted
        scores[source] = score(source, fitted, held_out[source]) | {"method": method, "fitted_to": int(mine_N.sum())}
    curves |= deeper_curves(by_depth, curves)
    covered, errors = cover(readings, fit_on)
    facts = {"prompts": len({one.number for one in answers}), "temperature": settings.temperature,
             "date": datetime.now(UTC).isoformat(timespec="seconds")}  # fmt: skip
    measured = {source: found | facts for source, found in scores.items()}
    calibration = Calibration(target.fingerprint(), curves, covered, measured, settings.temperature, coupled)
    return Calibrated(home(drafter), calibration, scores, held_out, errors)


def _chosen(sources: Mapping[int, str], exits: Sequence[int] | None) -> dict[int, str]:
    unknown = sorted(set(exits or ()) - set(sources))
    if unknown:
        raise ValueError(f"exit {unknown[0]} is not one of the draft's exits {', '.join(map(str, sources))}")
    return {exit: source for exit, source in sources.items() if exits is None or exit in exits}


def fit_curves(source: str, seen: Observations) -> tuple[dict[str, Calibrator], str]:
    """The curves of a source and of its ranks with enough observations, and how the first was fitted."""
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


def deeper_curves(by_depth: Sequence[str], curves: Mapping[str, Calibrator]) -> dict[str, Calibrator]:
    """For depths that no answer to fit to came to, the curves of the last one that was reached."""
    found: dict[str, Calibrator] = {}
    for above, source in pairwise(by_depth):
        if source not in curves:
            log.warning("no answer to fit to was drafted down to %s: it takes the curves of %s", source, above)
            known = {**curves, **found}
            found |= {
                source + name.removeprefix(above): curve
                for name, curve in known.items()
                if name.partition("#")[0] == above
            }
    return found


def apply_curves(source: str, curves: Mapping[str, Calibrator], seen: Observations) -> np.ndarray:
    """[N] the calibrated confidences, each by the curve of its rank."""
    made_N = np.empty(len(seen))
    known = Calibration("", curves)
    for rank in np.unique(seen.rank_N).tolist():
        held_N = seen.rank_N == rank
        made_N[held_N] = known.of(source, rank).many(seen.raw_N[held_N].tolist())
    return made_N


def score(source: str, curves: Mapping[str, Calibrator], seen: Observations) -> dict[str, Any]:
    """Calibration errors: raw, with one curve for all ranks, and with a curve per rank; of all candidates, and of each
    node's likeliest (`first_`)."""
    found: dict[str, Any] = {"observations": len(seen)}
    for prefix, held in (("", seen), ("first_", seen.where(seen.rank_N == 0))):
        if len(held):
            ways = {
                "ece_before": held.raw_N,
                "ece_one_curve": np.array(curves[source].many(held.raw_N.tolist())),
                "ece_after": apply_curves(source, curves, held),
            }
            found[f"{prefix}accepted"] = float(held.accepted_N.mean())
            for name, confidence_N in ways.items():
                found[prefix + name] = expected_calibration_error(confidence_N, held.accepted_N)
    return found


def cover(
    readings: Mapping[int, ExitProbabilities], fit_on: set[int]
) -> tuple[dict[str, Calibrator], dict[str, float]]:
    """For exits e <= d and every k: the curve from e's top probability to the probability that d's top k hold the
    token, and its held-out error. All curves of an exit share their bins, because only their differences are used."""
    curves, errors = {}, {}
    for exit, reading in readings.items():
        mine_N = np.isin(reading.prompt_N, list(fit_on))
        raw_N = reading.top_N
        for deeper in (other for other in readings if other >= exit):
            for top in TOP:
                key, hit_N = covered_key(exit, deeper, top), readings[deeper].covers(top)
                curves[key] = Calibrator.binned(raw_N[mine_N], hit_N[mine_N])
                if not mine_N.all():
                    after_N = np.array(curves[key].many(raw_N[~mine_N].tolist()))
                    errors[key] = expected_calibration_error(after_N, hit_N[~mine_N])
    return curves, errors


def save(found: Mapping[str, Calibrated], target: Target) -> dict[str, dict[str, str]]:
    """Save curves and costs, merged with earlier ones, and return the files by label. Drafters made from one folder
    share its files."""
    files: dict[str, dict[str, str]] = {}
    costs: dict[str, Costs] = {}
    for label, one in found.items():
        path = calibration_path(one.home, one.calibration.target)
        before = _earlier(path)
        if before is None or before.target != one.calibration.target:
            before = BandedCalibration.of(one.calibration)
        before.joined(one.calibration).save(path)
        files[label] = {"calibration": str(path)}
        if one.costs is not None:
            here = costs.get(one.home, one.costs)
            costs[one.home] = replace(one.costs, passes={**here.passes, **one.costs.passes})
            beside = costs_path(one.home, target)
            write_json(beside, costs[one.home].to_json())
            files[label]["costs"] = str(beside)
    return files


def plot_names(found: Mapping[str, Calibrated]) -> dict[tuple[str, str], Path]:
    """The file name of each reliability plot, by (label, source)."""
    return {
        (label, source): Path(f"reliability-{label}-{source}.png".replace(":", "-").replace("/", "-"))
        for label, one in found.items()
        for source in one.scores
    }
