"""A target over several ranks against the same on one: `python -m draftsmith.recipes.studies.devices.ranks`

This process holds both, and they decode the same prompts greedily in turns, plain and with `pld`; the first turn warms
up. `exchanging` is the share of rank 0's time that it spends in the sums of layers and in messages; that includes
waiting for the other ranks. CPU seconds are those of all ranks.

Where the ranks share cores, tokens/s over ranks say nothing about ranks with a device each: each waits while another
computes. The CPU seconds then show what splitting adds: exchanges, and what every rank does for itself.
"""

from __future__ import annotations

import json as json_module
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.drafters.registry import load_drafter
from draftsmith.infer.engine.generate import generate
from draftsmith.infer.files.provenance import hardware
from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.infer.models.load import load_target
from draftsmith.infer.models.tensor_parallel.ranks import Ranks
from draftsmith.recipes.studies import run_study
from draftsmith.recipes.studies.devices.random_target import cpu_seconds, random_folder

# Ways to decode, and their drafters.
WAYS = {"plain": "empty", "pld": "pld"}


@dataclass(slots=True)
class Exchanges:
    """Seconds that rank 0 spends in exchanges, and how many there were."""

    seconds: float = 0.0
    count: int = 0

    def timed(self, exchange: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **named: Any) -> Any:
            began = time.perf_counter()
            result = exchange(*args, **named)
            self.seconds += time.perf_counter() - began
            self.count += 1
            return result

        return run


@contextmanager
def counting() -> Iterator[Exchanges]:
    """Inside, the sums of layers and rank 0's messages are timed."""
    found, before = Exchanges(), (dist.all_reduce, Ranks.send)
    dist.all_reduce, Ranks.send = found.timed(before[0]), found.timed(before[1])  # type: ignore[method-assign]
    try:
        yield found
    finally:
        dist.all_reduce, Ranks.send = before  # type: ignore[method-assign]


def decoded(target: HFTarget, drafter: str, prompts: list[list[int]], new_tokens: int) -> dict[str, Any]:
    """One turn."""
    rows = [Row(str(i), ids, Settings(), Stops(new_tokens)) for i, ids in enumerate(prompts)]
    bound = load_drafter(drafter, target)
    before, began = cpu_seconds(), time.perf_counter()
    with counting() as exchanges:
        done = generate(target, bound, rows)
    taken, after = time.perf_counter() - began, cpu_seconds()
    steps = sum(len(one.traces) for one in done)
    return {
        "token_ids": [one.token_ids for one in done],
        "tokens_per_s": len(prompts) * new_tokens / taken,
        "cpu_s": sum(after) - sum(before),
        "exchanging": exchanges.seconds / taken,
        "exchanges_per_step": exchanges.count / steps,
        "accepted_length": sum(len(one.token_ids) for one in done) / steps,
    }


def over_ranks(
    *,
    shape: str = "99M",
    target: str = "",
    tp: int = 2,
    prompts: int = 2,
    prompt_tokens: int = 32,
    new_tokens: int = 32,
    turns: int = 3,
    json: bool = False,
) -> dict[str, Any]:
    """Decode with one target on one rank and over several.

    Args:
        shape: of a random target, as studies.passes names it.
        target: a folder instead.
        tp: the ranks.
        prompts: how many, one after another.
        prompt_tokens: of each, half of them a repetition.
        new_tokens: of each answer.
        turns: how often each is timed.
        json: print one JSON object on the last line instead.
    """
    draws = torch.Generator().manual_seed(5)
    halves = [torch.randint(3, 200, (prompt_tokens // 2,), generator=draws).tolist() for _ in range(prompts)]
    texts = [half + half for half in halves]
    with tempfile.TemporaryDirectory() as scratch:
        folder = target or random_folder(shape, Path(scratch))
        split = load_target(folder, dtype="float32", device="cpu", tp=tp)
        try:
            targets = {1: load_target(folder, dtype="float32", device="cpu"), tp: split}
            found: dict[str, list[dict[str, Any]]] = {}
            for turn in range(turns + 1):
                for way, drafter in WAYS.items():
                    for count, one in targets.items():
                        result = decoded(one, drafter, texts, new_tokens)
                        if turn:
                            found.setdefault(f"{way}, {count}", []).append(result)
        finally:
            split.close()
    figures: dict[str, Any] = {"hardware": hardware(), "threads": torch.get_num_threads(), "tp": tp}
    for name, every in found.items():
        figures[name] = {key: statistics.median(one[key] for one in every) for key in every[0] if key != "token_ids"}
    for way in WAYS:
        alone, several = found[f"{way}, 1"], found[f"{way}, {tp}"]
        figures[f"{way}, equal"] = all(left["token_ids"] == right["token_ids"] for left, right in zip(alone, several))
    if json:
        print(json_module.dumps(figures))
        return figures
    for name in found:
        own = figures[name]
        print(
            f"{name} {'rank' if name.endswith(' 1') else 'ranks'}: {own['tokens_per_s']:.1f} tokens/s, "
            f"{own['cpu_s']:.2f} CPU seconds, accepted_length {own['accepted_length']:.2f}, {own['exchanging']:.0%} of "
            f"the time in {own['exchanges_per_step']:.0f} exchanges per step"
        )
    print(f"the same tokens: plain {figures['plain, equal']}, pld {figures['pld, equal']}")
    return figures


if __name__ == "__main__":
    run_study(over_ranks)
