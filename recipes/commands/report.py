"""`draftsmith report RUNS...`: one page about run folders of `draftsmith bench`: which drafter to use, and why."""

from __future__ import annotations

import sys
from json import dumps
from pathlib import Path


def report(runs: list[str], out: str | None = None, forecast: str = "", json: bool = False) -> None:
    """Write report.html, report.md and SVG pictures from run folders, and print the verdict.

    Give several runs of one target to show its batch sizes and temperatures side by side.

    Example: draftsmith report runs/batch1 runs/batch8 --out report.html

    Args:
        runs: run folders of `draftsmith bench --out`.
        forecast: also show what would pay at which batch size: a file of `draftsmith forecast --latency COSTS --out`,
            or the JSON of `draftsmith plan --forecast`; forecast.json in a run folder is shown without it.
        out: the HTML file; by default report.html in the first run folder.
        json: print one JSON object on the last line.
    """
    from draftsmith.infer.drafters.registry import short_names
    from draftsmith.infer.files.locations import check_writable
    from draftsmith.infer.measure.report.report import write_report

    if out:
        check_writable(out)
    made = write_report(runs, out, short_names(), [forecast] if forecast else [])
    if json:
        files = {
            "page": str(made.page),
            "markdown": str(made.markdown),
            "pictures": [str(path) for path in made.pictures],
        }
        print(dumps({"verdicts": made.verdicts, "notes": made.notes, **files}, ensure_ascii=False))
        return
    for sentence in (*made.verdicts, *made.notes):
        print(sentence)
    print(f"report: {made.page}")


def report_beside(folder: Path) -> None:
    """Write the report into a run folder; standard error shows its path."""
    from draftsmith.infer.drafters.registry import short_names
    from draftsmith.infer.measure.report.report import write_report

    made = write_report([folder], None, short_names())
    print(f"report: {made.page}", file=sys.stderr)
