"""Values of a row, whatever its format: text, token ids, a time, and the envelope that batch files put around it.

`Unusable` says why a row cannot be used, in words that can be counted. Which fields make which format is not known here
(record_formats.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

TIME_FIELDS = ("created", "created_at", "timestamp", "tstamp", "time", "ts")
# Numbers below this are durations, not dates (it is March 1973); numbers above the second one are milliseconds.
FIRST_DATE, LAST_DATE_IN_SECONDS = 1e8, 1e11


class Unusable(Exception):
    """A row that is well-formed and yet holds nothing to be used: `reason` is counted, `detail` shown."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


def body_of(value: Any) -> Mapping[str, Any]:
    """A request or a response, out of the envelope that batch files put around it."""
    if not isinstance(value, Mapping):
        return {}
    return value["body"] if isinstance(value.get("body"), Mapping) else value


def first_choice(row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    choices = row.get("choices")
    return choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], Mapping) else None


def text_of(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise Unusable(f"{name} is not text", type(value).__name__)
    return value


def texts_of(value: Any, name: str) -> list[str]:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise Unusable(f"{name} is not a list of texts")
    return list(value)


def ids_of(row: Mapping[str, Any], name: str) -> list[int]:
    value = row.get(name)
    if value is None:
        return []
    if not isinstance(value, list) or not all(type(token) is int and token >= 0 for token in value):
        raise Unusable(f"{name} is not a list of token ids")
    return list(value)


def ids_by_turn(row: Mapping[str, Any]) -> dict[str, list[list[int]]]:
    """The ids of each answered turn and of what it was given: both, for as many turns, or neither."""
    found: dict[str, list[list[int]]] = {}
    for name in ("token_ids_by_turn", "prompt_token_ids_by_turn"):
        if (turns := row.get(name)) is not None:
            if not isinstance(turns, list):
                raise Unusable(f"{name} is not a list of turns")
            found[name] = [ids_of({name: ids}, name) for ids in turns]
    if found and (len(found) < 2 or len({len(turns) for turns in found.values()}) > 1):
        raise Unusable("token_ids_by_turn and prompt_token_ids_by_turn are not for the same turns")
    return found


def time_of(row: Mapping[str, Any]) -> float | None:
    """The first date in the row, its response or its request, in seconds since 1970."""
    for place in (row, body_of(row.get("response")), body_of(row.get("request"))):
        for name in TIME_FIELDS:
            if (seconds := _seconds(place.get(name))) is not None:
                return seconds
    return None


def _seconds(value: Any) -> float | None:
    if isinstance(value, str):
        try:
            value = float(value) if value.replace(".", "", 1).isdecimal() else datetime.fromisoformat(value)
        except ValueError:
            return None
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= FIRST_DATE:
        return None
    return float(value) / (1000 if value > LAST_DATE_IN_SECONDS else 1)
