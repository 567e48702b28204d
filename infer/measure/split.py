"""Recorded answers in two parts: the earlier ones, to draft from, and the later ones, to replay.

`time:0.9` parts the conversations by their own times, `time:2026-05-01` at a moment, `rows:0.9` by the order they were
read in. All answers of a conversation fall on one side, so that no answer is drafted from its own conversation's past
as it stands in an index. What an index is made of is not known here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal

from draftsmith.infer.measure.recording import Recording
from draftsmith.infer.text.record import TIME_FIELDS


@dataclass(frozen=True, slots=True)
class Split:
    """As it was asked for: `share` of the conversations come first, or those before `moment` (seconds since 1970)."""

    by: Literal["time", "rows"]
    share: float | None = None
    moment: float | None = None


@dataclass(frozen=True, slots=True)
class SplitRecordings:
    """Both in order of arrival."""

    split: Split
    earlier: list[Recording]
    later: list[Recording]

    def to_json(self) -> dict[str, Any]:
        first = self.later[0].time
        return {
            "by": self.split.by,
            "share": self.split.share,
            "replayed_from": None if first is None else datetime.fromtimestamp(first, UTC).isoformat(),
            "indexed_answers": len(self.earlier),
            "indexed_tokens": sum(len(one.answer) for one in self.earlier),
            "replayed_answers": len(self.later),
        }


def parse_split(text: str) -> Split:
    """`time:SHARE`, `time:DATE` or `rows:SHARE`."""
    by, _, value = text.partition(":")
    wrong = f"--split {text!r} is not of the form time:0.9, time:2026-05-01 or rows:0.9"
    if by not in ("time", "rows") or not value:
        raise ValueError(wrong)
    try:
        share = float(value)
    except ValueError:
        if by == "rows":
            raise ValueError(wrong) from None
        try:
            moment = datetime.fromisoformat(value)
        except ValueError:
            raise ValueError(wrong) from None
        return Split("time", moment=(moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp())
    if not 0 < share < 1:
        raise ValueError(f"--split {text!r}: the share that is indexed lies between 0 and 1")
    return Split("time" if by == "time" else "rows", share=share)


def in_order(streams: Sequence[Recording], by_time: bool) -> list[Recording]:
    """As they arrived: by time, those of one time as they were read; ValueError where one has no time."""
    if not by_time:
        return list(streams)
    timeless = [one for one in streams if one.time is None]
    if timeless:
        raise ValueError(
            f"{len(timeless)} of {len(streams)} answers have no time ({timeless[0].key} is the first): rows tell it as "
            f"one of {', '.join(TIME_FIELDS)}; without, they can be split by --split rows:0.9"
        )
    return sorted(streams, key=lambda one: one.time or 0.0)


def arrived(streams: Sequence[Recording]) -> list[Recording]:
    """By their times where all have one, else as they were read."""
    return in_order(streams, by_time=all(one.time is not None for one in streams))


def split_recordings(streams: Sequence[Recording], split: Split) -> SplitRecordings:
    """The earlier and the later part; ValueError where one of them would be empty."""
    ordered = in_order(streams, split.by == "time")
    conversations = list(dict.fromkeys(one.conversation for one in ordered))
    if split.moment is not None:
        first = {one.conversation for one in ordered if (one.time or 0.0) < split.moment}
    else:
        first = set(conversations[: int(len(conversations) * (split.share or 0.0))])
    parts = SplitRecordings(
        split,
        [one for one in ordered if one.conversation in first],
        [one for one in ordered if one.conversation not in first],
    )
    if not parts.earlier or not parts.later:
        what = "index" if not parts.earlier else "replay"
        raise ValueError(f"the split leaves nothing to {what} of {len(conversations)} conversations")
    return parts
