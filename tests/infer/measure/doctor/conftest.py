"""A target that has answered a few prompts, with which drafts are examined."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from ill_folders import deepened, sit
from tiny_folders import Folders, save, tiny_llama

from draftsmith.infer.measure.doctor.exam import Exam


@pytest.fixture(scope="package")
def exam(folders: Folders) -> Exam:
    return sit(folders.target)


@pytest.fixture(scope="package")
def sorted_draft(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Four layers, of which the first two are the target's and the others change nothing; exits after 2 and 4."""
    model: Any = deepened(tiny_llama(), 4)
    model.config.sorted_exits = [2, 4]
    place: Path = tmp_path_factory.mktemp("sorted") / "draft"
    return save(place, model, folders.tokenizer)
