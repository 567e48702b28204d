"""Validation of a draft in training: its loss on held-out text, and accepted_length by infer's own decode loop, rule
and metrics."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from draftsmith.infer.contract.protocols import Drafter
from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.contract.trace import Generation
from draftsmith.infer.engine.engine import Engine
from draftsmith.infer.measure.metrics import Totals
from draftsmith.train.data.corpus import Corpus
from draftsmith.train.run.data_module import Batches
from draftsmith.train.run.module import Training, reduced

if TYPE_CHECKING:
    from draftsmith.infer.models.hf_target import HFTarget

ROWS_AT_ONCE = 8


def held_out_losses(module: Training, data: Batches) -> list[float]:
    """The mean losses on the held-out rows; empty if there are none."""
    trainer = module.trainer
    sums: torch.Tensor | None = None
    with torch.no_grad():
        for batch in data.val_batches(trainer.global_rank, trainer.world_size):
            moved = trainer.strategy.batch_to_device(batch, dataloader_idx=0)
            with trainer.precision_plugin.val_step_context():
                output: Any = trainer.strategy.validation_step(moved, 0)
            (_, per_exit_E, _), counts_E = output
            both_2E = torch.stack([per_exit_E.detach(), counts_E.to(per_exit_E)])
            sums = both_2E if sums is None else sums + both_2E
    if hasattr(module, "reshard"):  # split by fully_shard: else what is not in a layer stays whole until the next step
        module.reshard()
    if sums is None:
        return []
    sums_E, counts_E = reduced(module, sums)
    return [float(value) for value in sums_E / counts_E.clamp_min(1)]


def held_out_prompts(corpus: Corpus, held_out: np.ndarray, count: int, longest: int) -> list[list[int]]:
    """The first `count` held-out prompts of at most `longest` tokens, one per conversation."""
    prompts: dict[int, list[int]] = {}
    for i in held_out:
        prompt = corpus.prompt(int(i))
        if prompt and len(prompt) <= longest and len(prompts) < count:
            prompts.setdefault(int(corpus.groups[i]), prompt)
    return list(prompts.values())


def accepted_lengths(
    target: HFTarget,
    drafters: Mapping[str, Drafter],
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int = 48,
) -> dict[str, float]:
    """accepted_length with each of `drafters`, decoding `prompts` with `target`."""
    found = {}
    for name, drafter in drafters.items():
        done = decode(target, drafter, prompts, max_new_tokens)
        length = Totals.of(trace for row in done for trace in row.traces).accepted_length
        found[name] = float("nan") if length is None else length
    return found


def decode(
    target: HFTarget,
    drafter: Drafter,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float = 0.0,
    rows_at_once: int = ROWS_AT_ONCE,
) -> list[Generation]:
    """The target's answers to `prompts`, in order, with the traces of `drafter`."""
    stops = Stops(max_new_tokens, target.eos_ids)
    settings = Settings(temperature=temperature)
    drafter.bind(target)
    rows = [Row(f"held-out-{i}", list(prompt), settings, stops) for i, prompt in enumerate(prompts)]
    return Engine(target, drafter, batch_size=rows_at_once).run(rows, strict=True)
