"""What an error says in one line, whatever it says."""

from __future__ import annotations

import pytest

from draftsmith.infer.files.errors import first_line


@pytest.mark.parametrize(
    ("problem", "line"),
    [
        (ValueError("one\ntwo"), "one"),
        (OSError("\n  first\nsecond"), "first"),
        (RuntimeError(""), "RuntimeError"),
        (KeyError(), "KeyError"),
        (ValueError(" \n "), "ValueError"),
    ],
)
def test_the_first_line_or_the_type_of_an_error(problem: Exception, line: str) -> None:
    assert first_line(problem) == line
