"""`draftsmith chat`: a conversation in the terminal, with a target and a drafter or with a server."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from json import dumps
from typing import TYPE_CHECKING, Any

from draftsmith.infer.rules.named import DEFAULT, RuleName
from draftsmith.recipes.cli.ranges import Above0To1, FloatFrom0, IntFrom0, IntFrom1

if TYPE_CHECKING:
    from draftsmith.infer.serving.chat.conversation import LocalConversation
    from draftsmith.infer.serving.chat.remote_conversation import RemoteConversation


def chat(
    *,
    target: str | None = None,
    server: str | None = None,
    drafters: str = "",
    model: str = "",
    system: str = "",
    max_new_tokens: IntFrom1 = 1024,
    temperature: FloatFrom0 | None = None,
    top_p: Above0To1 | None = None,
    seed: IntFrom0 = 0,
    rule: RuleName = DEFAULT,
    template: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    json: bool = False,
) -> None:
    """Chat in the terminal, with a target and a drafter or through an OpenAI-compatible server.

    Answers are streamed, and the cache is kept from turn to turn. Ctrl-C stops an answer, Ctrl-D ends the chat. Lines
    that begin with a slash are commands: /drafter, /system, /stats, /colour (tokens by source), /save, /reset, /help.

    Example: draftsmith chat --target DIR --drafters pld

    Args:
        target: folder or Hub name of the target model.
        server: URL of an OpenAI-compatible server, instead of a target; its key is read from OPENAI_API_KEY.
        drafters: one drafter, such as pld, small:MODEL or mix=pld+small:MODEL; plain decoding by default.
        model: name of the model on the server; by default the first that it lists.
        system: a system message.
        max_new_tokens: token limit of each answer.
        temperature: 0 is greedy; by default the model's own.
        top_p: sample from the likeliest tokens, up to this total probability.
        seed: random seed of sampling.
        rule: how drafts are verified: token, block (chains of drawn tokens as a whole), or traversal (trees as well).
        template: prompt template: auto (chat, or plain without one), chat (the tokenizer's own), plain, a format with
            {prompt}, or a FastChat name.
        dtype: type of the target's weights, such as bfloat16.
        device: device of the target, such as cuda or cpu.
        json: at the end, print the conversation as one JSON object on the last line.
    """
    from draftsmith.infer.serving.chat.chat_terminal import ChatTerminal
    from draftsmith.infer.serving.chat.remote_conversation import RemoteConversation
    from draftsmith.recipes.cli.inputs import one_drafter

    if (target is None) == (server is None):
        raise ValueError("give either --target or --server")
    read = _reader()
    conversation: LocalConversation | RemoteConversation
    load: Callable[[str], Any] | None = None
    sampling: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "seed": seed}
    if server is not None:
        if drafters:
            raise ValueError("--drafters needs --target: a server has its own")
        key = os.environ.get("OPENAI_API_KEY", "")
        conversation = RemoteConversation(server, model, key, max_tokens=max_new_tokens, **sampling)
    else:
        from draftsmith.infer.models.load import check_model, load_target
        from draftsmith.infer.serving.chat.conversation import LocalConversation
        from draftsmith.infer.text.templates import find_template

        assert target is not None
        check_model(target, dtype, device)
        drafter = one_drafter(drafters)
        loaded = load_target(target, dtype=dtype, device=device)
        assert loaded.tokenizer is not None
        drafter.bind(loaded)
        form = find_template(template, loaded.tokenizer)
        conversation = LocalConversation(loaded, drafter, form, rule, max_new_tokens=max_new_tokens, **sampling)

        def load(specs: str) -> Any:
            made = one_drafter(specs)
            made.bind(loaded)
            return made

    conversation.system = system
    terminal = ChatTerminal(conversation, read, sys.stdout, load)
    terminal.run()
    if json:
        print(dumps({"messages": [message.to_chat() for message in terminal.messages]}, ensure_ascii=False))


def _reader() -> Callable[[str], str]:
    """Reads lines: with history and editing on a terminal, and otherwise plainly, without a prompt."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return lambda prompt: input()
    from prompt_toolkit import PromptSession

    session: PromptSession[str] = PromptSession()
    return session.prompt
