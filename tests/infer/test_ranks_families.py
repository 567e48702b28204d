"""The same over two ranks in float32, and for other families: each test opens a target of its own, and a process leads
one at a time, so these stand apart from those that share one (test_ranks_lossless.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from over_ranks import saved
from test_eagle_lossless import MAKE, head_of
from test_lossless import DRAFTERS, EITHER, assert_tried_hard, decode, make_rows, models, retrieved, tokens
from test_ranks_lossless import KIND, rounded, trees

from draftsmith.infer.contract.protocols import Drafter
from draftsmith.infer.drafters.controls import Empty
from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.infer.models.load import load_target

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="two ranks on the CPU: hide the CUDA devices")


@pytest.mark.slow
def test_all_of_them_in_float32(tmp_path: Path) -> None:
    """Sums that are split round otherwise, and no draw and no choice lies that close."""
    folder = saved(tmp_path / "target", models(KIND)[0], torch.float32)
    targets = [load_target(folder), load_target(folder, tp=2)]
    try:
        for target in targets:
            target.tokenizer = None
        for settings in EITHER.values():
            answered = make_rows(settings)
            wanted = tokens(decode(targets[0], Empty(), answered, 8))
            made: dict[str, Callable[[HFTarget], Drafter]] = {
                name: lambda target, name=name: DRAFTERS[name](models(KIND)[1]) for name in ("tree", "sd2", "mixed")
            }
            made["eagle"] = lambda target: MAKE["eagle"](head_of(KIND))
            for name in ("rest", "dresd"):
                store = tmp_path / f"{name}-{settings.greedy}"
                made[name] = lambda target, name=name, store=store, answered=answered: retrieved(
                    name, target, answered, store / str(target.ranks)
                )
            for name, make in made.items():
                found = [decode(target, make(target), make_rows(settings), 3) for target in targets]
                assert tokens(found[1]) == tokens(found[0]) == wanted, name
                assert rounded(trees(found[1]), 3) == rounded(trees(found[0]), 3), name
                assert_tried_hard(found[1], deep=1)
    finally:
        targets[1].close()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gemma2", "gemma3", "gpt_neox", "mistral", "phi3", "qwen2", "qwen3"])
def test_other_families(kind: str, tmp_path: Path) -> None:
    one, folder = HFTarget(models(kind)[0]), saved(tmp_path / "target", models(kind)[0])
    two = load_target(folder, tp=2)
    two.tokenizer = None
    try:
        for settings in EITHER.values():
            found = [
                decode(target, DRAFTERS["mixed"](models(kind)[1]), make_rows(settings), 3) for target in (one, two)
            ]
            assert tokens(found[1]) == tokens(found[0])
            assert trees(found[1]) == trees(found[0])
            assert_tried_hard(found[1])
    finally:
        two.close()
