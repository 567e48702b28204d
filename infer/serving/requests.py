"""What a request may ask for: OpenAI's fields, and some that vLLM added. Unknown and unsupported ones are refused by
name.

Fields that would change the answer, and that lossless drafting or this server does not support, are accepted only with
the values that change nothing, because clients send those by default.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from draftsmith.infer.serving.errors import ApiError, bad_request

MOST_STOPS = 16
MOST_TOP_LOGPROBS = 20

# Fields that are not supported, with the values that mean the same as leaving them out.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none", "auto"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False),
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "reasoning_effort": (None,),
    "response_format": (None, {"type": "text"}),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "suffix": (None, ""),
    "tool_choice": (None, "auto", "none"),
    "verbosity": (None,),
    "web_search_options": (None,),
}
# Labels for the provider's books, which change nothing about the answer.
LABELS = ("metadata", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "user")

Asked = TypeVar("Asked", bound="Sampled")
Text = Annotated[str, Field(min_length=1)]
TokenId = Annotated[int, Field(ge=0)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class CalledFunction(_Strict):
    name: str
    arguments: str


class ToolCall(_Strict):
    id: str
    type: Literal["function"] = "function"
    function: CalledFunction


class ChatMessage(_Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    refusal: None = None
    annotations: Any = None
    audio: None = None
    function_call: None = None


class ToolFunction(_Strict):
    name: Text
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Strict):
    type: Literal["function"]
    function: ToolFunction


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False


class Sampled(_Strict):
    """What chat completions and completions have in common."""

    model: str
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 63)] | None = None
    stop: Text | Annotated[list[Text], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # vLLM's
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0)] | None = None
    stop_token_ids: list[TokenId] | None = None
    return_token_ids: bool | None = None
    # See NEUTRAL and LABELS.
    frequency_penalty: Any = None
    presence_penalty: Any = None
    logit_bias: Any = None
    user: Any = None

    @property
    def samples(self) -> int:
        """How many answers to each prompt."""
        return self.n or 1

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def most_tokens(self) -> int | None:
        """The limit of new tokens that the request gives, if it gives one."""
        return self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """How many of the likeliest tokens to report beside each token; None: report no log-probabilities."""
        raise NotImplementedError

    @property
    def with_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class ChatRequest(Sampled):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    tools: list[Tool] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None  # vLLM's
    # See NEUTRAL and LABELS.
    audio: Any = None
    function_call: Any = None
    functions: Any = None
    metadata: Any = None
    modalities: Any = None
    parallel_tool_calls: Any = None
    prediction: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    reasoning_effort: Any = None
    response_format: Any = None
    safety_identifier: Any = None
    service_tier: Any = None
    store: Any = None
    tool_choice: Any = None
    verbosity: Any = None
    web_search_options: Any = None

    @property
    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Sampled):
    prompt: Text | list[Text] | list[TokenId] | list[list[TokenId]]
    logprobs: Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS)] | None = None
    # See NEUTRAL.
    best_of: Any = None
    echo: Any = None
    suffix: Any = None

    @property
    def prompts(self) -> list[str | list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)  # type: ignore[arg-type]

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs


def parse(body: bytes, kind: type[Asked]) -> Asked:
    """The request in a body; ApiError 400 names the field that is wrong."""
    try:
        asked = kind.model_validate_json(body)
    except ValidationError as problem:
        raise _first_error(problem) from problem
    for name, neutral in NEUTRAL.items():
        value = getattr(asked, name, None)
        if not any(value == one and isinstance(value, bool) == isinstance(one, bool) for one in neutral):
            raise bad_request(f"{name} is not supported here: leave it out", name, "unsupported_parameter")
    _check_together(asked)
    return asked


def _check_together(asked: Sampled) -> None:
    if asked.stream_options is not None and not asked.stream:
        raise bad_request("stream_options needs stream=true", "stream_options")
    if isinstance(asked, CompletionRequest):
        if not asked.prompts or not all(asked.prompts):
            raise bad_request("prompt is empty: give a text or token ids", "prompt")
        return
    assert isinstance(asked, ChatRequest)
    if asked.top_logprobs is not None and not asked.logprobs:
        raise bad_request("top_logprobs needs logprobs=true", "top_logprobs")
    limits = {asked.max_tokens, asked.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise bad_request("max_tokens and max_completion_tokens differ: give one of them", "max_completion_tokens")


def _first_error(problem: ValidationError) -> ApiError:
    """The error that says most: a value that is wrong where its type is right."""
    errors = problem.errors(include_url=False, include_input=False)
    first = max(errors, key=lambda one: len(one["loc"]))
    if first["type"] == "json_invalid":
        return bad_request(f"the body is not JSON: {first['ctx']['error']}")
    where = "".join(_steps(first["loc"])).removeprefix(".")
    if not where:
        return bad_request("the body must be a JSON object")
    if first["type"] == "extra_forbidden":
        return bad_request(f"unknown field {where}", where, "unknown_parameter")
    return bad_request(f"{where}: {_plain(first['msg'])}", where)


def _steps(places: tuple[int | str, ...]) -> Iterator[str]:
    """A path such as .messages[0].content, without pydantic's names for the members of a union."""
    for place in places:
        if isinstance(place, int):
            yield f"[{place}]"
        elif re.fullmatch(r"[a-z_]\w*", place) and place not in ("str", "int", "float", "bool", "dict", "none"):
            yield f".{place}"


def _plain(message: str) -> str:
    return message[:1].lower() + message[1:]
