"""How a target is served: conversations to text and token ids by its chat template, FastChat's, or a plain format.

What a sequence and its loss mask are, rendering.py tells. Files and formats of data are not known here (records.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from draftsmith.infer.text.record import Message
from draftsmith.infer.text.rendering import (
    Rendered,
    Template,
    render_one,
    render_record,
    render_served,
    without_end_tokens,
)
from draftsmith.infer.text.tokenizer import Encoder, load_tokenizer, tokenizer_fingerprint

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

        chat = [message.to_chat() for message in _with_system(messages, self.system, self._encoder)]
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
        return render_one(self.render_served(messages))

    def render_served(self, messages: Sequence[Message]) -> list[Rendered]:
        return render_served(self, self._encoder, messages)

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
        for i, message in enumerate(_with_system(messages, self.system, self._encoder)):
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
        return render_one(self.render_served(messages))

    def render_served(self, messages: Sequence[Message]) -> list[Rendered]:
        return render_served(self, self._encoder, messages)

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
        for i, message in enumerate(without_end_tokens(messages, self._encoder)):
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
        return render_one(self.render_served(messages))

    def render_served(self, messages: Sequence[Message]) -> list[Rendered]:
        return render_served(self, self._encoder, messages)

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


def _with_system(messages: Sequence[Message], system: str | None, encoder: Encoder) -> list[Message]:
    spoken = without_end_tokens(messages, encoder)
    return spoken if system is None or (spoken and spoken[0].role == "system") else [Message("system", system), *spoken]


def _fingerprint(
    tokenizer: PreTrainedTokenizerBase, kind: str, text: str, kwargs: Mapping[str, Any], system: str | None
) -> str:
    what = [kind, text, kwargs, system, tokenizer_fingerprint(tokenizer)]
    return hashlib.sha256(json.dumps(what, sort_keys=True, default=str).encode()).hexdigest()
