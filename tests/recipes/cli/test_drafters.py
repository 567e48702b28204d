"""The packaged short names of --drafters."""

import pytest

from draftsmith.recipes.cli import drafters as module
from draftsmith.recipes.cli.drafters import parse_drafters, short_names

NAMES_THAT_STAY = {
    "pld": ("draftsmith.retrieval.PromptLookup", None),
    "rest": ("draftsmith.retrieval.Rest", "store"),
    "dresd": ("draftsmith.retrieval.Dresd", "store"),
    "small": ("draftsmith.infer.drafters.SmallLM", "model"),
    "sd2": ("draftsmith.infer.drafters.SD2", "model"),
    "empty": ("draftsmith.infer.drafters.controls.Empty", None),
    "oracle": ("draftsmith.infer.drafters.controls.oracle", None),
    "adversary": ("draftsmith.infer.drafters.controls.adversary", None),
}


def test_the_names_that_other_peoples_scripts_use_stay():
    found = {name: (entry["class_path"], entry.get("argument")) for name, entry in short_names().items()}
    assert {name: found.get(name) for name in NAMES_THAT_STAY} == NAMES_THAT_STAY


def test_plain_is_kept_for_decoding_without_a_drafter(monkeypatch):
    monkeypatch.setattr(module, "short_names", lambda: {"any": {"class_path": "builtins.object"}})
    assert list(parse_drafters("any,mine=any")) == ["any", "mine"]
    with pytest.raises(ValueError, match="'plain' is the name of decoding without a drafter"):
        parse_drafters("plain=any")
