"""`draftsmith compare BASE OTHER...`: are the answers equal, and how much faster did they come?"""

from __future__ import annotations

from json import dumps
from typing import Literal


def compare(
    base: str,
    others: list[str],
    json: bool = False,
    require: Literal["equal"] | None = None,
    seed: int = 0,
) -> int:
    """Compare answer files, Spec-Bench's or ours, with a base; returns the exit code.

    Example: draftsmith compare runs/first runs/second --require equal

    Args:
        base: the reference: an answer file, or a run folder (its plain answers).
        others: answer files or run folders (all their answers but the base's own).
        json: print one JSON object on the last line instead of tables.
        require: "equal" gives exit code 1 unless every question of every other is equal to the base's.
        seed: of the bootstrap that the intervals come from.
    """
    from draftsmith.infer.measure import tables
    from draftsmith.infer.measure.compare import compare as compare_paths

    report = compare_paths(base, others, seed=seed)
    if json:
        print(dumps(report, ensure_ascii=False))
    else:
        tables.show(tables.compare_tables(report))
    return 1 if require == "equal" and report["equal"] != report["total"] else 0
