"""Inputs that commands share: `--drafters`, and the questions in `--data`."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from draftsmith.infer.drafters.registry import load_drafters, parse_spec, short_names, split_outside_brackets
from draftsmith.infer.text.records import OnBad, ReadReport, Record, read_records

PLAIN = "plain"


def parse_drafters(specs: str, defaults: Mapping[str, dict[str, Any]] | None = None) -> dict[str, Any]:
    """Label -> drafter, in the order of `specs`; `defaults` maps short names to arguments that `specs` can override."""
    registry = short_names()
    for name, init_args in (defaults or {}).items():
        registry[name] = {**registry[name], "init_args": {**registry[name].get("init_args", {}), **init_args}}
    drafters = load_drafters(specs, registry)
    if PLAIN in drafters:
        raise ValueError(f"{PLAIN!r} is the name of decoding without a drafter; give yours another label")
    return drafters


def specs_by_label(specs: str, drafters: Mapping[str, Any]) -> dict[str, str]:
    """Label -> what the user wrote for it; the label itself where one word gave several drafters."""
    given = split_outside_brackets(specs)
    return dict(zip(drafters, given if len(given) == len(drafters) else drafters))


def one_drafter(specs: str, defaults: Mapping[str, dict[str, Any]] | None = None) -> Any:
    """The one drafter of `specs`; for an empty text one that drafts nothing. `defaults`: as of `parse_drafters`."""
    from draftsmith.infer.drafters.controls import Empty

    drafters = parse_drafters(specs, defaults)
    if len(drafters) > 1:
        raise ValueError(f"--drafters takes one drafter here, not {len(drafters)}: {', '.join(drafters)}")
    return next(iter(drafters.values()), Empty())


def leaves_open(specs: str, name: str) -> bool:
    """Whether one of `specs` is `name` without an argument, and so takes its default."""
    found = [parse_spec(text) for text in split_outside_brackets(specs)]
    return any(spec.name == name and not spec.argument for spec in found)


def read_questions(data: list[str], limit: int | None = None, on_bad: OnBad = "raise") -> list[Record]:
    """Every record with a question, in order; standard error reports rows that were skipped."""
    report = ReadReport()
    records = list(read_records(data, limit=limit, need="questions", on_bad=on_bad, report=report))
    if report.used < report.rows:
        print(*report.lines(), sep="\n", file=sys.stderr)
    return records
