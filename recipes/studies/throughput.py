"""Training throughput beside Hugging Face's Trainer and a bare loop: `python -m draftsmith.recipes.studies.throughput`.

Every arm trains a copy of one model on the same sequences in one process, with the same precision, optimiser and rows
per step, in turns. Counted are learned tokens: padding and prompts do not count. Seconds are given twice, by the wall
and of this process's CPUs; on a shared machine trust the second. Also here: model FLOPs per step, for MFU.

Legend: T positions of a row, D hidden.
"""

from __future__ import annotations

import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from draftsmith.infer.models.layers import find_parts
from draftsmith.infer.models.load import load_model
from draftsmith.infer.text.templates import find_template
from draftsmith.train.data.batches import MicroBatches
from draftsmith.train.data.corpus import Corpus, load_corpus, split
from draftsmith.train.drafts.exits import ExitStates
from draftsmith.train.drafts.trainable import exit_curves
from draftsmith.train.objectives.sft import SFT
from draftsmith.train.run.callbacks import AtSteps
from draftsmith.train.run.config import Machine, Optim, TrainConfig, resolved
from draftsmith.train.run.data_module import Batches
from draftsmith.train.run.module import Training
from draftsmith.train.run.optimisers import LearningRateSchedule
from draftsmith.train.run.run import fit
from draftsmith.train.run.run_record import Metrics, RunRecord

# Dense bfloat16 FLOP/s by what the device's name holds, from the makers' data sheets.
PEAKS = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12}
# After each step: its learned tokens, wall clock, CPU clock.
Marks = list[tuple[int, float, float]]


def measure(model: Any, batches: Batches, rounds: int, scratch: Path) -> dict[str, Any]:
    """Learned tokens per second of each arm, and ours over the others'. Arms take turns; the first only warms up."""
    corpus, rows, longest = batches.corpus, batches.batch_size, batches.stream.capacity
    steps = batches.steps_in(1)
    arms: dict[str, Callable[[int], Marks]] = {
        "ours": lambda turn: _ours(model, batches, steps, scratch / f"ours-{turn}"),
        "bare loop": lambda turn: _bare(model, batches, steps),
        "trainer, padded to max_length": lambda turn: _trainer(model, corpus, rows, longest, scratch),
        "trainer, grouped by length": lambda turn: _trainer(model, corpus, rows, 0, scratch),
    }
    rates: dict[str, list[list[float]]] = {name: [] for name in arms}
    for turn in range(rounds + 1):
        for name, arm in arms.items():
            wall, cpu = _rates(arm(turn))
            if turn:
                rates[name].append([wall, cpu])
            print(f"round {turn}: {name}: {wall:,.0f} per second, {cpu:,.0f} per CPU second", file=sys.stderr)
    return {"rounds": rates, **compared(rates)}


def compared(rates: dict[str, list[list[float]]]) -> dict[str, Any]:
    """Medians over the rounds: of each arm's rates, and of the ratio of ours to it within a round."""
    results: dict[str, Any] = {}
    for clock, kind in enumerate(("wall", "cpu")):
        results[f"learned_tokens_per_s_{kind}"] = {
            name: statistics.median(rate[clock] for rate in found) for name, found in rates.items()
        }
        results[f"ours_over_{kind}"] = {
            name: statistics.median(ours[clock] / other[clock] for ours, other in zip(rates["ours"], found))
            for name, found in rates.items()
        }
    return results


def _rates(marks: Marks) -> list[float]:
    """Learned tokens per second of wall and of CPU, from the beginning of the first step to the end of the last."""
    tokens = sum(count for count, _, _ in marks)
    return [tokens / (marks[-1][clock] - marks[0][clock]) for clock in (1, 2)]


def _mark(tokens: int) -> tuple[int, float, float]:
    return tokens, time.perf_counter(), time.process_time()


def _module(model: Any) -> Training:
    draft = ExitStates(copy.deepcopy(model).train(), [model.config.num_hidden_layers])
    return Training(draft, SFT(), LearningRateSchedule(1e-5, 10**6), seed=0)


class _Timed:
    """metrics.csv, and a mark after each of its rows."""

    def __init__(self, metrics: Any, marks: Marks) -> None:
        self._metrics = metrics
        self._marks = marks

    def begin(self, step: int) -> None:
        self._metrics.begin(step)
        self._marks.append(_mark(0))

    def add(self, **values: Any) -> None:
        self._metrics.add(**values)
        self._marks.append(_mark(values["loss_tokens"]))


def _ours(model: Any, batches: Batches, steps: int, out: Path) -> Marks:
    """The trainer as `draftsmith train` runs it, metrics.csv and all."""
    rows = batches.batch_size
    layers = model.config.num_hidden_layers
    config = resolved(
        TrainConfig(
            "", [], str(out), layers, optim=Optim(batch_size=rows, micro_batch_size=rows), machine=Machine("cpu")
        )
    )
    marks: Marks = []

    record, curves = RunRecord(out), exit_curves([layers])
    metrics = Metrics(out / "metrics.csv", curves)
    timed: Any = _Timed(metrics, marks)
    record.begin(record.open({"settings": {}}))
    watcher = AtSteps(record, timed, curves, lambda module: {}, val_every=0, save_every=10**6, deadline=None)
    fit(config, _module(model), batches, watcher, record, steps)
    return marks


def _bare(model: Any, batches: Batches, steps: int) -> Marks:
    """Forward, backward, clip, step, on the same batches made beforehand."""
    module = _module(model)
    optimiser = torch.optim.AdamW(module.parameters(), lr=1e-5, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    rows = batches.batch_size
    source = MicroBatches(batches.corpus, batches.stream, rows, rows, 0, 1)
    marks = [_mark(0)]
    for batch in [source[i] for i in range(steps)]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            sums = module.objective(module.draft, batch)
            loss = sums.total / batch["loss_tokens"]
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        marks.append(_mark(int(batch["loss_tokens"])))
    return marks


def _trainer(model: Any, corpus: Corpus, rows: int, pad_to: int, scratch: Path) -> Marks:
    """transformers' Trainer: rows padded to `pad_to`, or (0) grouped by length and padded to the longest."""
    from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

    samples = []
    for i in range(len(corpus)):
        tokens, mask = corpus.sample(i)
        labels = [int(token) if learned else -100 for token, learned in zip(tokens, mask)]
        samples.append({"input_ids": tokens.tolist(), "labels": labels})
    learned: list[int] = []
    marks: Marks = []

    def collate(picked: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        learned.append(sum(label != -100 for sample in picked for label in sample["labels"][1:]))
        width = pad_to or max(len(sample["input_ids"]) for sample in picked)
        fill = {"input_ids": 0, "labels": -100}
        batch = {
            name: torch.tensor([sample[name] + [value] * (width - len(sample[name])) for sample in picked])
            for name, value in fill.items()
        }
        lengths = torch.tensor([len(sample["input_ids"]) for sample in picked])
        return {**batch, "attention_mask": (torch.arange(width)[None] < lengths[:, None]).long()}

    class Clock(TrainerCallback):
        def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
            marks.append(_mark(0))

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            marks.append(_mark(learned[len(marks) - 1]))

    arguments = TrainingArguments(
        str(scratch), per_device_train_batch_size=rows, num_train_epochs=1, bf16=True, use_cpu=True, report_to=[],
        learning_rate=1e-5, weight_decay=0.0, save_strategy="no", logging_strategy="no", disable_tqdm=True,
        remove_unused_columns=False, train_sampling_strategy="random" if pad_to else "group_by_length",
    )  # fmt: skip
    trainer = Trainer(
        copy.deepcopy(model), arguments, data_collator=collate, train_dataset=samples, callbacks=[Clock()]
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return marks


def step_flops(model: Any, num_exits: int, positions: int, learned: int) -> float:
    """Model FLOPs of one optimiser step over `positions` tokens, `learned` of which pass the head once per exit.

    Counted as usual, 6 per matrix weight and token (2 forward, 4 backward), without recomputation and without
    attention, which adds about T / (12 D) of a layer.
    """
    parts = find_parts(model)
    layers = sum(weight.numel() for weight in parts.layers.parameters() if weight.ndim == 2)
    head: Any = parts.head
    return 6.0 * (layers * positions + head.weight.numel() * learned * num_exits)


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bfloat16 FLOP/s; None for one that is not listed."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def throughput(
    *,
    target: str,
    data: list[str],
    max_length: int = 512,
    rows: int = 4,
    samples: int = 64,
    rounds: int = 3,
) -> dict[str, Any]:
    """Learned tokens per second of each arm, and the ratio of ours to the others.

    Args:
        target: folder of the model that is trained, whole.
        data: conversations.
        max_length: tokens of a row.
        rows: rows of a step.
        samples: sequences; every arm trains on all of them once per turn, so learned tokens are the same for all.
        rounds: turns of each arm, after one to warm up.
    """
    model, tokenizer = load_model(target, dtype="float32", device="cpu")
    with tempfile.TemporaryDirectory() as scratch:
        template = find_template("chat", tokenizer)
        corpus = load_corpus(data, template, max_length=max_length, cache=Path(scratch) / "cache", limit=samples)
        train, held_out = split(corpus, 0.0)
        batches = Batches(corpus, train, held_out, max_length=max_length, batch_size=rows, micro_batch_size=rows)
        return measure(model, batches, rounds, Path(scratch))


if __name__ == "__main__":
    from jsonargparse import auto_cli

    print(json.dumps(auto_cli(throughput), indent=1))
