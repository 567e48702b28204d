"""Training steps of one EAGLE-3 head beside speculators' (environment and peer: see __main__.py).

    python -m draftsmith.recipes.studies.speculators.speed --out DIR

Forward and backward of the same shape over one text of random states, all of it learned, with the target's
distributions made from its last states: no optimiser, no target. Both run in turns, each in its own process on one
thread; speeds are in tokens per CPU second.
"""

from __future__ import annotations

import json as json_module
import statistics
import subprocess
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig

from draftsmith.infer.heads.eagle import EagleDesign, EagleHead, rows_of
from draftsmith.infer.measure.bootstrap import ratio_interval
from draftsmith.recipes.studies import run_study
from draftsmith.recipes.studies.speculators.__main__ import VERSION, environment
from draftsmith.recipes.studies.study import in_turns
from draftsmith.train.data.batches import IGNORED, Batch
from draftsmith.train.drafts.unrolled import UnrolledHead
from draftsmith.train.objectives.eagle import EagleObjective
from draftsmith.train.teacher.draft_rows import DraftRows
from draftsmith.train.teacher.features import FeatureBatch
from draftsmith.train.teacher.live import OutputHead

# speculators' attention: eager is its choice for a CPU; sdpa is torch's own.
ATTENTIONS = ("eager", "sdpa")


class OurSteps:
    """Training steps of a random head of the case."""

    def __init__(self, case: dict[str, Any]) -> None:
        sizes, inputs = case["sizes"], load_file(case["inputs"])
        vocab_size, width = sizes["vocab_size"], sizes["hidden_size"]
        names = tuple(f"layer:{i}" for i in case["layer_ids"])
        torch.manual_seed(case["seed"])
        ids_V = rows_of(torch.randperm(vocab_size)[: case["draft_vocab_size"]].tolist(), vocab_size)
        head = EagleHead(LlamaConfig(**sizes), EagleDesign(3, names, width), ids_V)
        embedding = nn.Embedding(vocab_size, width).requires_grad_(False)
        head.lend(embedding, None)
        self.draft = UnrolledHead(head, case["steps"]).train()
        states = dict(zip(names, inputs["features"][None].chunk(len(names), -1)))
        output = OutputHead(nn.Linear(width, vocab_size, bias=False).requires_grad_(False), 1.0, 0.0)
        self.features = FeatureBatch(states | {"last": inputs["last"][None]}, output)
        tokens_1T = inputs["tokens"][None]
        labels_1T = torch.cat([tokens_1T[:, 1:], torch.full((1, 1), IGNORED)], 1)
        positions_1T = torch.arange(tokens_1T.shape[1])[None]
        self.batch: Batch = {"input_ids": tokens_1T, "position_ids": positions_1T, "labels": labels_1T}
        self.objective = EagleObjective(decay=1.0)
        self.objective.read = lambda batch: self.features  # type: ignore[assignment]
        self.objective.rows = DraftRows(ids_V)

    def seconds(self, steps: int) -> float:
        began = time.process_time()
        for _ in range(steps):
            self.objective(self.draft, self.batch).total.backward()  # type: ignore[arg-type]
            self.draft.zero_grad(set_to_none=True)
        return time.process_time() - began


class TheirSteps:
    """The same in speculators' environment."""

    def __init__(self, python: Path, case: dict[str, Any], path: Path) -> None:
        path.write_text(json_module.dumps([case]), encoding="utf-8")
        peer = Path(__file__).with_name("peer.py")
        self.process = subprocess.Popen(
            [str(python), str(peer), "time", str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._read("ready")

    def seconds(self, steps: int) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{steps}\n")
        self.process.stdin.flush()
        return float(self._read(""))

    def _read(self, wanted: str) -> str:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if not wanted or line.strip() == wanted:
                return line
        raise ValueError(f"speculators {VERSION} ended before it was timed; its message is above")

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def training_speed(
    *,
    out: str,
    tokens: int = 1024,
    width: int = 256,
    vocab_size: int = 8192,
    draft_vocab: int = 4096,
    steps: int = 3,
    rounds: int = 9,
    seed: int = 0,
    json: bool = False,
) -> None:
    """Time training steps here and in speculators, in turns.

    Args:
        out: folder for the environment and the inputs.
        tokens: of the text.
        width: of the states and of the head.
        vocab_size: of the target.
        draft_vocab: tokens that the head drafts.
        steps: of training-time test.
        rounds: timed turns of each; one more warms up.
        seed: of weights and inputs.
        json: print one JSON object on the last line.
    """
    torch.set_num_threads(1)
    folder = Path(out).resolve()
    python = environment(folder / "venv")
    generator = torch.Generator().manual_seed(seed)
    inputs = folder / "speed.safetensors"
    save_file(
        {
            "features": torch.randn((tokens, 3 * width), generator=generator),
            "last": torch.randn((tokens, width), generator=generator),
            "tokens": torch.randint(vocab_size, (tokens,), generator=generator),
        },
        inputs,
    )
    sizes = {
        "vocab_size": vocab_size, "hidden_size": width, "intermediate_size": 8 * width // 3 // 8 * 8,
        "num_hidden_layers": 1, "num_attention_heads": width // 64, "num_key_value_heads": width // 64, "head_dim": 64,
        "max_position_embeddings": 2 * tokens,
    }  # fmt: skip
    case = {
        "folder": str(folder / "speed"), "inputs": str(inputs), "layers": "llama", "switches": {}, "sizes": sizes,
        "layer_ids": [2, 4, 5], "draft_vocab_size": draft_vocab, "steps": steps, "seed": seed,
    }  # fmt: skip
    theirs = {
        f"speculators, {attention}": TheirSteps(python, case | {"attention": attention}, folder / f"{attention}.json")
        for attention in ATTENTIONS
    }
    timed: dict[str, OurSteps | TheirSteps] = {"here": OurSteps(case), **theirs}
    taken = in_turns({name: partial(one.seconds, 1) for name, one in timed.items()}, rounds)
    for peer in theirs.values():
        peer.close()
    found = {name: {"tokens_per_s": tokens / statistics.median(each)} for name, each in taken.items()}
    for name, row in found.items():
        print(f"{name:22} {row['tokens_per_s']:8.0f} tokens per CPU second")
    best = min(theirs, key=lambda name: statistics.median(taken[name]))
    ratio = sum(taken[best]) / sum(taken["here"])
    interval = ratio_interval(taken[best], taken["here"], seed=0)
    print(f"here over {best}: {ratio:.2f}{_between(interval)}, {steps} steps over {tokens} tokens, {rounds} rounds")
    if json:
        print(json_module.dumps({"speeds": found, "ratio": ratio, "interval": interval, "speculators": VERSION}))


def _between(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f" [{interval[0]:.2f}, {interval[1]:.2f}]"


if __name__ == "__main__":
    run_study(training_speed)
