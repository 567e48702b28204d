"""What was measured once on this machine about a model's shapes, in the cache folder: so that the next run has it for
free, and decodes in the same way."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch

from draftsmith.infer.costs.calibration import machine_name
from draftsmith.infer.files.atomic import write_json
from draftsmith.infer.files.locations import cache_folder

_log = logging.getLogger(__name__)


def choice_path(what: str, *shapes: Any) -> Path:
    """Where a choice about a model of these `shapes` is kept; it depends on the machine and torch's kernels too."""
    key = hashlib.sha256(json.dumps([torch.__version__, *shapes], sort_keys=True, default=str).encode()).hexdigest()
    return cache_folder() / what / machine_name("cpu") / f"{key[:16]}.json"


def remembered(path: Path) -> dict[str, Any]:
    """Empty if nothing is there, or nothing that can be read."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def remember(path: Path, choice: dict[str, Any]) -> None:
    try:
        write_json(path, choice)
    except OSError as problem:
        _log.warning("what was measured could not be kept in %s: %s", path, problem.strerror or problem)
