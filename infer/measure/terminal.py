"""Tables and notes at a terminal's width. No line is longer, and no number is broken over two lines.

A table that is too wide becomes several, one below the other, that repeat its first columns. Before that, heads are
folded at their spaces, and long names and paths at their separators.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

# Width of the space between two columns.
GAP = 2
# A name in a first column is folded to at most this share of the line.
NAME_SHARE = 0.4
# An interval stays on the line of its number.
_INTERVAL = re.compile(r"\S+ \[[-+\d.,% ]+\]")
_AFTER_SEPARATOR = re.compile(r"(?<=[/,\[=:_ -])")
_HARD_SPACE = "\xa0"


def empty_table(heads: Sequence[str], left: int) -> Table:
    """A table without rows; the first `left` columns are text, the others numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, padding=(0, GAP - 1, 0, 0))
    for index, head in enumerate(heads):
        table.add_column(head, justify="left" if index < left else "right", no_wrap=True)
    return table


@dataclass(slots=True)
class _Column:
    head: str
    cells: list[RenderableType]

    @property
    def width(self) -> int:
        return max(_widest(self.head), self.widest_cell)

    @property
    def widest_cell(self) -> int:
        return max((_widest(_plain(cell)) for cell in self.cells), default=0)

    def fold_head(self) -> None:
        """Fold the head to the width of its cells, at spaces only."""
        room = max(self.widest_cell, *map(len, self.head.split()), 1)
        self.head = "\n".join(textwrap.wrap(self.head, room, break_long_words=False, break_on_hyphens=False))

    def fold_cells(self, room: int) -> None:
        for at, cell in enumerate(self.cells):
            if _widest(_plain(cell)) > room:
                self.cells[at] = Text(_folded(_plain(cell), room))


def fit(table: Table, width: int) -> list[Table]:
    """`table` itself if it is no wider than `width`, else the tables that its columns make."""
    columns = [_Column(str(column.header), list(column.cells)) for column in table.columns]
    left = next((at for at, column in enumerate(table.columns) if column.justify != "left"), len(columns))
    if _width(columns) <= width:
        return [table]
    for column in columns:
        column.fold_head()
    names, numbers = columns[:left], columns[left:]
    if _width(columns) > width:
        for column in names:
            column.fold_cells(max(int(width * NAME_SHARE / max(left, 1)), 1))
    parts: list[list[_Column]] = [[]]
    for column in numbers:
        if parts[-1] and _width([*names, *parts[-1], column]) > width:
            parts.append([])
        parts[-1].append(column)
    return [_table([*names, *part], left) for part in parts]


def _table(columns: Sequence[_Column], left: int) -> Table:
    made = empty_table([column.head for column in columns], left)
    for row in zip(*(column.cells for column in columns)):
        made.add_row(*row)
    return made


def _width(columns: Sequence[_Column]) -> int:
    return sum(column.width for column in columns) + GAP * (len(columns) - 1)


def _plain(cell: RenderableType) -> str:
    return cell.plain if isinstance(cell, Text) else str(cell)


def _widest(text: str) -> int:
    return max(map(len, text.split("\n")))


def _folded(name: str, room: int) -> str:
    """`name` on lines of at most `room` characters, broken behind a separator where there is one."""
    lines = [""]
    for piece in _AFTER_SEPARATOR.split(name):
        if lines[-1] and len(lines[-1]) + len(piece) > room:
            lines.append("")
        while len(piece) > room:
            lines[-1], piece = piece[:room], piece[room:]
            lines.append("")
        lines[-1] += piece
    return "\n".join(lines)


def wrap(text: str, width: int) -> str:
    """Sentences on lines of at most `width`, broken at spaces; a longer word, such as a path, stays whole."""
    return "\n".join(_wrapped(line, width) for line in text.split("\n"))


def _wrapped(line: str, width: int) -> str:
    kept = _INTERVAL.sub(lambda found: found[0].replace(" ", _HARD_SPACE), line)
    indent = " " * (len(line) - len(line.lstrip()) + 2)
    lines = textwrap.wrap(kept, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines).replace(_HARD_SPACE, " ")
