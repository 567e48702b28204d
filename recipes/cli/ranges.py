"""Ranges of numeric options: a parameter's type states its range, which the parser checks and `--help` shows.

All are finite: nan and inf lie in none of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    # For type checkers they are plain numbers, so that functions can be called from Python with any number.
    IntFrom1: TypeAlias = int
    IntFrom0: TypeAlias = int
    FloatAbove0: TypeAlias = float
    FloatFrom0: TypeAlias = float
    From0To1: TypeAlias = float
    Above0To1: TypeAlias = float
else:
    from jsonargparse.typing import restricted_number_type

    _INT, _FLOAT = ("<", 1 << 63), ("<", float("inf"))
    IntFrom1 = restricted_number_type("IntFrom1", int, [(">=", 1), _INT])
    IntFrom0 = restricted_number_type("IntFrom0", int, [(">=", 0), _INT])
    FloatAbove0 = restricted_number_type("FloatAbove0", float, [(">", 0.0), _FLOAT])
    FloatFrom0 = restricted_number_type("FloatFrom0", float, [(">=", 0.0), _FLOAT])
    From0To1 = restricted_number_type("From0To1", float, [(">=", 0.0), ("<=", 1.0), _FLOAT])
    Above0To1 = restricted_number_type("Above0To1", float, [(">", 0.0), ("<=", 1.0), _FLOAT])

WORDS: dict[Any, str] = {
    IntFrom1: "a whole number of at least 1",
    IntFrom0: "a whole number of at least 0",
    FloatAbove0: "a number above 0",
    FloatFrom0: "a number of at least 0",
    From0To1: "a number from 0 to 1",
    Above0To1: "a number above 0, at most 1",
}
