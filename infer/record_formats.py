"""From one row, as some tool wrote it, to one `Record`. The format is found in the row itself; no flag names it.

Read are: OpenAI-style `messages`, request/response logs, prompt and output pairs, ShareGPT, Alpaca, Spec-Bench
questions and answers, recorded multi-turn answers, plain text, token ids. A row that cannot be used raises `Unusable`,
which says why in words that can be counted.

Files, folders and compression are not known here (read_files.py), nor is any tokenizer (templates.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from draftsmith.infer.record import Kind, Message, Record

ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
    "bing": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
}
PROMPT_FIELDS = ("prompt", "question", "query", "input")
OUTPUT_FIELDS = ("output", "response", "completion", "answer")
ID_FIELDS = ("question_id", "id", "custom_id", "request_id", "conversation_id")
TIME_FIELDS = ("created", "timestamp", "tstamp", "time")
# Numbers below this are durations, not dates (it is March 1973); numbers above the second one are milliseconds.
FIRST_DATE, LAST_DATE_IN_SECONDS = 1e8, 1e11


class Unusable(Exception):
    """A row that is well-formed and yet holds nothing to be used: `reason` is counted, `detail` shown."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.detail = detail


Note = Callable[[str], None]


def detect(row: Any) -> Kind:
    """Which format `row` is in, by the names of its fields."""
    if isinstance(row, str):
        return "text"
    if not isinstance(row, Mapping):
        return "unknown"
    given = {name for name, value in row.items() if value is not None}
    tests: list[tuple[Kind, bool]] = [
        ("log", isinstance(row.get("request"), Mapping) or (isinstance(row.get("body"), Mapping))),
        ("sharegpt", isinstance(row.get("conversations"), list) or isinstance(row.get("conversation"), list)),
        ("messages", "messages" in given),
        ("answer", "turns" in (_first_choice(row) or {})),
        ("recorded", {"turns", "outputs"} <= given),
        ("question", "turns" in given),
        ("alpaca", "instruction" in given),
        ("pair", not given.isdisjoint(PROMPT_FIELDS)),
        ("text", "text" in given or ("content" in given and "role" not in given)),
        ("token_ids", "token_ids" in given),
    ]
    return next((kind for kind, found in tests if found), "unknown")


def parse(row: Any, source: str, number: int, default_id: str, note: Note = lambda reason: None) -> Record:
    """The record of one row; `Unusable` where there is none. `note` hears of what was left aside in a usable row."""
    kind = detect(row)
    if kind == "unknown":
        fields = f"fields: {', '.join(map(str, list(row)[:8]))}" if isinstance(row, Mapping) else ""
        raise Unusable("no field that is read" if fields else "not an object", fields or type(row).__name__)
    if isinstance(row, str):
        row = {"text": row}
    parts = _READERS[kind](row, note)
    ids = {"token_ids": _ids(row, "token_ids"), "prompt_token_ids": _ids(row, "prompt_token_ids")}
    parts = {**{name: value for name, value in ids.items() if value}, **parts}
    given_id = next((row[name] for name in ID_FIELDS if isinstance(row.get(name), str | int)), None)
    record = Record(
        id=default_id if given_id is None or given_id == "" else str(given_id),
        category=str(row.get("category") or ""),
        kind=kind,
        source=source,
        row=number,
        time=_time(row),
        **parts,
    )
    _check_text(record)
    return record


def has_id(row: Any) -> bool:
    """Whether the row names itself."""
    return isinstance(row, Mapping) and any(isinstance(row.get(name), str | int) for name in ID_FIELDS)


def _check_text(record: Record) -> None:
    """Refuse what no tokenizer could take, and turns with nothing in them."""
    for message in record.messages:
        if message.role in ("user", "assistant") and not (message.content.strip() or message.reasoning.strip()):
            raise Unusable(f"an empty {message.role} turn")
    if any(not text.strip() for text in (*record.turns, *record.outputs)):
        raise Unusable("an empty turn")
    if not (record.questions or record.answers or record.text.strip() or record.token_ids):
        raise Unusable("no text in it")
    texts = (*(message.content for message in record.messages), *record.turns, *record.outputs, record.text)
    for text in texts:
        try:
            text.isascii() or text.encode()
        except UnicodeEncodeError:
            raise Unusable("text with half a surrogate pair") from None


# --- one reader per format: row -> the fields of Record that it fills


def _read_messages(row: Mapping[str, Any], note: Note) -> dict[str, Any]:
    messages = _messages(row["messages"])
    if messages and messages[-1].role != "assistant" and (answer := _output(row, note)):
        messages.append(answer)
    return {"messages": messages}


def _read_log(row: Mapping[str, Any], note: Note) -> dict[str, Any]:
    request = _body(row.get("request", row))
    response = _body(row.get("response"))
    if isinstance(request.get("messages"), list):
        messages = _messages(request["messages"])
    elif request.get("prompt") is not None:
        messages = _prompt(request["prompt"], "prompt")
    else:
        raise Unusable("a request without messages or prompt", f"fields: {', '.join(map(str, list(request)[:8]))}")
    if isinstance(row.get("response"), str):
        messages.append(Message("assistant", row["response"]))
        return {"messages": messages}
    if response.get("error") and not response.get("choices"):
        raise Unusable("a response that is an error")
    parts: dict[str, Any] = {"messages": messages}
    if answer := _output(response, note):
        messages.append(answer)
        choice = _first_choice(response) or {}
        for name in ("token_ids", "prompt_token_ids"):
            if ids := _ids(choice, name) or _ids(response, name):
                parts[name] = ids
    return parts


def _read_sharegpt(row: Mapping[str, Any], note: Note) -> dict[str, Any]:
    given = row.get("conversations")
    messages = _messages(given if given is not None else row["conversation"])
    if isinstance(row.get("system"), str) and row["system"] and (not messages or messages[0].role != "system"):
        messages.insert(0, Message("system", row["system"]))
    return {"messages": messages}


def _read_answer(row: Mapping[str, Any], note: Note) -> dict[str, Any]:
    if len(row["choices"]) > 1:
        note("more than one choice: the first was read")
    return {"outputs": _texts(row["choices"][0]["turns"], "choices[0].turns")}


def _read_question(row: Mapping[str, Any], note: Note) -> dict[str, Any]:
    return {"turns": _texts(row["turns"], "turns")}


def _read_recorded(row: Mapping[str, Any], note: Note) -> dict[str, Any]:
    turns, outputs = _texts(row["turns"], "turns"), _texts(row["outputs"], "outputs")
    if len(outputs) > len(turns):
        raise Unusable("more outputs than turns")
    if len(outputs) < len(turns):
        note("fewer outputs than turns: the unanswered turns were left aside")
    pairs = zip(turns, outputs)
    return {"messages": [m for turn, out in pairs for m in (Message("user", turn), Message("assistant", out))]}


def _read_alpaca(row: Mapping[str, Any], note: Note) -> dict[str, Any]:
    instruction, given = _text(row["instruction"], "instruction"), row.get("input")
    prompt = f"{instruction}\n{_text(given, 'input')}" if given else instruction
    return _pair([Message("user", prompt)], _output(row, note))


def _read_pair(row: Mapping[str, Any], note: Note) -> dict[str, Any]:
    name = next(name for name in PROMPT_FIELDS if row.get(name) is not None)
    return _pair(_prompt(row[name], name), _output(row, note))


def _read_text(row: Mapping[str, Any], note: Note) -> dict[str, Any]:
    name = "text" if row.get("text") is not None else "content"
    return {"text": _text(row[name], name)}


def _read_token_ids(row: Mapping[str, Any], note: Note) -> dict[str, Any]:
    return {}


_READERS: dict[Kind, Callable[[Mapping[str, Any], Note], dict[str, Any]]] = {
    "messages": _read_messages,
    "log": _read_log,
    "sharegpt": _read_sharegpt,
    "answer": _read_answer,
    "question": _read_question,
    "recorded": _read_recorded,
    "alpaca": _read_alpaca,
    "pair": _read_pair,
    "text": _read_text,
    "token_ids": _read_token_ids,
}


# --- values


def _pair(messages: list[Message], answer: Message | None) -> dict[str, Any]:
    """A prompt and its answer; without an answer, a lone user turn is a question."""
    if answer:
        return {"messages": [*messages, answer]}
    return {"turns": [messages[0].content]} if [m.role for m in messages] == ["user"] else {"messages": messages}


def _body(value: Any) -> Mapping[str, Any]:
    """A request or a response, out of the envelope that batch files put around it."""
    if not isinstance(value, Mapping):
        return {}
    return value["body"] if isinstance(value.get("body"), Mapping) else value


def _prompt(value: Any, name: str) -> list[Message]:
    if isinstance(value, list) and value and all(isinstance(part, Mapping) for part in value):
        return _messages(value)
    return [Message("user", _text(value, name))]


def _output(row: Mapping[str, Any], note: Note) -> Message | None:
    """The answer in a row or a response, or None where there is none."""
    if (choice := _first_choice(row)) is not None:
        if len(row["choices"]) > 1:
            note("more than one choice: the first was read")
        if choice.get("finish_reason") == "length":
            note("an answer that was cut at its length limit")
        if choice.get("message") is not None:
            return _message(choice["message"])
        return Message("assistant", _text(choice.get("text"), "choices[0].text"))
    name = next((name for name in OUTPUT_FIELDS if row.get(name) is not None), None)
    if name is None:
        return None
    if isinstance(row[name], list) and row[name] and isinstance(row[name][0], Mapping):
        return _message(row[name][0])
    return Message("assistant", _text(row[name], name))


def _first_choice(row: Mapping[str, Any]) -> Mapping[str, Any] | None:
    choices = row.get("choices")
    return choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], Mapping) else None


def _messages(value: Any) -> list[Message]:
    if not isinstance(value, list) or not value:
        raise Unusable("a conversation without messages")
    return [_message(message) for message in value]


def _message(value: Any) -> Message:
    if not isinstance(value, Mapping):
        raise Unusable("a message that is not an object", type(value).__name__)
    given = value.get("role", value.get("from"))
    role = ROLES.get(given) if isinstance(given, str) else None
    if role is None:
        raise Unusable("a message of an unknown role", f"role: {given}")
    if value.get("tool_calls") or value.get("function_call"):
        raise Unusable("tool calls, which are not read")
    reasoning = value.get("reasoning_content") or value.get("reasoning") or ""
    content = value.get("content", value.get("value"))
    if isinstance(content, list):
        content = "".join(_part(part) for part in content)
    if content is None:
        content = ""
    return Message(role, _text(content, "content"), _text(reasoning, "reasoning_content"))


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return part["text"]
    raise Unusable("content that is not text", str(part.get("type")) if isinstance(part, Mapping) else "")


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise Unusable(f"{name} is not text", type(value).__name__)
    return value


def _texts(value: Any, name: str) -> list[str]:
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise Unusable(f"{name} is not a list of texts")
    return list(value)


def _ids(row: Mapping[str, Any], name: str) -> list[int]:
    value = row.get(name)
    if value is None:
        return []
    if not isinstance(value, list) or not all(type(token) is int and token >= 0 for token in value):
        raise Unusable(f"{name} is not a list of token ids")
    return list(value)


def _time(row: Mapping[str, Any]) -> float | None:
    """The first date in the row, its response or its request, in seconds since 1970."""
    for place in (row, _body(row.get("response")), _body(row.get("request"))):
        for name in TIME_FIELDS:
            if (seconds := _seconds(place.get(name))) is not None:
                return seconds
    return None


def _seconds(value: Any) -> float | None:
    if isinstance(value, str):
        try:
            value = datetime.fromisoformat(value)
        except ValueError:
            return None
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
    if isinstance(value, bool) or not isinstance(value, int | float) or not value >= FIRST_DATE:
        return None
    return float(value) / (1000 if value > LAST_DATE_IN_SECONDS else 1)
