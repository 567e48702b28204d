"""Rules by name."""

from __future__ import annotations

import pytest

from draftsmith.infer.engine.engine import Engine
from draftsmith.infer.engine.speculative import speculative
from draftsmith.infer.rules.block import block
from draftsmith.infer.rules.named import DEFAULT, NAMES, as_rule
from draftsmith.infer.rules.token import rejection


def test_every_name_is_a_rule_of_its_own_and_the_default_is_block() -> None:
    assert len({as_rule(name) for name in NAMES}) == len(NAMES) == 3
    assert as_rule(DEFAULT) is block


def test_a_rule_is_taken_as_given() -> None:
    assert as_rule(rejection) is rejection


def test_an_unknown_name_is_refused_before_anything_is_loaded() -> None:
    for use in (as_rule, lambda rule: Engine("no such target", rule=rule), lambda rule: speculative("pld", rule=rule)):
        with pytest.raises(ValueError, match="no verification rule 'blok': choose from token, block, traversal"):
            use("blok")
