"""Calibrations: what a draft's raw confidence is worth as a probability of acceptance, per draft and target.

A draft has one file per target, in its own folder: DRAFT/calibration/TARGET.json, so that one draft serves several
targets, each with its own curves. Costs belong to a machine and lie in the user's cache, as does everything of drafts
that are no local folder. `draftsmith calibrate` writes both; drafters look for them when they are bound, and say so
themselves when they find none.

How curves are measured is not known here (measure/calibrate.py).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from draftsmith.infer.contract.protocols import Target
from draftsmith.infer.costs.calibrator import Calibrator
from draftsmith.infer.costs.pass_costs import Costs
from draftsmith.infer.files.atomic import write_json
from draftsmith.infer.files.cache_folder import cache_folder

FORMAT = 1
# The branchings that `covered` knows.
TOP = (1, 2, 4, 8)
# Where a new curve begins: the likeliest of a node's candidates is accepted more often than a second one that was
# proposed with the same confidence.
RANKS = (0, 1, 2, 4)


def ranked_key(source: str, rank: int) -> str:
    """The curve of a source's candidates at `rank` among their siblings, 0 the likeliest: `small#1`, `small#2`, ..."""
    return f"{source}#{max(start for start in RANKS if start <= rank) + 1}"


def covered_key(exit: int, deeper: int, top: int) -> str:
    return f"{exit}>{deeper}@{top}"


@dataclass(frozen=True, slots=True)
class Calibration:
    """`target`: the target's fingerprint.

    `curves[source]` maps a candidate's raw confidence to the probability that it is accepted, given that its parent
    was; `curves["source#1"]` does so for each node's likeliest candidate alone, and so on (`of` finds the right one).
    `covered["e>d@k"]` maps the raw probability of exit e's likeliest token to the probability that the target's
    next token is among the k likeliest of exit d. `measured` tells per source what its curve stands on.
    """

    target: str
    curves: Mapping[str, Calibrator]
    covered: Mapping[str, Calibrator] = field(default_factory=dict)
    measured: Mapping[str, Any] = field(default_factory=dict)

    def of(self, source: str, rank: int) -> Calibrator:
        """The curve for a source's candidate at `rank` among its siblings; that of all ranks where there is none."""
        own = self.curves.get(ranked_key(source, rank)) or self.curves.get(source)
        if own is None:
            known = [name for name in self.curves if "#" not in name]
            raise ValueError(f"{source!r} was not calibrated, only {', '.join(known)}: calibrate again")
        return own

    def probabilities(self, source: str, raw: Sequence[float]) -> list[float]:
        """Of one node's candidates, likeliest first."""
        return [self.of(source, rank)(one) for rank, one in enumerate(raw)]

    def joined(self, newer: Calibration) -> Calibration:
        """What two calibrations for one target know, the newer one where both do."""
        assert self.target == newer.target
        kept = {name: curve for name, curve in self.curves.items() if name.partition("#")[0] not in newer.curves}
        return Calibration(
            self.target,
            {**kept, **newer.curves},
            {**self.covered, **newer.covered},
            {**self.measured, **newer.measured},
        )

    def to_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "kind": "calibration",
            "target": self.target,
            "curves": {name: curve.to_json() for name, curve in self.curves.items()},
            "covered": {name: curve.to_json() for name, curve in self.covered.items()},
            "measured": dict(self.measured),
        }

    @classmethod
    def from_json(cls, said: Any, where: str) -> Calibration:
        if not isinstance(said, dict) or said.get("kind") != "calibration":
            raise ValueError(f"{where} holds no calibration: `draftsmith calibrate` writes one")
        if said.get("format") != FORMAT:
            raise ValueError(f"{where} has format {said.get('format')}, and this version reads {FORMAT}")
        try:
            curves, covered = (
                {name: Calibrator.from_json(one) for name, one in said[part].items()} for part in ("curves", "covered")
            )
            return cls(str(said["target"]), curves, covered, dict(said["measured"]))
        except (KeyError, TypeError, AttributeError, ValueError) as problem:
            raise ValueError(f"{where} is not a whole calibration: {problem}") from None

    def save(self, path: str | Path) -> None:
        write_json(Path(path), self.to_json())

    @classmethod
    def load(cls, path: str | Path) -> Calibration:
        try:
            return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")), str(path))
        except FileNotFoundError:
            raise ValueError(f"{path} does not exist") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as problem:
            raise ValueError(f"{path} is not JSON: {problem}") from None


# Where they lie. `draft` is what the drafter was made from: a folder (a model, a store), a Hub name, or, for a drafter
# that is made from nothing, its own name.


def calibration_path(draft: str | Path, fingerprint: str) -> Path:
    """The calibration of `draft` for the target with this fingerprint."""
    name = f"{fingerprint[:16]}.json"
    folder = Path(draft).expanduser()
    return folder / "calibration" / name if folder.is_dir() else cache_folder() / "calibration" / _quoted(draft) / name


def costs_path(draft: str | Path, target: Target) -> Path:
    """The costs of `draft` with `target` on this machine. They follow shapes, so a draft is known by its config."""
    folder = Path(draft).expanduser()
    name = _quoted(draft)
    if folder.is_dir():
        config = folder / "config.json"
        known_by = config.read_bytes() if config.is_file() else str(folder.resolve()).encode()
        name = f"{_quoted(folder.resolve().name)}-{hashlib.sha256(known_by).hexdigest()[:12]}"
    assert target.model is not None
    weight = next(target.model.parameters())
    fingerprint = target.fingerprint()[:16]
    target_name = f"{fingerprint}-{str(weight.dtype).removeprefix('torch.')}"
    return cache_folder() / "costs" / machine_name(weight.device.type) / f"{target_name}+{name}.json"


def machine_name(device: str) -> str:
    """What passes run on, in a word: the GPU, or the CPU and how many threads are used of it."""
    from draftsmith.infer.files.provenance import hardware

    found = hardware()
    if device == "cuda":
        import torch

        told = torch.cuda.get_device_name()
    else:
        told = f"{found['cpu']['model'] or found['cpu']['machine']} {found['cpu']['torch_threads']} threads"
    return re.sub(r"[^a-z0-9]+", "-", told.lower()).strip("-")


def find_calibration(draft: str | Path, target: Target) -> Calibration | None:
    """The calibration of `draft` for `target`; None where nobody has measured one."""
    if target.model is None:
        return None
    fingerprint = target.fingerprint()
    path = calibration_path(draft, fingerprint)
    if not path.is_file():
        return None
    found = Calibration.load(path)
    if found.target != fingerprint:
        raise ValueError(f"{path} was measured for another target: calibrate again")
    return found


def find_costs(draft: str | Path, target: Target) -> Costs | None:
    """What passes of `draft` and `target` cost on this machine; None where nobody has measured it."""
    if target.model is None:
        return None
    path = costs_path(draft, target)
    return Costs.load(path) if path.is_file() else None


def given_calibration(given: str | Calibration, draft: str | Path, target: Target) -> Calibration | None:
    """What a drafter's argument `calibration` means: auto (what is found, if anything), none, or a file."""
    if given in ("auto", "none"):
        return find_calibration(draft, target) if given == "auto" and draft else None
    if isinstance(given, Calibration):
        return given
    found = Calibration.load(given)
    if target.model is not None and found.target != target.fingerprint():
        raise ValueError(f"{given} was measured for another target: calibrate again")
    return found


def given_costs(given: str | Costs, draft: str | Path, target: Target) -> Costs | None:
    """What a drafter's argument `costs` means, likewise."""
    if given in ("auto", "none"):
        return find_costs(draft, target) if given == "auto" and draft else None
    return given if isinstance(given, Costs) else Costs.load(given)


def _quoted(name: str | Path) -> str:
    return quote(str(name), safe="=@ ")
