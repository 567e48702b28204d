"""The drafters behind `--drafters pld,rest:STORE,small:MODEL,more.yaml`: packaged short names, handed to the loader.

Which short names there are is data (drafters.yaml); how they become objects is draftsmith.infer.drafters.registry.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from typing import Any

import yaml

from draftsmith.infer.drafters.registry import load_drafters, parse_spec, split_outside_brackets

PLAIN = "plain"


def short_names() -> dict[str, dict[str, Any]]:
    """Short name -> {class_path, argument, init_args}."""
    text = files("draftsmith.recipes").joinpath("drafters.yaml").read_text(encoding="utf-8")
    registry: dict[str, dict[str, Any]] = yaml.safe_load(text)
    return registry


def parse_drafters(specs: str, defaults: Mapping[str, dict[str, Any]] | None = None) -> dict[str, Any]:
    """Label -> drafter, in the order of `specs`; nothing for an empty text.

    `defaults`: short name -> arguments that it has unless the text gives them.
    """
    registry = short_names()
    for name, init_args in (defaults or {}).items():
        registry[name] = {**registry[name], "init_args": {**registry[name].get("init_args", {}), **init_args}}
    drafters = load_drafters(specs, registry)
    if PLAIN in drafters:
        raise ValueError(f"{PLAIN!r} is the name of decoding without a drafter; give yours another label")
    return drafters


def leaves_open(specs: str, name: str) -> bool:
    """Whether one of `specs` is `name` with nothing behind its colon, so that its default argument counts."""
    found = [parse_spec(text) for text in split_outside_brackets(specs)]
    return any(spec.name == name and not spec.argument for spec in found)
