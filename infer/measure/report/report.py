"""A report of one run folder or several: one page, the same as Markdown, and pictures beside it.

    report.html             opens anywhere, loads nothing
    report.md               verdict and tables
    report-*.png            where matplotlib is installed

Only finished runs are read; no model is loaded and nothing is measured here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from draftsmith.infer.drafters.registry import Registry
from draftsmith.infer.files.atomic import written_beside
from draftsmith.infer.measure.report.markdown import markdown
from draftsmith.infer.measure.report.page import page
from draftsmith.infer.measure.report.png import write_pictures
from draftsmith.infer.measure.report.runs import read_runs
from draftsmith.infer.measure.report.view import view


@dataclass(frozen=True, slots=True)
class Report:
    """What was written; `verdicts` has one sentence per temperature, `missing` what could not be made and why."""

    page: Path
    markdown: Path
    pictures: list[Path]
    verdicts: list[str]
    missing: str = ""


def write_report(folders: Sequence[str | Path], out: str | Path | None, registry: Registry) -> Report:
    """Write the report of `folders` to `out`, report.html in the first folder where none is given."""
    place = Path(out) if out else Path(folders[0] if folders else ".") / "report.html"
    if place.is_dir() or place.suffix != ".html":
        raise ValueError(f"{place} is no place for the report: name a file that ends in .html")
    seen = view(read_runs(folders), registry)
    place.parent.mkdir(parents=True, exist_ok=True)
    missing = (
        "" if find_spec("matplotlib") else "no PNG pictures: matplotlib is not installed (draftsmith[train] has it)"
    )
    html = page(seen)
    names = [] if missing else write_pictures(seen, place)
    for path, text in ((place, html), (place.with_suffix(".md"), markdown(seen, names))):
        with written_beside(path) as file:
            file.write(text)
    sentences = [group.verdict.sentence for group in seen.groups]
    return Report(place, place.with_suffix(".md"), [place.with_name(name) for name in names], sentences, missing)
