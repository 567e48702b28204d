"""What is measured: questions, the prompts made of them, and the runners that answer.

How a runner decodes is not known here: ours goes through the step, a peer through somebody else's generate. A runner
whose generations have no traces is measured by the wall clock alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from draftsmith.infer.contract.trace import Generation

Messages = list[dict[str, str]]
Encode = Callable[[Messages], list[int]]
Decode = Callable[[list[int]], str]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One row to come. `key` names the row's random streams: the same question and turn has the same key everywhere."""

    key: str
    token_ids: list[int]


@dataclass(frozen=True, slots=True)
class Question:
    """The user's turns; each later turn is asked after the runner's own answers to the earlier ones."""

    id: int | str
    category: str
    turns: tuple[str, ...]
    system: str | None = None

    def head(self) -> Messages:
        """What stands before the first turn."""
        return [{"role": "system", "content": self.system}] if self.system else []


class Runner(Protocol):
    """Answers a batch of prompts, one generation each and in their order, and leaves nothing behind when it raises."""

    @property
    def name(self) -> str: ...

    def prepare(self, prompts: Sequence[Prompt]) -> None:
        """What has to be known beforehand and is not part of what is measured."""
        ...

    def run(self, prompts: Sequence[Prompt]) -> list[Generation]: ...
