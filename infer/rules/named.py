"""The verification rules by name, as commands and configurations write them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

if TYPE_CHECKING:
    from draftsmith.infer.contract.protocols import Rule

RuleName = Literal["token", "block", "traversal"]
NAMES: tuple[str, ...] = get_args(RuleName)
DEFAULT: RuleName = "block"


def as_rule(rule: str | Rule) -> Rule:
    """The rule of this name; a rule itself is returned unchanged."""
    if not isinstance(rule, str):
        return rule
    from draftsmith.infer.rules.block import block
    from draftsmith.infer.rules.token import rejection
    from draftsmith.infer.rules.traversal import traversal

    known: dict[str, Rule] = {"token": rejection, "block": block, "traversal": traversal}
    if rule not in known:
        raise ValueError(f"there is no verification rule {rule!r}: choose from {', '.join(NAMES)}")
    return known[rule]
