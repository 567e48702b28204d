"""Conversations to token ids *as served*, with a loss mask.

What a model meets when it serves turn k is the ids of the prompt up to that turn, then the ids that it emits itself. So
each assistant turn is rendered as exactly that: `prompt_ids(messages before it)`, then the answer up to and including
the end-of-turn token. A tokenizer may merge across the border if the whole text is given to it at once; where it
does, the answer is tokenised by itself.

Later turns usually repeat the earlier ones token for token, and the conversation is one sequence. Where they do not
(templates that drop earlier reasoning, merges across a border), `render_served` splits it into several samples, each
with the prompt as served and a mask on those answers only that no earlier sample has; `render` refuses.

Files and formats are not known here (records.py); neither is what is trained.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from draftsmith.infer.record import Message, Record
from draftsmith.infer.tokenizer import Encoder, load_tokenizer, tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "ChatTemplate",
    "FastChatTemplate",
    "PlainTemplate",
    "Rendered",
    "Template",
    "find_template",
    "load_tokenizer",
    "render_record",
    "tokenizer_fingerprint",
]

# Stands in for an answer to see what a template puts before and after one.
PROBE = "draftsmithanswerprobe"


@dataclass(frozen=True, slots=True)
class Rendered:
    """A sequence as served; `loss_mask` is 1 on the tokens that the model emitted, 0 on what it was given."""

    token_ids: list[int]
    loss_mask: list[int]


class Template(Protocol):
    """How one target is served: conversations in, token ids out."""

    tokenizer: PreTrainedTokenizerBase

    def text(self, messages: Sequence[Message], generation: bool) -> str:
        """The text of a conversation; `generation` adds what asks for the next answer."""
        ...

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """What the model is given to answer `messages`."""
        ...

    def render(self, messages: Sequence[Message]) -> Rendered:
        """The conversation as one sequence; ValueError where it was never served as one."""
        ...

    def render_served(self, messages: Sequence[Message]) -> list[Rendered]:
        """The conversation as one sequence, or as several where later turns were served with another beginning."""
        ...

    def fingerprint(self) -> str:
        """Equal for templates that render all conversations alike."""
        ...


class ChatTemplate:
    """The tokenizer's own chat template; `template_kwargs` reach it (enable_thinking=False, ...)."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template_kwargs: Mapping[str, Any] | None = None,
        system: str | None = None,
    ) -> None:
        if not tokenizer.chat_template:
            raise ValueError(
                f"the tokenizer {tokenizer.name_or_path} has no chat template: name a FastChat template "
                "(vicuna_v1.1), or a plain format such as 'USER: {prompt} ASSISTANT:'"
            )
        self.tokenizer = tokenizer
        self.template_kwargs = dict(template_kwargs or {})
        self.system = system
        self._encoder = Encoder(tokenizer, add_special_tokens=False)

    def text(self, messages: Sequence[Message], generation: bool) -> str:
        from jinja2 import TemplateError

        chat = [message.to_chat() for message in _with_system(messages, self.system)]
        if not chat:
            raise ValueError("a conversation without messages")
        try:
            text = self.tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=generation, **self.template_kwargs
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses this conversation: {error}") from error
        assert isinstance(text, str)
        return text

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        return self._encoder.encode(self.text(messages, generation=True))

    def render(self, messages: Sequence[Message]) -> Rendered:
        return _one(self.render_served(messages))

    def render_served(self, messages: Sequence[Message]) -> list[Rendered]:
        return _render_served(self, self._encoder, messages)

    def fingerprint(self) -> str:
        return _fingerprint(
            self.tokenizer, "chat", str(self.tokenizer.get_chat_template()), self.template_kwargs, self.system
        )


class FastChatTemplate:
    """One of FastChat's conversation templates, by its name there."""

    def __init__(self, name: str, tokenizer: PreTrainedTokenizerBase, system: str | None = None) -> None:
        try:
            from fastchat.conversation import conv_templates
        except ImportError as error:
            raise ValueError(
                f"the template {name} is FastChat's, which the extra `train` installs: pip install 'draftsmith[train]'"
            ) from error
        if name not in conv_templates:
            raise ValueError(f"FastChat has no template named {name!r}; it has {', '.join(sorted(conv_templates))}")
        self.name = name
        self.tokenizer = tokenizer
        self.system = system
        self._conversation = conv_templates[name]
        self._encoder = Encoder(tokenizer, add_special_tokens=True)

    def text(self, messages: Sequence[Message], generation: bool) -> str:
        conversation = self._conversation.copy()
        for i, message in enumerate(_with_system(messages, self.system)):
            if message.role == "system" and i == 0:
                conversation.set_system_message(message.content)
            elif message.role in ("user", "assistant"):
                conversation.append_message(conversation.roles[message.role == "assistant"], message.content)
            else:
                raise ValueError(f"FastChat's templates have no place for a {message.role} message in turn {i + 1}")
        if generation:
            conversation.append_message(conversation.roles[1], None)
        return conversation.get_prompt()

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        return self._encoder.encode(self.text(messages, generation=True))

    def render(self, messages: Sequence[Message]) -> Rendered:
        return _one(self.render_served(messages))

    def render_served(self, messages: Sequence[Message]) -> list[Rendered]:
        return _render_served(self, self._encoder, messages)

    def fingerprint(self) -> str:
        probe = [Message("user", "1"), Message("assistant", "2"), Message("user", "3")]
        return _fingerprint(self.tokenizer, "fastchat", self.text(probe, generation=True), {"name": self.name}, None)


class PlainTemplate:
    """A format around each user turn, for tokenizers without a chat template: "USER: {prompt} ASSISTANT:".

    An answer follows after a space where the format ends in a word (and not where it ends in `{prompt}` or in white
    space), and ends with the tokenizer's EOS token, or with a line break where there is none. A system message stands
    before the first turn, two line breaks apart.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, format: str = "{prompt}") -> None:
        if format.count("{prompt}") != 1:
            raise ValueError(f"the plain format {format!r} must hold {{prompt}} once")
        self.tokenizer = tokenizer
        self.format = format
        self._before, self._after = format.split("{prompt}")
        self._space = " " if self._after and not self._after[-1].isspace() else ""
        self._end = tokenizer.eos_token or "\n"
        self._encoder = Encoder(tokenizer, add_special_tokens=True)

    def text(self, messages: Sequence[Message], generation: bool) -> str:
        parts = []
        for i, message in enumerate(messages):
            if message.role == "user":
                parts.append(self._before + message.content + self._after)
            elif message.role == "assistant":
                parts.append(self._space + message.content + self._end)
            elif message.role == "system" and i == 0:
                parts.append(message.content + "\n\n")
            else:
                raise ValueError(f"a plain format has no place for a {message.role} message in turn {i + 1}")
        return "".join(parts)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        return self._encoder.encode(self.text(messages, generation=True))

    def render(self, messages: Sequence[Message]) -> Rendered:
        return _one(self.render_served(messages))

    def render_served(self, messages: Sequence[Message]) -> list[Rendered]:
        return _render_served(self, self._encoder, messages)

    def fingerprint(self) -> str:
        return _fingerprint(self.tokenizer, "plain", self.format + self._end, {}, None)


def find_template(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: Mapping[str, Any] | None = None,
    system: str | None = None,
) -> Template:
    """`chat` (the tokenizer's own), `plain`, a format that holds `{prompt}`, or the name of a FastChat template."""
    if name == "chat":
        return ChatTemplate(tokenizer, template_kwargs, system)
    if template_kwargs:
        raise ValueError(f"template_kwargs are for the tokenizer's own chat template, not for {name!r}")
    if name == "plain" or "{" in name:
        if system is not None:
            raise ValueError("a plain format takes no system message of its own: write it into the format")
        return PlainTemplate(tokenizer, "{prompt}" if name == "plain" else name)
    return FastChatTemplate(name, tokenizer, system)


def render_record(template: Template, record: Record) -> list[Rendered]:
    """A record's training samples: token ids as the row gave them, a conversation as served, or a document whole."""
    if record.token_ids:
        prompt = record.prompt_token_ids
        if not prompt and record.messages:
            prompt = template.prompt_ids(record.prompt)
        return [_sample(prompt, record.token_ids)]
    if record.text:
        encoder = Encoder(template.tokenizer, add_special_tokens=True)
        return [_sample(encoder.prefix, encoder.encode(record.text)[len(encoder.prefix) :])]
    return template.render_served(record.messages)


def _render_served(template: Template, encoder: Encoder, messages: Sequence[Message]) -> list[Rendered]:
    answered = [i for i, message in enumerate(messages) if message.role == "assistant"]
    if not answered:
        raise ValueError("there is no answer in this conversation")
    if answered[0] == 0:
        raise ValueError("this conversation starts with an answer: what the model was given is not known")
    samples: list[Rendered] = []
    for i in answered:
        prompt = template.prompt_ids(messages[:i])
        answer = _answer_ids(template, encoder, messages, i, prompt)
        last = samples[-1] if samples else None
        if last is not None and prompt[: len(last.token_ids)] == last.token_ids:
            given = prompt[len(last.token_ids) :]
            samples[-1] = Rendered(
                last.token_ids + given + answer, last.loss_mask + [0] * len(given) + [1] * len(answer)
            )
        else:
            samples.append(_sample(prompt, answer))
    return samples


def _answer_ids(
    template: Template, encoder: Encoder, messages: Sequence[Message], turn: int, prompt: list[int]
) -> list[int]:
    """The ids that the model emits for `messages[turn]`, up to and including the end-of-turn token."""
    prompt_text = template.text(messages[:turn], generation=True)
    full_text = template.text(messages[: turn + 1], generation=False)
    before, behind = _around(template, messages, turn, prompt_text)
    after = encoder.through_special(behind)
    message = messages[turn]
    if full_text.startswith(prompt_text) and full_text.endswith(behind):
        said = full_text[len(prompt_text) : len(full_text) - len(behind)]
        if message.content.strip() in said and message.reasoning.strip() in said:
            ids = encoder.encode(prompt_text + said + after)
            if ids[: len(prompt)] == prompt:
                return ids[len(prompt) :]
            return encoder.continuation(prompt, said + after)
    return encoder.continuation(prompt, before + _emitted(message, prompt_text, full_text) + after)


def _around(template: Template, messages: Sequence[Message], turn: int, prompt_text: str) -> tuple[str, str]:
    """What the template puts between the prompt and an answer, if it is only white space, and what after it."""
    probed = template.text([*messages[:turn], Message("assistant", PROBE)], generation=False)
    before, found, after = probed.rpartition(PROBE)
    if not found:
        return "", ""
    before = before[len(prompt_text) :] if before.startswith(prompt_text) else ""
    return (before if before.isspace() else ""), after


def _emitted(message: Message, prompt_text: str, full_text: str) -> str:
    """An answer that the template does not show as it was emitted, because it rewrites or drops reasoning."""
    same = next((i for i, (a, b) in enumerate(zip(prompt_text, full_text)) if a != b), len(full_text))
    opening = prompt_text[same:].strip()
    if not (opening.startswith("<") and opening.endswith(">")) or opening.count("<") != 1:
        if message.reasoning:
            raise ValueError("the template does not show an answer's reasoning: what the model emitted is not known")
        return message.content
    closing = f"</{opening[1:]}"
    if message.reasoning:
        return f"{message.reasoning.strip()}\n{closing}\n\n{message.content}"
    if closing not in message.content:
        raise ValueError(
            f"the prompt ends in {opening} and the answer has no {closing}: it is not what the model emitted "
            "(keep the reasoning in the log, or turn it off with template_kwargs)"
        )
    said = message.content.lstrip()
    return said.removeprefix(opening).lstrip("\n") if said.startswith(opening) else message.content


def _sample(given: list[int], emitted: list[int]) -> Rendered:
    return Rendered([*given, *emitted], [0] * len(given) + [1] * len(emitted))


def _one(samples: list[Rendered]) -> Rendered:
    if len(samples) > 1:
        raise ValueError(
            f"this conversation was served as {len(samples)} sequences, not as one: a later turn's prompt does not "
            "begin with the earlier turns' tokens (render_served gives one sample for each)"
        )
    return samples[0]


def _with_system(messages: Sequence[Message], system: str | None) -> list[Message]:
    if system is None or (messages and messages[0].role == "system"):
        return list(messages)
    return [Message("system", system), *messages]


def _fingerprint(
    tokenizer: PreTrainedTokenizerBase, kind: str, text: str, kwargs: Mapping[str, Any], system: str | None
) -> str:
    what = [kind, text, kwargs, system, tokenizer_fingerprint(tokenizer)]
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()
