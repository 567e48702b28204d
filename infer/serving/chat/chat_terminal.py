"""A chat in a terminal: reads lines, streams answers, and obeys commands that begin with a slash."""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any, TextIO

from draftsmith.infer.serving.chat.conversation import TARGET, LocalConversation, TurnByTurn
from draftsmith.infer.text.record import Message

# Of sources, in the order in which they appear; the target's own tokens keep the terminal's colour.
COLOURS = (36, 33, 35, 32, 34, 31)
PLAIN = "\x1b[0m"


class ChatTerminal:
    """`read(prompt)` gives a line, EOFError at the end; `load` makes a drafter, bound, of what `/drafter` names."""

    def __init__(
        self,
        conversation: TurnByTurn,
        read: Callable[[str], str],
        out: TextIO,
        load: Callable[[str], Any] | None = None,
    ) -> None:
        self.conversation = conversation
        self.read = read
        self.out = out
        self.load = load
        self.colour = False
        self._ended = False
        self._colours: dict[str, int] = {}

    @property
    def messages(self) -> list[Message]:
        """The conversation so far, with its system message."""
        system = self.conversation.system
        return [*([Message("system", system)] if system else []), *self.conversation.messages]

    def run(self) -> None:
        """Until `/quit` or the end of the input. An interrupt stops an answer, and never the chat."""
        while not self._ended:
            try:
                line = self.read("> ").strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                self._say("/quit or Ctrl-D ends the chat")
                continue
            if not line:
                continue
            try:
                if line.startswith("/"):
                    self._obey(line)
                else:
                    self._answer(line)
            except KeyboardInterrupt:
                self._say("")
            except (ValueError, OSError) as problem:
                self._say(" ".join(str(problem).split()))

    def _answer(self, line: str) -> None:
        sources = Counter[str]()
        try:
            with closing(_generator(self.conversation.ask(line))) as said:
                for part in said:
                    sources[part.source] += 1
                    self.out.write(self._coloured(part.text, part.source) if self.colour else part.text)
                    self.out.flush()
        except KeyboardInterrupt:
            self.out.write(" [stopped]")
        self._say("")
        if self.colour:
            self._say(", ".join(self._coloured(f"{name} {count}", name) for name, count in sources.items()))

    def _coloured(self, text: str, source: str) -> str:
        if source in ("", TARGET):
            return text
        colour = self._colours.setdefault(source, COLOURS[len(self._colours) % len(COLOURS)])
        return f"\x1b[{colour}m{text}{PLAIN}"

    # commands

    def _obey(self, line: str) -> None:
        name, _, rest = line[1:].partition(" ")
        command = getattr(self, f"_do_{name}", None) if name.isidentifier() else None
        if command is None:
            raise ValueError(f"there is no command /{name}: see /help")
        command(rest.strip())

    def _do_help(self, rest: str) -> None:
        """/help: this list"""
        for _, command in inspect.getmembers(self, inspect.ismethod):
            if command.__name__.startswith("_do_"):
                self._say(str(command.__doc__))

    def _do_drafter(self, rest: str) -> None:
        """/drafter NAME: draft with another drafter, as of --drafters; `none` drafts nothing"""
        local = self._local("/drafter")
        if not rest:
            raise ValueError("/drafter needs a drafter, such as pld or small:MODEL, or none")
        assert self.load is not None
        local.use(self.load("" if rest == "none" else rest))

    def _do_system(self, rest: str) -> None:
        """/system TEXT: begin anew with this system message; without TEXT with none"""
        self.conversation.reset()
        self.conversation.system = rest

    def _do_stats(self, rest: str) -> None:
        """/stats: speed and drafting of the last answer"""
        self._say(self.conversation.stats())

    def _do_colour(self, rest: str) -> None:
        """/colour: show drafted tokens in the colour of their source, or stop doing so"""
        self._local("/colour")
        self.colour = not self.colour

    def _do_save(self, rest: str) -> None:
        """/save FILE: append the conversation to a JSON Lines file"""
        if not rest:
            raise ValueError("/save needs the name of a file")
        messages = self.messages
        if not self.conversation.messages:
            raise ValueError("there is nothing to save yet")
        row = {"messages": [message.to_chat() for message in messages]}
        with Path(rest).expanduser().open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
        self._say(f"saved {len(messages)} messages to {rest}")

    def _do_reset(self, rest: str) -> None:
        """/reset: forget all turns"""
        self.conversation.reset()

    def _do_quit(self, rest: str) -> None:
        """/quit: end the chat, as Ctrl-D does"""
        self._ended = True

    def _local(self, command: str) -> LocalConversation:
        if not isinstance(self.conversation, LocalConversation):
            raise ValueError(f"{command} needs a target of this chat's own (--target), not a server")
        return self.conversation

    def _say(self, line: str) -> None:
        self.out.write(line + "\n")
        self.out.flush()


def _generator(parts: Iterator[Any]) -> Any:
    """An iterator that can be closed, which ends the answer."""
    assert inspect.isgenerator(parts)
    return parts
