"""Training throughput beside Hugging Face's Trainer and a bare loop: `python -m
draftsmith.recipes.studies.bench_training`.

Same model, data, precision, optimiser and rows per step in one process; the arms take turns
(recipes/studies/throughput.py). Of the seconds by the wall and of this process's CPUs, the second are the ones to trust
on a machine that others use too.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any


def bench_training(
    *,
    target: str,
    data: list[str],
    max_length: int = 512,
    rows: int = 4,
    samples: int = 64,
    rounds: int = 3,
) -> dict[str, Any]:
    """Learned tokens per second of each arm, and ours over the others'.

    Args:
        target: folder of the model that is trained, whole.
        data: conversations.
        max_length: tokens of a row.
        rows: rows of a step.
        samples: sequences, all of which every arm trains on once per turn: learned tokens are the same for all.
        rounds: turns of each arm; there is one more, which only warms up.
    """
    from draftsmith.infer.models.load import load_model
    from draftsmith.infer.text.templates import find_template
    from draftsmith.recipes.studies.throughput import throughput
    from draftsmith.train.data.batches import Batches
    from draftsmith.train.data.corpus import load_corpus, split

    model, tokenizer = load_model(target, dtype="float32", device="cpu")
    with tempfile.TemporaryDirectory() as scratch:
        template = find_template("chat", tokenizer)
        corpus = load_corpus(data, template, max_length=max_length, cache=Path(scratch) / "cache", limit=samples)
        train, held_out = split(corpus, 0.0)
        batches = Batches(corpus, train, held_out, max_length=max_length, batch_size=rows, micro_batch_size=rows)
        return throughput(model, batches, rounds, Path(scratch))


if __name__ == "__main__":
    from jsonargparse import auto_cli

    print(json.dumps(auto_cli(bench_training), indent=1))
