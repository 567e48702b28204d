"""`draftsmith compare BASE OTHERS...`: whether the answers are equal, and how much faster they came."""

from __future__ import annotations

import sys
from json import dumps
from typing import Literal

from draftsmith.recipes.cli.ranges import IntFrom0


def compare(
    base: str,
    others: list[str],
    json: bool = False,
    require: Literal["equal"] | None = None,
    seed: IntFrom0 = 0,
) -> int:
    """Compare the answers and the speed of runs with those of a base run.

    Each run is first measured against its own plain decoding, so that machines and their loads cancel out. Runs of
    different targets or prompts are refused; other differences are listed as warnings.

    Example: draftsmith compare runs/first runs/second --require equal

    Args:
        base: an answer file, ours or Spec-Bench's, or a run folder (its plain answers).
        others: answer files, or run folders (all their answers except the base's).
        json: print one JSON object on the last line instead of tables.
        require: with "equal", the exit code is 1 unless all answers equal the base's.
        seed: random seed of the bootstrap intervals.
    """
    from draftsmith.infer.measure import tables
    from draftsmith.infer.measure.compare import compare as compare_paths

    report = compare_paths(base, others, seed=seed)
    if json:
        for line in report["warnings"]:
            print(f"warning: {line}", file=sys.stderr)
        print(dumps(report, ensure_ascii=False))
    else:
        tables.show(tables.compare_tables(report))
    return 1 if require == "equal" and report["equal"] != report["total"] else 0
