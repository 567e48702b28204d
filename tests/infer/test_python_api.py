"""`draftsmith.infer`: its names, what they are, and what importing them costs."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from tiny_folders import Folders

import draftsmith.infer as infer
from draftsmith.infer import Engine, HFTarget, Row, Settings, Stops, load_drafter, load_target, speculative

HEAVY = ("torch", "transformers", "numpy", "yaml", "jsonargparse", "draftsmith.retrieval", "draftsmith.recipes")
COUNTED = """
import json, sys
before = set(sys.modules)
import draftsmith.infer
names = dir(draftsmith.infer)
loaded = sorted({*sys.modules} - before)
from draftsmith.infer import Stops
print(json.dumps([loaded, names, [name for name in HEAVY if name in sys.modules and name != "torch"]]))
"""


def test_importing_loads_nothing_and_a_name_loads_what_it_needs() -> None:
    code = f"HEAVY = {HEAVY!r}" + COUNTED
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    loaded, names, after = json.loads(done.stdout)
    assert [name for name in loaded if name.partition(".")[0] != "draftsmith" and name in HEAVY] == []
    assert {name for name in loaded if name.startswith("draftsmith.infer.")} == set()
    assert set(infer.__all__) <= set(names)
    assert [name for name in after if name.startswith("draftsmith")] == []


def test_there_are_ten_names_and_each_is_where_the_type_checker_looks() -> None:
    assert len(infer.__all__) == 10
    assert set(infer.__all__) == set(infer._MODULES)
    for name in infer.__all__:
        assert getattr(infer, name).__module__ == f"draftsmith.infer.{infer._MODULES[name]}"
    with pytest.raises(AttributeError, match=r"module 'draftsmith\.infer' has no attribute 'Motor'"):
        _ = infer.Motor  # type: ignore[attr-defined]


def test_an_engine_takes_names_or_objects_and_gives_the_same_text(folders: Folders) -> None:
    asked = ["the quick brown fox", "what does the target say to that?"]
    plain = Engine(folders.target, device="cpu").generate(asked, max_new_tokens=40)
    target = load_target(folders.target, device="cpu")
    named = f"small:{folders.draft}[min_confidence=0,num_draft_tokens=6]"
    drafters = ("pld", named, load_drafter(named, target))
    for drafter, given in zip(drafters, (folders.target, folders.target, target), strict=True):
        device = "cpu" if isinstance(given, str) else "auto"
        drafted = Engine(given, drafter, batch_size=2, device=device).generate(asked, max_new_tokens=40)
        assert [one.token_ids for one in drafted] == [one.token_ids for one in plain]
        traces = [trace for one in drafted for trace in one.traces]
        assert any(not tried.accepted for trace in traces for tried in trace.tried)
    assert max(trace.accepted for trace in traces) >= 2
    assert len({token for one in plain for token in one.token_ids}) >= 8


def test_an_engine_takes_a_loaded_model(folders: Folders) -> None:
    target = load_target(folders.target, device="cpu")
    row = Row("0", [5, 6, 7], Settings(), Stops(12))
    (own,) = Engine(HFTarget(target.model), load_drafter("pld", target)).run([row])
    drafted = target.model.generate(
        torch.tensor([[5, 6, 7]]), max_new_tokens=12, eos_token_id=None, custom_generate=speculative("pld")
    )
    assert drafted[0, 3:].tolist() == own.token_ids


def test_wrong_names_are_one_clear_line(folders: Folders) -> None:
    with pytest.raises(ValueError, match="does not exist, and is not a Hub name"):
        Engine("./nowhere")
    with pytest.raises(ValueError, match="unknown drafter 'pdl'"):
        Engine(folders.target, "pdl")
    with pytest.raises(ValueError, match="has another tokenizer than the target"):
        Engine(folders.target, f"small:{folders.stranger}", device="cpu")
