"""The drafters behind `--drafters pld,rest:STORE,small:MODEL,more.yaml`: packaged short names, handed to the loader.

Which short names there are is data (drafters.yaml); how they become objects is draftsmith.infer.loading.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

import yaml

from draftsmith.infer.loading import load_drafters

PLAIN = "plain"


def short_names() -> dict[str, dict[str, Any]]:
    """Short name -> {class_path, argument, init_args}."""
    text = files("draftsmith.recipes").joinpath("drafters.yaml").read_text(encoding="utf-8")
    registry: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return registry


def parse_drafters(specs: str) -> dict[str, Any]:
    """Label -> drafter, in the order of `specs`; nothing for an empty text."""
    drafters = load_drafters(specs, short_names())
    if PLAIN in drafters:
        raise ValueError(f"{PLAIN!r} is the name of decoding without a drafter; give yours another label")
    return drafters
