"""One conversation as served: token ids, and the mask of those that the model emitted.

To answer turn k a model gets the ids of the prompt up to that turn, and emits the ids that follow. Each assistant turn
is rendered as exactly that: `prompt_ids(messages before it)`, then the answer with its end-of-turn token. Where the
tokenizer would merge across the border, the answer is tokenised separately.

A conversation is one sequence as long as each prompt begins with all earlier tokens. Where it does not (templates that
drop earlier reasoning, merges across a border), `render_served` starts a new sample, whose mask covers only answers
that no earlier sample has; `render` raises.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from draftsmith.infer.text.already_rendered import KNOWN, Format, format_of
from draftsmith.infer.text.record import Message, Record
from draftsmith.infer.text.tokenizer import Encoder, tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# An answer that shows what a template puts before and after one.
PROBE = "draftsmithanswerprobe"
# Characters shown of a prompt in a notice.
SHOWN = 30


@dataclass(frozen=True, slots=True)
class Rendered:
    """A sequence as served; `loss_mask` is 1 on tokens that the model emitted, 0 on its prompts."""

    token_ids: list[int]
    loss_mask: list[int]


class Template:
    """How a target is served: conversations in, token ids out.

    A conversation that begins with a prompt that is rendered already is not wrapped again.

    Args:
        write: `write(messages, generation)` gives the text of a conversation.
        identity: equal for templates that write alike.
        name: by which `find_template` finds the template again.
        detect: whether prompts may be rendered already.

    `notice`, if set, is called with one line when the first prompt that is rendered already is met.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        write: Callable[[Sequence[Message], bool], str],
        identity: Sequence[Any],
        *,
        add_special_tokens: bool,
        system: str | None = None,
        name: str = "",
        detect: bool = True,
    ) -> None:
        self.tokenizer = tokenizer
        self.name = name
        self._detect = detect
        self.notice: Callable[[str], None] | None = None
        self._write = write
        self._identity = identity
        self._encoder = Encoder(tokenizer, add_special_tokens)
        self._system = system

    def text(self, messages: Sequence[Message], generation: bool) -> str:
        """The text of a conversation; `generation` adds the opening of the next answer."""
        if kept := self._kept(messages):
            return kept.text(messages, generation)
        messages = self._without_end_tokens(messages)
        if self._system is not None and not (messages and messages[0].role == "system"):
            messages = [Message("system", self._system), *messages]
        return self._write(messages, generation)

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """The prompt for an answer to `messages`."""
        if kept := self._kept(messages):
            return kept.prompt_ids(messages)
        return self._encoder.encode(self.text(messages, generation=True))

    def render(self, messages: Sequence[Message]) -> Rendered:
        """The conversation as one sequence; ValueError if it was served as several."""
        samples = self.render_served(messages)
        if len(samples) > 1:
            raise ValueError(
                f"this conversation was served as {len(samples)} sequences, not as one: a later turn's prompt does not "
                "begin with the earlier turns' tokens (render_served gives one sample for each)"
            )
        return samples[0]

    def render_served(self, messages: Sequence[Message]) -> list[Rendered]:
        """The conversation as one sequence, or as several where a later prompt does not begin with all earlier tokens.

        An end token that a record keeps in an answer is not doubled.
        """
        if kept := self._kept(messages):
            return kept.render_served(messages)
        messages = self._without_end_tokens(messages)
        answered = [i for i, message in enumerate(messages) if message.role == "assistant"]
        if not answered:
            raise ValueError("there is no answer in this conversation")
        if answered[0] == 0:
            raise ValueError("this conversation starts with an answer: its prompt is not known")
        samples: list[Rendered] = []
        for i in answered:
            prompt = self.prompt_ids(messages[:i])
            _join(samples, prompt, self._answer_ids(messages, i, prompt))
        return samples

    def fingerprint(self) -> str:
        """Equal for templates that render all conversations alike."""
        parts = [*self._identity, tokenizer_fingerprint(self.tokenizer)]
        return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()

    def rendered_format(self, messages: Sequence[Message]) -> str:
        """The name of the format that the first prompt is already rendered in; empty if it is not."""
        first = next((message.content for message in messages if message.role == "user"), "")
        return next((one.name for one in self._formats if one.matches(first)), "")

    def _kept(self, messages: Sequence[Message]) -> Template | None:
        """The template that keeps a prompt which is rendered already; None for any other conversation."""
        if not (name := self.rendered_format(messages)):
            return None
        if messages[0].role != "user":
            raise ValueError(
                f"the prompt is already rendered ({name}), so no {messages[0].role} message can come before it: "
                "leave one of them out"
            )
        if self.notice is not None:
            start = " ".join(messages[0].content.split())[:SHOWN]
            self.notice(f"prompts already rendered ({name}) are kept; the first: {start}...")
            self.notice = None
        return self._kept_by_format[name]

    @cached_property
    def _formats(self) -> list[Format]:
        """The formats that a prompt may be rendered in: this template's own, and those that are widely used."""
        if not self._detect:
            return []
        own = format_of(self._write, self._encoder.through_special, self.tokenizer.bos_token or "")
        return [own, *KNOWN] if own else list(KNOWN)

    @cached_property
    def _kept_by_format(self) -> dict[str, Template]:
        eos, special = self.tokenizer.eos_token or "\n", self._encoder.special
        found = {}
        for one in self._formats:
            usable = one if one not in KNOWN or one.end in special else replace(one, end="")
            found[one.name] = Template(
                self.tokenizer, usable.write(eos), [one.name], add_special_tokens=True, detect=False
            )
        return found

    def _without_end_tokens(self, messages: Sequence[Message]) -> list[Message]:
        """Answers without the special token that ends them: the template adds it."""
        return [
            replace(message, content=self._encoder.without_end(message.content))
            if message.role == "assistant"
            else message
            for message in messages
        ]

    def _answer_ids(self, messages: Sequence[Message], turn: int, prompt: list[int]) -> list[int]:
        """The ids that the model emits for `messages[turn]`, up to and including the end-of-turn token."""
        encoder = self._encoder
        prompt_text = self.text(messages[:turn], generation=True)
        full_text = self.text(messages[: turn + 1], generation=False)
        before, behind = self._around(messages, turn, prompt_text)
        after = encoder.through_special(behind)
        message = messages[turn]
        if full_text.startswith(prompt_text) and full_text.endswith(behind):
            shown = full_text[len(prompt_text) : len(full_text) - len(behind)]
            if message.content.strip() in shown and message.reasoning.strip() in shown:
                ids = encoder.encode(prompt_text + shown + after)
                if ids[: len(prompt)] == prompt:
                    return ids[len(prompt) :]
                return encoder.continuation(prompt, shown + after)
        return encoder.continuation(prompt, before + _emitted(message, prompt_text, full_text) + after)

    def _around(self, messages: Sequence[Message], turn: int, prompt_text: str) -> tuple[str, str]:
        """What the template puts between the prompt and an answer, if only white space, and after the answer."""
        probed = self.text([*messages[:turn], Message("assistant", PROBE)], generation=False)
        before, found, after = probed.rpartition(PROBE)
        if not found:
            return "", ""
        before = before[len(prompt_text) :] if before.startswith(prompt_text) else ""
        return (before if before.isspace() else ""), after


def render_record(template: Template, record: Record) -> list[Rendered]:
    """A record's training samples: the row's own token ids, its conversation as served, or its document."""
    if record.token_ids:
        prompt = record.prompt_token_ids
        if not prompt and record.messages:
            prompt = template.prompt_ids(record.prompt)
        return [_sample(prompt, record.token_ids)]
    if record.prompt_token_ids_by_turn:
        samples: list[Rendered] = []
        for prompt, answer in zip(record.prompt_token_ids_by_turn, record.token_ids_by_turn):
            _join(samples, prompt, answer)
        return samples
    if record.text:
        encoder = Encoder(template.tokenizer, add_special_tokens=True)
        return [_sample(encoder.prefix, encoder.encode(record.text)[len(encoder.prefix) :])]
    if record.outputs:
        raise ValueError("these answers have no prompts: they are in another file")
    return template.render_served(record.messages)


def last_answer(template: Template, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """The ids of the last answer's prompt as served, and of the answer."""
    rendered = template.render_served(messages)[-1]
    split = len(rendered.loss_mask)
    while split and rendered.loss_mask[split - 1]:
        split -= 1
    return rendered.token_ids[:split], rendered.token_ids[split:]


def _join(samples: list[Rendered], prompt: list[int], answer: list[int]) -> None:
    """Add a turn: to the last sample if its prompt continues it, or as a new sample."""
    last = samples[-1] if samples else None
    if last is not None and prompt[: len(last.token_ids)] == last.token_ids:
        rest = prompt[len(last.token_ids) :]
        samples[-1] = Rendered(last.token_ids + rest + answer, last.loss_mask + [0] * len(rest) + [1] * len(answer))
    else:
        samples.append(_sample(prompt, answer))


def _sample(prompt: list[int], answer: list[int]) -> Rendered:
    return Rendered([*prompt, *answer], [0] * len(prompt) + [1] * len(answer))


def _emitted(message: Message, prompt_text: str, full_text: str) -> str:
    """The emitted text of an answer whose reasoning the template rewrites or drops."""
    same = next((i for i, (a, b) in enumerate(zip(prompt_text, full_text)) if a != b), len(full_text))
    opening = prompt_text[same:].strip()
    if not (opening.startswith("<") and opening.endswith(">")) or opening.count("<") != 1:
        if message.reasoning:
            raise ValueError("the template does not show an answer's reasoning, so the emitted text is not known")
        return message.content
    closing = f"</{opening[1:]}"
    if message.reasoning:
        return f"{message.reasoning.strip()}\n{closing}\n\n{message.content}"
    if closing not in message.content:
        raise ValueError(
            f"the prompt ends in {opening} and the answer has no {closing}: the model emitted something else "
            "(keep the reasoning in the log, or turn it off with template_kwargs)"
        )
    content = message.content.lstrip()
    return content.removeprefix(opening).lstrip("\n") if content.startswith(opening) else message.content
