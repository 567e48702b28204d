"""Turns one row, as some tool wrote it, into a `Record`. The format is detected from the row's field names.

Formats: OpenAI-style `messages`, request/response logs, prompt and output pairs, ShareGPT, Alpaca, Spec-Bench
questions and answers, recorded multi-turn answers, plain text, token ids.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from draftsmith.infer.text.record import (
    Kind,
    Message,
    Record,
    Unusable,
    body_of,
    first_choice,
    ids_by_turn,
    ids_of,
    logprobs_of,
    text_of,
    texts_of,
    time_of,
)

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
MANY_CHOICES = "more than one choice: the first was read"

Note = Callable[[str], None]


def detect(row: Any) -> Kind:
    """The format of `row`, by the names of its fields."""
    if isinstance(row, str):
        return "text"
    if not isinstance(row, Mapping):
        return "unknown"
    given = {name for name, value in row.items() if value is not None}
    tests: list[tuple[Kind, bool]] = [
        ("log", isinstance(row.get("request"), Mapping) or isinstance(row.get("body"), Mapping)),
        ("sharegpt", isinstance(row.get("conversations"), list) or isinstance(row.get("conversation"), list)),
        ("messages", "messages" in given),
        ("answer", "turns" in (first_choice(row) or {})),
        ("recorded", {"turns", "outputs"} <= given),
        ("question", "turns" in given),
        ("alpaca", "instruction" in given),
        ("pair", not given.isdisjoint(PROMPT_FIELDS)),
        ("text", "text" in given or ("content" in given and "role" not in given)),
        ("token_ids", "token_ids" in given),
    ]
    return next((kind for kind, found in tests if found), "unknown")


def parse(row: Any, source: str, number: int, default_id: str, note: Note = lambda reason: None) -> Record:
    """The record of one row, or `Unusable`. `note` is called with what a usable row holds that was left out."""
    kind = detect(row)
    if kind == "unknown":
        fields = f"fields: {', '.join(map(str, list(row)[:8]))}" if isinstance(row, Mapping) else ""
        raise Unusable("no known field" if fields else "not an object", fields or type(row).__name__)
    if isinstance(row, str):
        row = {"text": row}
    parts = _READERS[kind](row, note)
    ids = {name: ids_of(row, name) for name in ("token_ids", "prompt_token_ids")}
    parts = {**{name: value for name, value in ids.items() if value}, **ids_by_turn(row), **_logged(row), **parts}
    given_id = next((row[name] for name in ID_FIELDS if isinstance(row.get(name), str | int)), None)
    record = Record(
        id=default_id if given_id is None or given_id == "" else str(given_id),
        category=str(row.get("category") or ""),
        kind=kind,
        source=source,
        row=number,
        time=time_of(row),
        **parts,
    )
    _check_text(record)
    return record


# The settings of a request that decide how its tokens were drawn.
SAMPLING_FIELDS = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "logit_bias",
)  # fmt: skip


def _logged(row: Mapping[str, Any]) -> dict[str, Any]:
    """Log-probabilities and settings as `draftsmith answers` writes them."""
    found: dict[str, Any] = {}
    if flat := logprobs_of(row.get("logprobs")):
        found["logprobs_by_turn"] = [flat]
    if isinstance(turns := row.get("logprobs_by_turn"), list):
        found["logprobs_by_turn"] = [logprobs_of(one) for one in turns]
    if isinstance(row.get("logprobs_mode"), str):
        found["logprobs_mode"] = row["logprobs_mode"]
    if isinstance(row.get("sampling"), Mapping):
        found["sampling"] = dict(row["sampling"])
    return found


def has_id(row: Any) -> bool:
    """Whether the row has an id of its own."""
    return isinstance(row, Mapping) and any(isinstance(row.get(name), str | int) for name in ID_FIELDS)


def _check_text(record: Record) -> None:
    """Refuse empty turns, and text that no tokenizer accepts."""
    for message in record.messages:
        if message.role in ("user", "assistant") and not (message.content.strip() or message.reasoning.strip()):
            raise Unusable(f"an empty {message.role} turn")
    if any(not text.strip() for text in (*record.turns, *record.outputs)):
        raise Unusable("an empty turn")
    if not (record.questions or record.answers or record.text.strip() or record.token_ids):
        raise Unusable("no text")
    texts = (*(message.content for message in record.messages), *record.turns, *record.outputs, record.text)
    for text in texts:
        try:
            text.isascii() or text.encode()
        except UnicodeEncodeError:
            raise Unusable("text with a lone surrogate") from None


# One reader per format: row -> the fields of Record that it fills.


def _read_messages(row: Mapping[str, Any], note: Note) -> dict[str, Any]:
    messages = _messages(row["messages"])
    if messages and messages[-1].role != "assistant" and (answer := _output(row, note)):
        messages.append(answer)
    return {"messages": messages}


def _read_log(row: Mapping[str, Any], note: Note) -> dict[str, Any]:
    request = body_of(row.get("request", row))
    response = body_of(row.get("response"))
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
        choice = first_choice(response) or {}
        for name in ("token_ids", "prompt_token_ids"):
            if ids := ids_of(choice, name) or ids_of(response, name):
                parts[name] = ids
        if logprobs := logprobs_of(choice.get("logprobs")):
            parts["logprobs_by_turn"] = [logprobs]
    if sampling := {name: request[name] for name in SAMPLING_FIELDS if request.get(name) is not None}:
        parts["sampling"] = sampling
    return parts


def _read_sharegpt(row: Mapping[str, Any], note: Note) -> dict[str, Any]:
    given = row.get("conversations")
    messages = _messages(given if given is not None else row["conversation"])
    if isinstance(row.get("system"), str) and row["system"] and (not messages or messages[0].role != "system"):
        messages.insert(0, Message("system", row["system"]))
    return {"messages": messages}


def _read_answer(row: Mapping[str, Any], note: Note) -> dict[str, Any]:
    if len(row["choices"]) > 1:
        note(MANY_CHOICES)
    choice = row["choices"][0]
    outputs = texts_of(choice["turns"], "choices[0].turns")
    given = choice.get("token_ids") or []
    if not isinstance(given, list) or len(given) not in (0, len(outputs)):
        raise Unusable("choices[0].token_ids has not one list per turn")
    return {"outputs": outputs, "token_ids_by_turn": [ids_of({"token_ids": ids}, "token_ids") for ids in given]}


def _read_question(row: Mapping[str, Any], note: Note) -> dict[str, Any]:
    system = row.get("system")
    messages = [Message("system", text_of(system, "system"))] if system else []
    return {"turns": texts_of(row["turns"], "turns"), "messages": messages}


def _read_recorded(row: Mapping[str, Any], note: Note) -> dict[str, Any]:
    turns, outputs = texts_of(row["turns"], "turns"), texts_of(row["outputs"], "outputs")
    if len(outputs) > len(turns):
        raise Unusable("more outputs than turns")
    if len(outputs) < len(turns):
        note("fewer outputs than turns: the unanswered turns were left out")
    pairs = zip(turns, outputs)
    return {"messages": [m for turn, out in pairs for m in (Message("user", turn), Message("assistant", out))]}


def _read_alpaca(row: Mapping[str, Any], note: Note) -> dict[str, Any]:
    instruction, given = text_of(row["instruction"], "instruction"), row.get("input")
    prompt = f"{instruction}\n{text_of(given, 'input')}" if given else instruction
    return _pair([Message("user", prompt)], _output(row, note))


def _read_pair(row: Mapping[str, Any], note: Note) -> dict[str, Any]:
    name = next(name for name in PROMPT_FIELDS if row.get(name) is not None)
    return _pair(_prompt(row[name], name), _output(row, note))


def _read_text(row: Mapping[str, Any], note: Note) -> dict[str, Any]:
    name = "text" if row.get("text") is not None else "content"
    return {"text": text_of(row[name], name)}


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
    "token_ids": lambda row, note: {},
}


def _pair(messages: list[Message], answer: Message | None) -> dict[str, Any]:
    """A prompt and its answer. A lone user turn without an answer is a question."""
    if answer:
        return {"messages": [*messages, answer]}
    return {"turns": [messages[0].content]} if [m.role for m in messages] == ["user"] else {"messages": messages}


def _prompt(value: Any, name: str) -> list[Message]:
    if isinstance(value, list) and value and all(isinstance(part, Mapping) for part in value):
        return _messages(value)
    return [Message("user", text_of(value, name))]


def _output(row: Mapping[str, Any], note: Note) -> Message | None:
    """The answer in a row or a response, if any."""
    if (choice := first_choice(row)) is not None:
        if len(row["choices"]) > 1:
            note(MANY_CHOICES)
        if choice.get("finish_reason") == "length":
            note("an answer that was cut at its length limit")
        if choice.get("message") is not None:
            return _message(choice["message"])
        return Message("assistant", text_of(choice.get("text"), "choices[0].text"))
    name = next((name for name in OUTPUT_FIELDS if row.get(name) is not None), None)
    if name is None:
        return None
    if isinstance(row[name], list) and row[name] and isinstance(row[name][0], Mapping):
        return _message(row[name][0])
    return Message("assistant", text_of(row[name], name))


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
        raise Unusable("tool calls, which are not supported")
    reasoning = value.get("reasoning_content") or value.get("reasoning") or ""
    content = value.get("content", value.get("value"))
    if isinstance(content, list):
        content = "".join(_part(part) for part in content)
    if content is None:
        content = ""
    return Message(role, text_of(content, "content"), text_of(reasoning, "reasoning_content"))


def _part(part: Any) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, Mapping) and isinstance(part.get("text"), str):
        return part["text"]
    raise Unusable("content that is not text", str(part.get("type")) if isinstance(part, Mapping) else "")
