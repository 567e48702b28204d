"""Tables and sentences at a terminal's width: no longer line, no broken number."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console
from rich.text import Text

from draftsmith.infer.measure.tables import show, table_of

HEADS = ["drafter", "decode tokens/s", "end-to-end tokens/s", "speedup", "accepted_length", "break-even", "hit_rate"]
ROWS = [
    ["plain", "1234.56", "1200.00", "1.00 [1.00, 1.00]", "1.00", "1.00", "-"],
    ["small:models/a-long/path/to/a/draft[top_k=3,nodes=12]", "2234.56", "2200.00", "1.81 [1.72, 1.90] (end to end)",
     "2.34", "1.29", "100.0%"],
]  # fmt: skip


def printed(renderables, width: int) -> list[str]:
    file = io.StringIO()
    show(renderables, Console(file=file, width=width))
    return [line.rstrip() for line in file.getvalue().splitlines()]


def wide(times: int = 1):
    table = table_of([HEADS[0], *HEADS[1:] * times])
    for row in ROWS:
        table.add_row(Text(row[0]), *(Text(cell) for cell in row[1:] * times))
    return table


@pytest.mark.parametrize("width", [60, 80, 100])
@pytest.mark.parametrize("times", [1, 4])
def test_a_wide_table_becomes_several_that_fit(width, times):
    lines = printed([wide(times)], width)
    assert max(map(len, lines)) <= width
    text = "\n".join(lines)
    for cell in [cell for row in ROWS for cell in row[1:]]:
        assert re.search(rf"(?<!\S){re.escape(cell)}(?!\S)", text), f"{cell!r} is broken"
    for word in {word for head in HEADS for word in head.split()}:
        assert word in text
    starts = [line for line in lines if line.startswith("plain ")]
    assert len(starts) > 1, "every part begins with the drafters"


def test_a_table_that_fits_is_one_table_with_its_heads_on_one_line():
    lines = printed([wide()], 200)
    assert lines[0].split("  ")[0] == "drafter"
    assert "end-to-end tokens/s" in lines[0]
    assert len([line for line in lines if line.startswith("plain")]) == 1


def test_long_names_are_folded_at_separators_and_lose_nothing():
    lines = printed([wide()], 60)
    first = [line[:24].strip() for line in lines[:8]]
    assert "small:models/a-long/" in first
    assert ROWS[1][0] in "".join(first)


def test_sentences_are_wrapped_at_spaces_and_paths_and_intervals_stay_whole():
    path = "runs/" + "very-long-name/" * 8 + "report.html"
    interval = "1.81 [1.72, 1.90]"
    for before in range(40, 80):
        lines = printed([Text(f"{'x' * before} {interval} and more words that fill the line up to its end and on")], 80)
        assert max(map(len, lines)) <= 80
        assert any(interval in line for line in lines)
    assert path in printed([Text(f"report: {path}")], 80)[-1]


def test_brackets_in_names_are_no_markup():
    table = table_of(["drafter", "x"])
    table.add_row(Text("small[bold]"), "1")
    assert printed([table], 80)[-1].startswith("small[bold]")
