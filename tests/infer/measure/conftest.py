"""A clock that only runners move, runners with known times and tokens, a tokenizer of characters, and run folders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from draftsmith.infer.contract.trace import Generation, StepTrace, Tried
from draftsmith.infer.measure.bench import bench
from draftsmith.infer.measure.figures import summarise
from draftsmith.infer.measure.run_folder import RunFolder
from draftsmith.infer.measure.runners import Messages, Prompt, Question


class FakeClock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def answer_to(prompt: Prompt) -> list[int]:
    """Eight tokens that depend on the prompt, so that another prompt gives another answer."""
    return [97 + (sum(prompt.token_ids) + 7 * i) % 26 for i in range(8)]


@dataclass
class FakeRunner:
    """Commits `per_step` tokens a step of `step_s` seconds, after a prefill of `prefill_s`; the clock moves with it."""

    name: str
    clock: FakeClock
    per_step: int = 1
    step_s: float = 1.0
    prefill_s: float = 0.5
    answer: Callable[[Prompt], list[int]] = answer_to
    traced: bool = True
    drawn: bool = False
    fails_on: Callable[[Prompt], bool] = lambda prompt: False
    calls: list[list[str]] = field(default_factory=list)
    log: list[str] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)

    def prepare(self, prompts: Sequence[Prompt]) -> None:
        pass

    def run(self, prompts: Sequence[Prompt]) -> list[Generation]:
        self.calls.append([prompt.key for prompt in prompts])
        self.log.append(self.name)
        self.prompts += prompts
        for prompt in prompts:
            if self.fails_on(prompt):
                raise RuntimeError(f"cannot answer {prompt.key}\nand more lines")
        generations = [self._one(prompt, len(prompts)) for prompt in prompts]
        steps = max(-(-len(generation.token_ids) // self.per_step) for generation in generations)
        self.clock.now += self.prefill_s + steps * self.step_s
        return generations

    def _one(self, prompt: Prompt, batch: int) -> Generation:
        token_ids = self.answer(prompt)
        traces = []
        for step, at in enumerate(range(0, len(token_ids), self.per_step)):
            committed = len(token_ids[at : at + self.per_step])
            traces.append(make_trace(row=prompt.key, step=step, batch=batch, committed=committed, seconds=self.step_s))
        return Generation(
            row=prompt.key,
            token_ids=token_ids,
            stop="length",
            prompt_tokens=len(prompt.token_ids),
            traces=traces if self.traced else [],
            first_s=self.prefill_s + self.step_s if self.traced else 0.0,
            prefill_s=self.prefill_s / batch if self.traced else 0.0,
        )


def make_trace(
    *,
    committed: int = 1,
    nodes: int | None = None,
    seconds: float = 1.0,
    batch: int = 1,
    step: int = 0,
    row: str = "row",
    tried: Sequence[tuple[int, str, bool]] = (),
    target: float = 0.0,
    draft: float = 0.0,
) -> StepTrace:
    """A trace in which propose, score, verify and commit took a quarter of the seconds each."""
    accepted = committed - 1
    return StepTrace(
        row=row,
        step=step,
        batch=batch,
        context=10,
        nodes=accepted if nodes is None else nodes,
        trials=len(tried),
        depth=accepted,
        accepted=accepted,
        committed=committed,
        tried=[Tried(depth, source, 0.5, kept) for depth, source, kept in tried],
        committed_sources=["draft"] * accepted + ["target"],
        propose_s=seconds / 4,
        score_s=seconds / 4,
        verify_s=seconds / 4,
        commit_s=seconds / 4,
        target_forward_s=target,
        draft_forward_s=draft,
    )


def encode(messages: Messages) -> list[int]:
    return [ord(letter) for message in messages for letter in f"{message['role'][0]}:{message['content']};"]


def decode(token_ids: list[int]) -> str:
    return "".join(map(chr, token_ids))


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def fake(clock):
    """Make a runner on this test's clock."""

    def make(name: str, **options) -> FakeRunner:
        return FakeRunner(name, clock, **options)

    return make


@pytest.fixture
def trace():
    return make_trace


@pytest.fixture
def coders():
    return encode, decode


@pytest.fixture
def questions():
    """Six questions of one turn, in two categories of MT-Bench and one other."""
    categories = ["writing", "math", "qa"]
    return [Question(i, categories[i % 3], (f"question {i}",)) for i in range(6)]


@pytest.fixture
def run_folder(fake, clock, tmp_path):
    """Write a finished run: `runners` maps labels to FakeRunner options; plain decoding is always there.

    By default nine questions in three categories: enough for intervals.
    """
    nine = [Question(i, ["writing", "math", "qa"][i % 3], (f"question {i}",)) for i in range(9)]

    def write(
        name: str, runners: dict[str, dict], *, asked=None, batch_size=1, change=None, plain=None, **config
    ) -> Path:
        made = [fake("plain", **(plain or {})), *(fake(label, **options) for label, options in runners.items())]
        measured = bench(made, asked or nine, encode, decode, batch_size=batch_size, clock=clock)
        results = summarise(measured)
        for figures in results["drafters"].values():
            figures["ties"] = 0
        if change is not None:
            change(results)
        config = {"target": "", "drafters": ",".join(runners), "batch_size": batch_size, **config}
        folder = RunFolder.create(tmp_path / name)
        sampling = {"temperature": config.get("temperature", 0.0)}
        folder.write_run({"command": ["draftsmith", "bench"], "config": config, "seed": 0, "sampling": sampling})
        folder.write_measured(measured, results)
        return folder.path

    return write
