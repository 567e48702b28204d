"""`draftsmith report RUN...`: one page that says which drafter to use, from what `draftsmith bench --out` wrote."""

from __future__ import annotations

import sys
from json import dumps
from pathlib import Path


def report(runs: list[str], out: str | None = None, json: bool = False) -> None:
    """Write report.html, report.md and SVG pictures from one run folder or several, and print the verdict.

    Several runs of one target are its batch sizes and temperatures, side by side.

    Example: draftsmith report runs/batch1 runs/batch8 --out report.html

    Args:
        runs: run folders that `draftsmith bench --out` wrote.
        out: the page; report.html in the first folder where none is given.
        json: print one JSON object on the last line.
    """
    from draftsmith.infer.measure.report.report import write_report
    from draftsmith.recipes.cli.drafters import short_names

    made = write_report(runs, out, short_names())
    if json:
        files = {
            "page": str(made.page),
            "markdown": str(made.markdown),
            "pictures": [str(path) for path in made.pictures],
        }
        print(dumps({"verdicts": made.verdicts, **files}, ensure_ascii=False))
        return
    for sentence in made.verdicts:
        print(sentence)
    print(f"report: {made.page}")


def report_beside(folder: Path) -> None:
    """The report of a run that has just been written; one line on standard error says where it lies."""
    from draftsmith.infer.measure.report.report import write_report
    from draftsmith.recipes.cli.drafters import short_names

    made = write_report([folder], None, short_names())
    print(f"report: {made.page}", file=sys.stderr)
