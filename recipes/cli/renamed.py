"""Options that have another name now: whoever types the old one is told the new one.

Old names are refused, not taken: one thing has one name in every command. Knows no command's function.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

# Command -> old name -> what to write instead.
RENAMED: dict[str, dict[str, str]] = {
    "data": {"files": "--data"},
    "plan bench": {"new_tokens": "--max_new_tokens", "rounds": "--repeats"},
    "train distil": {"top_k": "--tree_top_k (of the loss topk)"},
    "calibrate": {"cost_seconds": "--seconds"},
    "store build dresd": {"split": "--data owner/name:split"},
    "store quality": {"sample": "--positions"},
}


def refuse_old(name: str, renamed: Mapping[str, str]) -> None:
    """Raise where `name` is an option's old one."""
    if name in renamed:
        raise ValueError(f"--{name} has another name now: {renamed[name]}")


def refuse_old_keys(told: str, renamed: Mapping[str, str]) -> None:
    """The same for a key of a configuration file, in what the parser says of it."""
    for name in renamed:
        if re.search(rf"""['"`]{name}['"`]""", told):
            refuse_old(name, renamed)
