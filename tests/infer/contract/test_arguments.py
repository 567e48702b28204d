"""Arguments that make no sense are named."""

from __future__ import annotations

import pytest

from draftsmith.infer.contract.arguments import at_least


def test_the_first_argument_that_is_less_is_named() -> None:
    at_least(1, nodes=1, depth=7)
    with pytest.raises(ValueError, match="depth must be at least 2, not 1"):
        at_least(2, nodes=2, depth=1, width=0)
