"""A random Llama in a folder, to be loaded by ranks, and the CPU seconds of this process and those it started."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from draftsmith.recipes.studies.passes import SHAPES, random_llama


def random_folder(shape: str, folder: Path) -> str:
    """A random model of `shape` in float32, with a tokenizer of bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if shape not in SHAPES:
        raise ValueError(f"unknown shape {shape!r}: {', '.join(SHAPES)}")
    random_llama(shape, torch.float32, torch.device("cpu")).save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = Tokenizer(models.BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    PreTrainedTokenizerFast(tokenizer_object=own).save_pretrained(folder)
    return str(folder)


def cpu_seconds() -> tuple[float, float]:
    """Of this process, and of the processes that it has started and that run (Linux)."""
    own, ticks = str(os.getpid()), 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if fields[1] == own:
            ticks += int(fields[11]) + int(fields[12])
    return time.process_time(), ticks / os.sysconf("SC_CLK_TCK")
