"""Rows made of requests: messages through the target's template, texts and token ids for completions.

The tokenizer is a copy of the server's own: others use the target's in the engine's thread.
"""

from __future__ import annotations

import copy
import json
import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from draftsmith.infer.contract.protocols import Target
from draftsmith.infer.contract.row import Row
from draftsmith.infer.engine.prompts import rows_of
from draftsmith.infer.serving.errors import bad_request
from draftsmith.infer.serving.requests import ChatMessage, ChatRequest, CompletionRequest, Sampled
from draftsmith.infer.text.record import Message
from draftsmith.infer.text.templates import find_template
from draftsmith.infer.text.tokenizer import Encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Beyond any seed that a client gives, so that it need not be one that somebody else gave.
RANDOM_BITS = 62


class PromptRows:
    """Makes rows for `target`, of at most `max_new_tokens` new tokens each.

    A row's key is the number of the answer among those to its prompt, so that the same request with the same seed has
    the same answers whatever else is decoded, and whenever it comes.
    """

    def __init__(self, target: Target, template: str, max_new_tokens: int) -> None:
        if target.tokenizer is None:
            raise ValueError("this target has no tokenizer, and a server takes texts")
        self.target = target
        self.tokenizer: PreTrainedTokenizerBase = copy.deepcopy(target.tokenizer)
        self.max_new_tokens = max_new_tokens
        self.template = find_template(template, self.tokenizer)
        self._whole = Encoder(self.tokenizer, add_special_tokens=True)
        self._rendered = Encoder(self.tokenizer, add_special_tokens=False)

    def of_chat(self, asked: ChatRequest) -> list[Row]:
        return self._rows(asked, [self.chat_ids(asked)])

    def of_completion(self, asked: CompletionRequest) -> list[Row]:
        """For each prompt as many rows as it asks for, prompt by prompt."""
        ids = [self._whole.encode(prompt) if isinstance(prompt, str) else prompt for prompt in asked.prompts]
        return self._rows(asked, ids)

    def _rows(self, asked: Sampled, prompts: Sequence[list[int]]) -> list[Row]:
        seed = secrets.randbits(RANDOM_BITS) if asked.seed is None else asked.seed
        limit = self.max_new_tokens if asked.most_tokens is None else asked.most_tokens
        if limit > self.max_new_tokens:
            raise bad_request(
                f"{limit} new tokens are more than the {self.max_new_tokens} that this server gives per answer",
                "max_tokens",
            )
        rows: list[Row] = []
        for ids in prompts:
            self._check_length(len(ids))
            try:
                made = rows_of(
                    self.target,
                    [(str(number), ids) for number in range(asked.samples)],
                    seed=seed,
                    stop=asked.stops,
                    stop_ids=asked.stop_token_ids or (),
                    max_new_tokens=limit,
                    temperature=asked.temperature,
                    top_p=asked.top_p,
                    top_k=None if asked.top_k is None else max(asked.top_k, 0),
                    min_p=asked.min_p,
                    repetition_penalty=asked.repetition_penalty,
                )
                for row in made:
                    row.check(self.target.vocab_size, self.target.max_positions)
            except ValueError as problem:
                raise bad_request(str(problem)) from problem
            rows += made
        return rows

    def _check_length(self, tokens: int) -> None:
        most = self.target.max_positions
        if tokens >= most:
            raise bad_request(
                f"the prompt has {tokens} tokens, and this model's context of {most} must hold the answer too",
                "messages",
                "context_length_exceeded",
            )

    def chat_ids(self, asked: ChatRequest) -> list[int]:
        """The prompt for an answer to the request's messages."""
        tools = None if asked.tool_choice == "none" else asked.tools
        if self.template.name != "chat":
            if tools or asked.chat_template_kwargs or any(message.tool_calls for message in asked.messages):
                raise bad_request(
                    f"this server renders chats with the template {self.template.name!r}, which takes no tools and no "
                    "chat_template_kwargs",
                    "tools" if tools else None,
                )
            try:
                return self.template.prompt_ids([_plain(message) for message in asked.messages])
            except ValueError as problem:
                raise bad_request(str(problem), "messages") from problem
        given = {} if tools is None else {"tools": [tool.model_dump(exclude_none=True) for tool in tools]}
        extra = asked.chat_template_kwargs or {}
        taken = extra.keys() & {"conversation", "tokenize", "add_generation_prompt", "return_dict", "tools"}
        if taken:
            raise bad_request(f"chat_template_kwargs may not set {min(taken)}", "chat_template_kwargs")
        chat = [_as_dict(message) for message in asked.messages]
        try:
            text = self.tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=True, **given, **extra
            )
        except Exception as problem:  # a template is a program of the model's author, and fails in its own ways
            reason = " ".join(str(problem).split()) or type(problem).__name__
            raise bad_request(f"the chat template refuses this conversation: {reason}", "messages") from problem
        return self._rendered.encode(str(text))


def _text(message: ChatMessage) -> str:
    if isinstance(message.content, list):
        return "\n".join(part.text for part in message.content)
    return message.content or ""


def _role(message: ChatMessage) -> str:
    return "system" if message.role == "developer" else message.role


def _plain(message: ChatMessage) -> Message:
    return Message(_role(message), _text(message), message.reasoning_content or "")


def _as_dict(message: ChatMessage) -> dict[str, Any]:
    """A message as chat templates take it: arguments of calls are objects, not their JSON text."""
    made: dict[str, Any] = {"role": _role(message), "content": _text(message)}
    for name in ("name", "reasoning_content", "tool_call_id"):
        value = getattr(message, name)
        if value is not None:
            made[name] = value
    if message.tool_calls:
        made["tool_calls"] = [
            {
                "id": call.id,
                "type": call.type,
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return made


def _arguments(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except (ValueError, RecursionError) as problem:
        raise bad_request(f"the arguments of a tool call are not JSON: {problem}", "messages") from problem
    if not isinstance(found, dict):
        raise bad_request("the arguments of a tool call must be a JSON object", "messages")
    return found
