"""Targets on disk, to be split over two ranks. Not tests: what tests share."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from small_tokenizer import make_tokenizer


def saved(folder: Path, model: Any, dtype: torch.dtype = torch.float64) -> str:
    """The folder of `model` with a tokenizer, which is bigger than its vocabulary: rows are given as ids."""
    copy.deepcopy(model).to(dtype).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)
