"""What is known of a model without its weights."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from draftsmith.infer.contract.sampling import resolve_settings
from draftsmith.infer.models.load import load_generation_config, load_target


@pytest.mark.parametrize("own", [True, False])
def test_sampling_defaults_read_without_weights_are_those_of_the_loaded_model(
    folders: Any, tmp_path: Path, own: bool
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(folders.target, folder)
    path = folder / "generation_config.json"
    path.unlink(missing_ok=True)
    if own:
        path.write_text('{"do_sample": true, "temperature": 0.6, "top_k": 20, "eos_token_id": 3}')
    loaded = load_target(str(folder), dtype="float32", device="cpu").generation_config
    read = load_generation_config(str(folder))
    assert resolve_settings(read) == resolve_settings(loaded)
    assert resolve_settings(read).top_k == (20 if own else 0)
