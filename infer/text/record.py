"""A record: one conversation, set of questions, answer or document, whatever format it was written in.

Which formats there are is not known here (record_formats.py), nor is any tokenizer (templates.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

Kind = Literal[
    "messages", "log", "pair", "sharegpt", "alpaca", "question", "answer", "recorded", "text", "token_ids", "unknown"
]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `reasoning` is what a thinking model emitted before `content`, where the log keeps the two apart."""

    role: str
    content: str
    reasoning: str = ""

    def to_chat(self) -> dict[str, str]:
        """As chat templates take it."""
        chat = {"role": self.role, "content": self.content}
        return {**chat, "reasoning_content": self.reasoning} if self.reasoning else chat


@dataclass(frozen=True, slots=True)
class Record:
    """One row of text in. What the row does not have is empty.

    `messages`: a conversation in its order. `turns`: user turns that wait for answers. `outputs`: answers whose prompts
    are elsewhere (Spec-Bench's answer files). `text`: a plain document. `token_ids`: the answer (or the document) as
    the engine emitted it, `prompt_token_ids` what it was given; of several turns, `token_ids_by_turn` and what each was
    given, `prompt_token_ids_by_turn`. `time` is seconds since 1970.
    """

    id: str
    category: str = ""
    kind: Kind = "unknown"
    messages: list[Message] = field(default_factory=list)
    turns: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    prompt_token_ids: list[int] = field(default_factory=list)
    token_ids_by_turn: list[list[int]] = field(default_factory=list)
    prompt_token_ids_by_turn: list[list[int]] = field(default_factory=list)
    source: str = ""
    row: int = 0
    time: float | None = None

    @property
    def questions(self) -> list[str]:
        """The user turns, in order, answered or not."""
        return list(self.turns) or [message.content for message in self.messages if message.role == "user"]

    @property
    def answers(self) -> list[str]:
        """The assistant's turns, in order."""
        return list(self.outputs) or [message.content for message in self.messages if message.role == "assistant"]

    @property
    def documents(self) -> list[str]:
        """Plain text that belongs to no conversation."""
        return [self.text] if self.text else []

    @property
    def system(self) -> str | None:
        """The system message, where the conversation starts with one."""
        return self.messages[0].content if self.messages and self.messages[0].role == "system" else None

    @property
    def prompt(self) -> list[Message]:
        """What a model is given first: the messages up to the first answer, or the first of the waiting turns."""
        if self.turns:
            return [Message("user", self.turns[0])]
        first = next((i for i, message in enumerate(self.messages) if message.role == "assistant"), len(self.messages))
        return self.messages[:first]

    def exchanges(self) -> Iterator[tuple[list[Message], Message]]:
        """Each answer with all the messages that stood before it."""
        for i, message in enumerate(self.messages):
            if message.role == "assistant":
                yield self.messages[:i], message
