"""What a check found: its verdict, and how to mend what is wrong."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

Judged = Literal["ok", "wrong", "cannot tell"]


@dataclass(frozen=True, slots=True)
class Finding:
    """`found`: what was seen; `mend`: what to do, where something is wrong."""

    check: str
    verdict: Judged
    found: str
    mend: str = ""

    @classmethod
    def ok(cls, check: str, found: str) -> Finding:
        return cls(check, "ok", found)

    @classmethod
    def wrong(cls, check: str, found: str, mend: str) -> Finding:
        return cls(check, "wrong", found, mend)

    @classmethod
    def unknown(cls, check: str, found: str, mend: str = "") -> Finding:
        return cls(check, "cannot tell", found, mend)


def summary(findings: Sequence[Finding]) -> str:
    """As in `2 of 11 checks found something wrong: rotary, accepted_length`."""
    wrong = [one.check for one in findings if one.verdict == "wrong"]
    unknown = [one.check for one in findings if one.verdict == "cannot tell"]
    text = f"{len(wrong)} of {len(findings)} checks found something wrong: {', '.join(wrong)}"
    if not wrong:
        text = f"nothing wrong was found in {len(findings)} checks"
    return text + (f"; it cannot tell about {', '.join(unknown)}" if unknown else "")


def report(findings: Sequence[Finding], facts: dict[str, Any]) -> dict[str, Any]:
    """The JSON object: `facts`, and the findings in order."""
    wrong = [one.check for one in findings if one.verdict == "wrong"]
    return {**facts, "wrong": wrong, "findings": [asdict(one) for one in findings]}


def lines(findings: Iterable[Finding], width: int) -> list[str]:
    """One entry per check, folded to `width`; below it the mend of what is wrong."""
    found = list(findings)
    head = max((len(one.check) for one in found), default=0) + 15
    shown = []
    for one in found:
        shown += _folded(f"{one.verdict:<11}  {one.check:<{head - 15}}  ", one.found, head, width)
        shown += _folded(" " * head, f"mend: {one.mend}", head, width) if one.mend else []
    return shown


def _folded(start: str, text: str, indent: int, width: int) -> list[str]:
    return textwrap.wrap(
        text, max(width, indent + 30), initial_indent=start, subsequent_indent=" " * indent, break_long_words=False,
        break_on_hyphens=False,
    )  # fmt: skip
