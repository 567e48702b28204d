"""Templates: how a target is served, by the tokenizer's own chat template, one of FastChat's, or a plain format."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from draftsmith.infer.text.record import Message
from draftsmith.infer.text.rendering import Rendered, Template, render_record
from draftsmith.infer.text.tokenizer import load_tokenizer, tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = [
    "Rendered",
    "Template",
    "chat_template",
    "fastchat_template",
    "find_template",
    "load_tokenizer",
    "plain_template",
    "render_record",
    "tokenizer_fingerprint",
]


def to_stderr(line: str) -> None:
    print(line, file=sys.stderr)


def find_template(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    template_kwargs: Mapping[str, Any] | None = None,
    system: str | None = None,
    notice: Callable[[str], None] = to_stderr,
) -> Template:
    """The template that `--template` names; its `name` is never `auto`, and finds the same template again.

    Args:
        name: `chat` (the tokenizer's own), `plain`, a format that holds `{prompt}`, the name of a FastChat template, or
            `auto`: chat if the tokenizer has a chat template, else plain.
        tokenizer: of the target.
        template_kwargs: arguments of the tokenizer's own chat template.
        system: a system message for conversations without one.
        notice: called with a line where `auto` falls back to plain, and where prompts are rendered already.
    """
    if name == "auto":
        name = "chat" if tokenizer.chat_template or template_kwargs else "plain"
        if name == "plain":
            notice("template: plain, as the tokenizer has no chat template: see --template")
    if name == "chat":
        template = chat_template(tokenizer, template_kwargs, system)
    elif template_kwargs:
        raise ValueError(f"template_kwargs are for the tokenizer's own chat template, not for {name!r}")
    elif name == "plain" or "{" in name:
        if system is not None:
            raise ValueError("a plain format takes no separate system message: write it into the format")
        template = plain_template(tokenizer, "{prompt}" if name == "plain" else name)
    else:
        template = fastchat_template(name, tokenizer, system)
    template.notice = notice
    return template


def chat_template(
    tokenizer: PreTrainedTokenizerBase, template_kwargs: Mapping[str, Any] | None = None, system: str | None = None
) -> Template:
    """The tokenizer's own chat template, called with `template_kwargs` (enable_thinking=False, ...)."""
    from jinja2 import TemplateError

    if not tokenizer.chat_template:
        raise ValueError(
            f"the tokenizer {tokenizer.name_or_path} has no chat template: name a FastChat template "
            "(vicuna_v1.1), or a plain format such as 'USER: {prompt} ASSISTANT:' (auto uses plain)"
        )
    kwargs = dict(template_kwargs or {})

    def write(messages: Sequence[Message], generation: bool) -> str:
        if not messages:
            raise ValueError("a conversation without messages")
        chat = [message.to_chat() for message in messages]
        try:
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=generation, **kwargs)
        except TemplateError as error:
            raise ValueError(f"the chat template refuses this conversation: {error}") from error
        assert isinstance(text, str)
        return text

    identity = ["chat", str(tokenizer.get_chat_template()), kwargs, system]
    return Template(tokenizer, write, identity, add_special_tokens=False, system=system, name="chat")


def fastchat_template(name: str, tokenizer: PreTrainedTokenizerBase, system: str | None = None) -> Template:
    """The FastChat conversation template `name`."""
    try:
        from fastchat.conversation import conv_templates
    except ImportError as error:
        raise ValueError(
            f"the template {name} is FastChat's, which the extra `train` installs: pip install 'draftsmith[train]'"
        ) from error
    if name not in conv_templates:
        close = difflib.get_close_matches(name, ["chat", "plain", *conv_templates], n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "give chat, plain, or a format with {prompt}."
        listed = "python -c 'from fastchat.conversation import conv_templates; print(*conv_templates)'"
        raise ValueError(f"unknown template {name!r}; {hint} FastChat's are listed by: {listed}")

    def write(messages: Sequence[Message], generation: bool) -> str:
        conversation = conv_templates[name].copy()
        for i, message in enumerate(messages):
            if message.role == "system" and i == 0:
                conversation.set_system_message(message.content)
            elif message.role in ("user", "assistant"):
                conversation.append_message(conversation.roles[message.role == "assistant"], message.content)
            else:
                raise ValueError(f"FastChat's templates cannot hold a {message.role} message (turn {i + 1})")
        if generation:
            conversation.append_message(conversation.roles[1], None)
        return str(conversation.get_prompt())

    probe = [Message("user", "1"), Message("assistant", "2"), Message("user", "3")]
    if system is not None:
        probe.insert(0, Message("system", system))
    identity = ["fastchat", write(probe, True), {"name": name}, None]
    return Template(tokenizer, write, identity, add_special_tokens=True, system=system, name=name)


def plain_template(tokenizer: PreTrainedTokenizerBase, format: str = "{prompt}") -> Template:
    """A format around each user turn, for tokenizers without a chat template: "USER: {prompt} ASSISTANT:".

    An answer follows after a space if the format ends in a word (not in `{prompt}` or white space), and ends with the
    tokenizer's EOS token, or with a line break if it has none. A system message comes first, with an empty line after
    it.
    """
    if format.count("{prompt}") != 1:
        raise ValueError(f"the plain format {format!r} must hold {{prompt}} once")
    before, after = format.split("{prompt}")
    space = " " if after and not after[-1].isspace() else ""
    end = tokenizer.eos_token or "\n"

    def write(messages: Sequence[Message], generation: bool) -> str:
        parts = []
        for i, message in enumerate(messages):
            if message.role == "user":
                parts.append(before + message.content + after)
            elif message.role == "assistant":
                parts.append(space + message.content + end)
            elif message.role == "system" and i == 0:
                parts.append(message.content + "\n\n")
            else:
                raise ValueError(f"a plain format cannot hold a {message.role} message (turn {i + 1})")
        return "".join(parts)

    name = "plain" if format == "{prompt}" else format
    return Template(tokenizer, write, ["plain", format + end, {}, None], add_special_tokens=True, name=name)
