"""A record (one conversation, set of questions, answer or document) and the values it is made of, in any format.

`Unusable` says why a row makes no record, in words that can be counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

Kind = Literal[
    "messages", "log", "pair", "sharegpt", "alpaca", "question", "answer", "recorded", "text", "token_ids", "unknown"
]

TIME_FIELDS = ("created", "created_at", "timestamp", "tstamp", "time", "ts")
# Smaller numbers are durations (1e8 s is March 1973); larger ones are milliseconds.
FIRST_DATE, LAST_DATE_IN_SECONDS = 1e8, 1e11


@dataclass(frozen=True, slots=True)
class Message:
    """One turn. `reasoning`: what a thinking model emitted before `content`, if the log keeps the two apart."""

    role: str
    content: str
    reasoning: str = ""

    def to_chat(self) -> dict[str, str]:
        """The dict that chat templates take."""
        chat = {"role": self.role, "content": self.content}
        return {**chat, "reasoning_content": self.reasoning} if self.reasoning else chat


@dataclass(frozen=True, slots=True)
class Record:
    """One row of input text. Fields that the row does not have are empty.

    `messages`: a conversation. `turns`: user turns without answers. `outputs`: answers whose prompts are in another
    file (Spec-Bench's and FastChat's answer files). `text`: a plain document. `token_ids`: the answer (or document) as
    emitted; `prompt_token_ids`: its prompt. Of several turns: `token_ids_by_turn` and `prompt_token_ids_by_turn`, which
    answer files lack. `logprobs_by_turn`: the log-probability of each answer token; `logprobs_mode`: of which
    distribution, as the row says it (processed_logprobs, raw_logprobs); `sampling`: the settings that it names.
    `time`: seconds since 1970.
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
    logprobs_by_turn: list[list[float]] = field(default_factory=list)
    logprobs_mode: str = ""
    sampling: dict[str, Any] = field(default_factory=dict)
    source: str = ""
    row: int = 0
    time: float | None = None

    @property
    def questions(self) -> list[str]:
        """The user turns, answered or not."""
        return list(self.turns) or [message.content for message in self.messages if message.role == "user"]

    @property
    def answers(self) -> list[str]:
        """The assistant's turns."""
        return list(self.outputs) or [message.content for message in self.messages if message.role == "assistant"]

    @property
    def documents(self) -> list[str]:
        """Plain text outside any conversation."""
        return [self.text] if self.text else []

    @property
    def system(self) -> str | None:
        """The system message at the start of the conversation, if any."""
        return self.messages[0].content if self.messages and self.messages[0].role == "system" else None

    @property
    def prompt(self) -> list[Message]:
        """The first prompt: the messages before the first answer, or the first unanswered turn."""
        if self.turns:
            return [*self.messages, Message("user", self.turns[0])]
        first = next((i for i, message in enumerate(self.messages) if message.role == "assistant"), len(self.messages))
        return self.messages[:first]

    def exchanges(self) -> Iterator[tuple[list[Message], Message]]:
        """Each answer, with the messages before it."""
        for i, message in enumerate(self.messages):
            if message.role == "assistant":
                yield self.messages[:i], message


class Unusable(Exception):
    """A well-formed row that cannot be used: `reason` is counted, `detail` shown."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


def body_of(value: Any) -> Mapping[str, Any]:
    """A request or a response without the envelope of batch files."""
    if not isinstance(value, Mapping):
        return {}
    return value["body"] if isinstance(value.get("body"), Mapping) else value


def first_choice(row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    choices = row.get("choices")
    return choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], Mapping) else None


def text_of(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise Unusable(f"{name} is not text", type(value).__name__)
    return value


def texts_of(value: Any, name: str) -> list[str]:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise Unusable(f"{name} is not a list of texts")
    return list(value)


def ids_of(row: Mapping[str, Any], name: str) -> list[int]:
    value = row.get(name)
    if value is None:
        return []
    if not isinstance(value, list) or not all(type(token) is int and token >= 0 for token in value):
        raise Unusable(f"{name} is not a list of token ids")
    return list(value)


def ids_by_turn(row: Mapping[str, Any]) -> dict[str, list[list[int]]]:
    """The ids of each turn's answer and prompt: both, for the same number of turns, or neither."""
    found: dict[str, list[list[int]]] = {}
    for name in ("token_ids_by_turn", "prompt_token_ids_by_turn"):
        if (turns := row.get(name)) is not None:
            if not isinstance(turns, list):
                raise Unusable(f"{name} is not a list of turns")
            found[name] = [ids_of({name: ids}, name) for ids in turns]
    if found and (len(found) < 2 or len({len(turns) for turns in found.values()}) > 1):
        raise Unusable("token_ids_by_turn and prompt_token_ids_by_turn have different numbers of turns")
    return found


def logprobs_of(value: Any) -> list[float]:
    """The log-probabilities of an answer's tokens: a list of numbers, or as OpenAI's chat and completions have them.

    Empty for anything else: few readers need them, and those report that they are missing."""
    if isinstance(value, Mapping) and isinstance(value.get("content"), list):
        value = [one.get("logprob") if isinstance(one, Mapping) else None for one in value["content"]]
    elif isinstance(value, Mapping):
        value = value.get("token_logprobs")
    numbers = isinstance(value, list) and all(type(one) in (int, float) for one in value)
    return [float(one) for one in value] if numbers and isinstance(value, list) else []


def time_of(row: Mapping[str, Any]) -> float | None:
    """The first date in the row, its response or its request (in this order), as seconds since 1970."""
    for place in (row, body_of(row.get("response")), body_of(row.get("request"))):
        for name in TIME_FIELDS:
            if (seconds := _seconds(place.get(name))) is not None:
                return seconds
    return None


def _seconds(value: Any) -> float | None:
    if isinstance(value, str):
        try:
            value = float(value) if value.replace(".", "", 1).isdecimal() else datetime.fromisoformat(value)
        except ValueError:
            return None
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= FIRST_DATE:
        return None
    return float(value) / (1000 if value > LAST_DATE_IN_SECONDS else 1)
