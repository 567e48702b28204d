"""`draftsmith quickstart`: a target, drafts for it and a comparison, from nothing but what this machine has.

The text is Python's own standard library. Every step is a `draftsmith` command that is printed as it runs, keeps what
it made, and is passed over when it stands; so an interrupted quickstart goes on where it was. It shows that all works
together, losslessly, on this machine. What an 8B model gains on a GPU it does not show: `replay` on your own logs does.
"""

from __future__ import annotations

import itertools
import shlex
import shutil
import sysconfig
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class Scale:
    """How large the models are and how long they are trained."""

    says: str
    megabytes: float
    vocab_size: int
    hidden_size: int
    target_layers: int
    target_steps: int
    draft_steps: int
    questions: int
    answers: int
    new_tokens: int
    min_distinct: float


SCALES = {
    "smoke": Scale(
        says="about a minute; its text loops and flatters every drafter",
        megabytes=1.0, vocab_size=1024, hidden_size=128, target_layers=3, target_steps=220, draft_steps=80,
        questions=6, answers=64, new_tokens=48, min_distinct=0.0,
    ),
    "small": Scale(
        says="about ten minutes on two cores",
        megabytes=6.0, vocab_size=4096, hidden_size=384, target_layers=6, target_steps=500, draft_steps=250,
        questions=24, answers=400, new_tokens=64, min_distinct=0.5,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Step:
    """One command: what it does, its words, and the file that is there when it is done."""

    says: str
    words: list[str]
    proof: Path


def quickstart(scale: Literal["smoke", "small"] = "small", out: str | None = None, seed: int = 0) -> None:
    """Train a small target and a draft on this machine's own text, and compare drafters with plain decoding.

    Example: draftsmith quickstart --scale smoke

    Args:
        scale: smoke (a minute) or small (about ten).
        out: the folder for everything; quickstart/SCALE where none is given.
        seed: of training and measuring.
    """
    size = SCALES[scale]
    folder = Path(out or f"quickstart/{scale}")
    print(f"quickstart, scale {scale}: {size.says}; everything goes into {folder}\n")
    began = time.perf_counter()
    _corpus(folder, size)
    steps = _steps(folder, size, seed)
    for number, step in enumerate(steps, start=1):
        _run(number, len(steps), step)
    print(f"\ndone in {time.perf_counter() - began:.0f} s. Answers, traces and results: {folder / 'bench'}")
    print("It shows that drafting works here and is lossless. It does not show the speedup of a large model on a GPU;")
    print("for your own traffic: draftsmith replay --data LOGS.jsonl --tokenizer MODEL --drafters pld")


def _steps(folder: Path, size: Scale, seed: int) -> list[Step]:
    corpus, target, draft = folder / "corpus.jsonl", folder / "target", folder / "draft-sft"
    rest, answers, dense = folder / "store-rest", folder / "answers.jsonl", folder / "store-dresd"
    bench = folder / "bench"
    drafters = f"pld,rest:{rest}[nodes=16],dresd:{dense}[nodes=16],small:{draft},empty,oracle,adversary"
    common = ["--seed", str(seed), "--text.max_length", "256", "--text.cache", str(folder / "tokenised")]
    return [
        Step(
            f"a target of {size.target_layers} layers x {size.hidden_size}, trained from scratch",
            ["train", "target", "--data", str(corpus), "--out", str(target), "--vocab_size", str(size.vocab_size),
             "--hidden_size", str(size.hidden_size), "--num_layers", str(size.target_layers),
             "--max_steps", str(size.target_steps), "--optim.batch_size", "8", *common],
            target / "model.safetensors",
        ),
        Step(
            "a draft of one layer, fine-tuned on the same text",
            ["train", "sft", "--target", str(target), "--data", str(corpus), "--out", str(draft), "--num_layers", "1",
             "--max_steps", str(size.draft_steps), "--optim.batch_size", "8", "--optim.lr", "1e-3",
             "--watch.val_prompts", "0", *common],
            draft / "model.safetensors",
        ),
        Step(
            "a retrieval store of that text",
            ["store", "build", "rest", "--data", str(corpus), "--tokenizer", str(target), "--out", str(rest)],
            rest / "store.json",
        ),
        Step(
            "the target's own answers to questions like those to come",
            ["answers", "--target", str(target), "--data", str(folder / "asked_before.jsonl"), "--out", str(answers),
             "--max_new_tokens", str(size.new_tokens), "--limit", str(size.answers)],
            folder / "answers.done",
        ),
        Step(
            "a dense store of those answers, keyed by the target's states",
            ["store", "build", "dresd", "--target", str(target), "--data", str(answers), "--out", str(dense),
             "--dims", "32"],
            dense / "store.json",
        ),
        Step(
            "drafters beside plain decoding, and beside the controls: nothing, always right, always wrong",
            ["bench", "--target", str(target), "--data", str(folder / "questions.jsonl"),
             "--drafters", drafters, "--max_new_tokens", str(size.new_tokens),
             "--min_distinct", str(size.min_distinct), "--seed", str(seed), "--out", str(bench)],
            bench / "results.json",
        ),
    ]  # fmt: skip


def _run(number: int, of: int, step: Step) -> None:
    from draftsmith.recipes.cli import run

    print(f"[{number}/{of}] {step.says}\n      draftsmith {shlex.join(step.words)}", flush=True)
    if step.proof.is_file():
        print(f"      there already: {step.proof}\n")
        return
    if step.words[0] == "bench" and step.proof.parent.exists():
        shutil.rmtree(step.proof.parent)  # measured half-way by an earlier quickstart: nothing to go on from
    began = time.perf_counter()
    code = run(step.words)
    if code == 130:
        raise KeyboardInterrupt("run the same command again and it goes on here")
    if code:
        raise ValueError(f"step {number} of {of} failed; the line above says why")
    if step.words[0] == "answers":
        step.proof.touch()
    print(f"      {time.perf_counter() - began:.0f} s\n", flush=True)


# The text: modules of the standard library, cut into questions and their continuations.

PIECE = 500
ASKED = 120


def _corpus(folder: Path, size: Scale) -> None:
    """corpus.jsonl and asked_before.jsonl of most modules, questions.jsonl of those that were held out."""
    from draftsmith.infer.measure.atomic import write_rows

    corpus, questions = folder / "corpus.jsonl", folder / "questions.jsonl"
    if corpus.is_file() and questions.is_file():
        return
    modules = list(_modules(int(size.megabytes * 1e6)))
    held_out, kept = modules[::10], [module for i, module in enumerate(modules) if i % 10]
    asked = [row for module in held_out for row in _rows(module)][:: max(1, len(held_out) // 2)]
    folder.mkdir(parents=True, exist_ok=True)
    write_rows(questions, [_question(i, row) for i, row in enumerate(asked[: size.questions])])
    learned = [row for module in kept for row in _rows(module)]
    before = learned[:: max(1, len(learned) // size.answers)]
    write_rows(folder / "asked_before.jsonl", [_question(i, row) for i, row in enumerate(before)])
    write_rows(corpus, learned)
    print(f"text: {len(kept)} modules of Python's standard library, {len(held_out)} more held out for questions\n")


def _modules(limit: int) -> Iterator[Path]:
    """Modules in an order that is the same everywhere, without the tests, up to `limit` bytes."""
    root = Path(sysconfig.get_paths()["stdlib"])
    total = 0
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if {"test", "tests", "idlelib", "lib2to3", "site-packages", "dist-packages", "encodings"} & set(parts):
            continue
        size = path.stat().st_size
        if 4000 < size < 80_000:
            total += size
            yield path
        if total > limit:
            return


def _rows(path: Path) -> list[dict[str, Any]]:
    """A module's text in pieces: each is asked for with the end of the piece before."""
    text = path.read_text(encoding="utf-8", errors="replace")
    pieces = [text[at : at + PIECE] for at in range(0, len(text), PIECE)]
    return [
        {"prompt": f"Continue {path.name}:\n{before[-ASKED:]}", "output": after}
        for before, after in itertools.pairwise(pieces)
    ]


def _question(number: int, row: dict[str, Any]) -> dict[str, Any]:
    return {"question_id": number, "category": "python", "turns": [row["prompt"]]}
