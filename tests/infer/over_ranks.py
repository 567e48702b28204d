"""Targets on disk, to be split over two ranks, and processes that hold one. Not tests: what tests share."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import torch
from small_tokenizer import make_tokenizer

LOAD = """
import sys
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.drafters.controls import Empty
from draftsmith.infer.engine.engine import Engine
from draftsmith.infer.models.load import load_target
from draftsmith.infer.models.tensor_parallel.leading_runner import LeadingRunner

target = load_target(sys.argv[1], tp=2)
"""
IN_STEPS = """
with Engine(target, Empty()) as engine:
    while True:
        engine.add(Row("0", [5, 6, 7], Settings(), Stops(400)))
        while engine.busy:
            engine.step()
            print("again", flush=True)
"""
IN_PREFILL = """
row = Row("0", [5 + i % 50 for i in range(500)], Settings(), Stops(4))
while True:
    target.admit([row])
    target.prefill([row], 512)
    target.release([row])
    print("again", flush=True)
"""


def saved(folder: Path, model: Any, dtype: torch.dtype = torch.float64) -> str:
    """The folder of `model` with a tokenizer, which is bigger than its vocabulary: rows are given as ids."""
    copy.deepcopy(model).to(dtype).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def children(pid: int) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) == pid and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(what: object, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if what():  # type: ignore[operator]
            return True
        time.sleep(0.02)
    return False
