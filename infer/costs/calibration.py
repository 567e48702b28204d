"""Calibrations, per draft, target and temperature: from a draft's raw confidence to a probability of acceptance.

A candidate that a greedy target takes for certain is drawn only sometimes at temperature 1, so the curves belong to a
band of temperatures. Above 0 they also belong to how candidates are found: those that share the noise of the target's
draws (infer/drafters/coupled.py) have their own confidence, and never use a curve of likeliest tokens, or the reverse.

A draft's calibrations lie in its folder, DRAFT/calibration/TARGET.json, one file per target with all bands that were
measured. Measured costs belong to a machine and lie in the user's cache, and so does everything about drafts that are
not local folders. `draftsmith calibrate` writes both (measuring: infer/measure/calibrate); the policy looks for them
(infer/costs/policy.py).
"""

from __future__ import annotations

import hashlib
import logging
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from draftsmith.infer.contract.protocols import Target, ranks_of
from draftsmith.infer.costs.calibrator import Calibrator
from draftsmith.infer.costs.identity import TargetIdentity, machine, machine_text, same_machine
from draftsmith.infer.costs.pass_costs import WRITTEN_BY, Costs
from draftsmith.infer.files.atomic import load_versioned, write_json
from draftsmith.infer.files.locations import cache_folder

log = logging.getLogger(__name__)

# 2: by band of temperatures.
FORMAT = 2
# The numbers of likeliest tokens that `covered` has curves for.
TOP = (1, 2, 4, 8)
# The ranks at which a new curve begins: a node's likeliest candidate is accepted more often than its second one at the
# same confidence.
RANKS = (0, 1, 2, 4)
# The upper ends of the bands above 0. Inside one, a curve measured at one temperature errs by at most 0.05 at another
# (expected calibration error; LOG.md has the table).
BAND_ENDS = (0.3, 0.6, 0.85, 1.1)
GREEDY = "greedy"


def band_of(temperature: float, coupled: bool = False) -> str:
    """The band of a temperature: `greedy`, `(0, 0.3]`, ..., `(1.1, ...)`; of coupled candidates, `(0, 0.3] coupled` and
    so on."""
    if temperature == 0:
        return GREEDY
    after = " coupled" if coupled else ""
    ends = (0, *BAND_ENDS)
    for low, high in zip(ends, BAND_ENDS):
        if temperature <= high:
            return f"({low:g}, {high:g}]{after}"
    return f"({BAND_ENDS[-1]:g}, ...){after}"


def rank_start(rank: int) -> int:
    """The first of the ranks that share a curve with `rank` (0: the likeliest)."""
    return RANKS[bisect_right(RANKS, rank) - 1]


def ranked_key(source: str, rank: int) -> str:
    """The name of the curve for a source's candidates at `rank`: `small#1`, `small#2`, ..."""
    return f"{source}#{rank_start(rank) + 1}"


def covered_key(exit: int, deeper: int, top: int) -> str:
    return f"{exit}>{deeper}@{top}"


@dataclass(frozen=True, slots=True)
class Calibration:
    """One band's curves. `target`: the target's fingerprint; `temperature`: at which they were measured; `coupled`: of
    candidates that share the noise of the target's draws.

    `curves[source]` maps a candidate's raw confidence to the probability that it is accepted, given that its parent
    was; `curves["source#1"]` does so for each node's likeliest candidate, and so on (`of` picks the right one).
    `covered["e>d@k"]` maps the raw probability of exit e's likeliest token to the probability that the target's next
    token is among the k likeliest of exit d. `measured` holds, per source, facts about the measurement.
    """

    target: str
    curves: Mapping[str, Calibrator]
    covered: Mapping[str, Calibrator] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)
    temperature: float = 0.0
    coupled: bool = False

    @property
    def band(self) -> str:
        return band_of(self.temperature, self.coupled)

    @property
    def first_accepted(self) -> float | None:
        """How often the best candidate was accepted, of the source where that was most often; None if not measured."""
        shares = [one["first_accepted"] for one in self.measured.values() if "first_accepted" in one]
        return max(shares, default=None)

    def of(self, source: str, rank: int) -> Calibrator:
        """The curve for a source's candidates at `rank`, or the one for all ranks if that rank has none."""
        own = self.curves.get(ranked_key(source, rank)) or self.curves.get(source)
        if own is None:
            known = [name for name in self.curves if "#" not in name]
            raise ValueError(f"{source!r} was not calibrated, only {', '.join(known)}: calibrate again")
        return own

    def probabilities(self, source: str, raw: Sequence[float]) -> list[float]:
        """For one node's candidates, likeliest first."""
        return [self.of(source, rank)(one) for rank, one in enumerate(raw)]

    def joined(self, newer: Calibration) -> Calibration:
        """Both calibrations of one target and band in one; where both have a source, `newer` wins."""
        assert (self.target, self.band) == (newer.target, newer.band)
        kept = {name: curve for name, curve in self.curves.items() if name.partition("#")[0] not in newer.curves}
        return Calibration(
            self.target,
            {**kept, **newer.curves},
            {**self.covered, **newer.covered},
            {**self.measured, **newer.measured},
            newer.temperature,
            newer.coupled,
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "temperature": self.temperature,
            "coupled": self.coupled,
            "curves": {name: curve.to_json() for name, curve in self.curves.items()},
            "covered": {name: curve.to_json() for name, curve in self.covered.items()},
            "measured": dict(self.measured),
        }

    @classmethod
    def from_json(cls, target: str, value: Mapping[str, Any]) -> Calibration:
        curves, covered = (
            {name: Calibrator.from_json(one) for name, one in value[part].items()} for part in ("curves", "covered")
        )
        coupled = bool(value.get("coupled", False))  # older files have curves of likeliest tokens only
        return cls(target, curves, covered, dict(value["measured"]), float(value["temperature"]), coupled)


class BandedCalibration:
    """A file's content: the calibrations of one draft and target, by band."""

    def __init__(self, target: str, bands: Mapping[str, Calibration]) -> None:
        self.target = target
        self.bands = dict(bands)
        self._said: set[tuple[str, str]] = set()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BandedCalibration) and (self.target, self.bands) == (other.target, other.bands)

    @classmethod
    def of(cls, *calibrations: Calibration) -> BandedCalibration:
        """Of one target."""
        return cls(calibrations[0].target, {one.band: one for one in calibrations})

    def at(self, temperature: float, coupled: bool = False) -> Calibration | None:
        """The calibration of this temperature's band, of coupled candidates or of the likeliest tokens. If it was not
        measured, the one measured at the nearest temperature, which is logged once; None if there is none."""
        coupled = coupled and temperature > 0
        band = band_of(temperature, coupled)
        if band in self.bands or not self.bands:
            return self.bands.get(band)
        alike = [one for one in self.bands.values() if one.coupled == coupled]
        nearest = min(alike, key=lambda one: (abs(one.temperature - temperature), one.temperature), default=None)
        found = "" if nearest is None else nearest.band
        if (band, found) not in self._said:
            self._said.add((band, found))
            log.warning(
                "no calibration%s was measured at temperature %s: %s; "
                "`draftsmith calibrate --temperature %g` measures it",
                " of coupled drafts" if coupled else "",
                f"{temperature:g} ({band_of(temperature)})",
                "confidence is used raw" if nearest is None else f"the one measured at {nearest.temperature:g} is used",
                temperature,
            )
        return nearest

    def measured(self, temperature: float, coupled: bool) -> Calibration | None:
        """The calibration of this temperature's own band, if there is one."""
        return self.bands.get(band_of(temperature, coupled and temperature > 0))

    def joined(self, newer: Calibration) -> BandedCalibration:
        """With `newer` in its band; sources that it does not have stay."""
        before = self.bands.get(newer.band)
        return BandedCalibration(
            self.target, {**self.bands, newer.band: before.joined(newer) if before is not None else newer}
        )

    def to_json(self) -> dict[str, Any]:
        bands = {band: one.to_json() for band, one in self.bands.items()}
        return {"format": FORMAT, "kind": "calibration", "target": self.target, "bands": bands}

    def save(self, path: str | Path) -> None:
        write_json(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> BandedCalibration:
        return load_versioned(path, "calibration", FORMAT, cls._from_json, "`draftsmith calibrate`")

    @classmethod
    def _from_json(cls, value: Mapping[str, Any]) -> BandedCalibration:
        target = str(value["target"])
        found = [Calibration.from_json(target, one) for one in value["bands"].values()]
        return cls(target, {one.band: one for one in found})


# Below, `draft` is what the drafter was made from: a folder (of a model or a store), a Hub name, or, if it is made from
# nothing, the drafter's own name.


def calibration_path(draft: str | Path, fingerprint: str) -> Path:
    """The calibration of `draft` for the target with this fingerprint."""
    name = f"{fingerprint[:16]}.json"
    folder = Path(draft).expanduser()
    return folder / "calibration" / name if folder.is_dir() else cache_folder() / "calibration" / _quoted(draft) / name


def costs_path(draft: str | Path, target: Target) -> Path:
    """The costs of `draft` with `target` on this machine. They depend on shapes: the config identifies a draft."""
    folder = Path(draft).expanduser()
    name = _quoted(draft)
    if folder.is_dir():
        config = folder / "config.json"
        identity = config.read_bytes() if config.is_file() else str(folder.resolve()).encode()
        name = f"{_quoted(folder.resolve().name)}-{hashlib.sha256(identity).hexdigest()[:12]}"
    assert target.model is not None
    weight = next(target.model.parameters())
    fingerprint = target.fingerprint()[:16]
    target_name = f"{fingerprint}-{str(weight.dtype).removeprefix('torch.')}"
    target_name += f"-{ranks_of(target)}-ranks" if ranks_of(target) > 1 else ""
    return cache_folder() / "costs" / machine_name(weight.device.type) / f"{target_name}+{name}.json"


def machine_name(device: str) -> str:
    """A file name for what passes run on: the GPU, or the CPU and its number of threads."""
    from draftsmith.infer.files.provenance import hardware

    if device == "cuda":
        import torch

        name = torch.cuda.get_device_name()
    else:
        cpu = hardware()["cpu"]
        name = f"{cpu['model'] or cpu['machine']} {cpu['torch_threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def find_calibration(draft: str | Path, target: Target) -> BandedCalibration | None:
    """The calibration of `draft` for `target`; None if there is none."""
    if target.model is None:
        return None
    fingerprint = target.fingerprint()
    path = calibration_path(draft, fingerprint)
    return _load_for(fingerprint, path) if path.is_file() else None


def find_costs(draft: str | Path, target: Target) -> Costs | None:
    """The measured costs of passes of `draft` and `target` on this machine; None if there are none."""
    if target.model is None:
        return None
    path = costs_path(draft, target)
    return checked_costs(Costs.load(path), target, str(path)) if path.is_file() else None


def given_calibration(
    given: str | Calibration | BandedCalibration, draft: str | Path, target: Target
) -> BandedCalibration | None:
    """Resolve what the user gave as `calibration`: "auto" (look it up), "none", or a file."""
    if isinstance(given, Calibration):
        return BandedCalibration.of(given)
    if isinstance(given, BandedCalibration):
        return given
    if given in ("auto", "none"):
        return find_calibration(draft, target) if given == "auto" and draft else None
    return BandedCalibration.load(given) if target.model is None else _load_for(target.fingerprint(), given)


def given_costs(given: str | Costs, draft: str | Path, target: Target) -> Costs | None:
    """Resolve what the user gave as `costs`: "auto" (look them up), "none", or a file."""
    if isinstance(given, Costs):
        return checked_costs(given, target, "the given costs")
    if given in ("auto", "none"):
        return find_costs(draft, target) if given == "auto" and draft else None
    return checked_costs(Costs.load(given), target, str(given))


def checked_costs(costs: Costs, target: Target, what: str) -> Costs:
    """`costs`, unless they name another target or machine than the one that decodes. Recorded answers have neither."""
    if target.model is None or costs.target is None:
        return costs
    if not costs.target.is_same(TargetIdentity.of("", target)):
        raise ValueError(f"{what} holds the costs of another target, {costs.describe()}: run {WRITTEN_BY} again")
    weight = next(target.model.parameters())
    here = machine(weight.device, weight.dtype, ranks_of(target))
    if costs.machine.get("modelled"):
        raise ValueError(f"{what} holds modelled costs, and drafts are sized by measured ones: run {WRITTEN_BY}")
    if not same_machine(costs.machine, here):
        raise ValueError(
            f"{what} was measured on {machine_text(costs.machine)}, and this is {machine_text(here)}: "
            f"run {WRITTEN_BY} again"
        )
    return costs


def _load_for(fingerprint: str, path: str | Path) -> BandedCalibration:
    found = BandedCalibration.load(path)
    if found.target != fingerprint:
        raise ValueError(f"{path} was measured for another target: calibrate again")
    return found


def _quoted(name: str | Path) -> str:
    return quote(str(name), safe="=@ ")
