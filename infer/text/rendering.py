"""One conversation as served: token ids and the mask of those that the model emitted.

What a model meets when it serves turn k is the ids of the prompt up to that turn, then the ids that it emits itself. So
each assistant turn is rendered as exactly that: `prompt_ids(messages before it)`, then the answer up to and including
the end-of-turn token. A tokenizer may merge across the border if the whole text is given to it at once; where it
does, the answer is tokenised by itself.

Later turns usually repeat the earlier ones token for token, and the conversation is one sequence. Where they do not
(templates that drop earlier reasoning, merges across a border), `render_served` splits it into several samples, each
with the prompt as served and a mask on those answers only that no earlier sample has; `render` refuses.

An answer whose record still holds its end token has it once. How a template writes a conversation is not known here
(templates.py); neither is what is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from draftsmith.infer.text.record import Message, Record
from draftsmith.infer.text.tokenizer import Encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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


def render_record(template: Template, record: Record) -> list[Rendered]:
    """A record's training samples: token ids as the row gave them, a conversation as served, or a document whole."""
    if record.token_ids:
        prompt = record.prompt_token_ids
        if not prompt and record.messages:
            prompt = template.prompt_ids(record.prompt)
        return [_sample(prompt, record.token_ids)]
    if record.token_ids_by_turn:
        samples: list[Rendered] = []
        for prompt, answer in zip(record.prompt_token_ids_by_turn, record.token_ids_by_turn):
            _join(samples, prompt, answer)
        return samples
    if record.text:
        encoder = Encoder(template.tokenizer, add_special_tokens=True)
        return [_sample(encoder.prefix, encoder.encode(record.text)[len(encoder.prefix) :])]
    if record.outputs:
        raise ValueError("the prompts of these answers are in another file: what the model was given is not known")
    return template.render_served(record.messages)


def render_served(template: Template, encoder: Encoder, messages: Sequence[Message]) -> list[Rendered]:
    """The conversation as one sequence, or as several where later turns were served with another beginning."""
    messages = without_end_tokens(messages, encoder)
    answered = [i for i, message in enumerate(messages) if message.role == "assistant"]
    if not answered:
        raise ValueError("there is no answer in this conversation")
    if answered[0] == 0:
        raise ValueError("this conversation starts with an answer: what the model was given is not known")
    samples: list[Rendered] = []
    for i in answered:
        prompt = template.prompt_ids(messages[:i])
        _join(samples, prompt, _answer_ids(template, encoder, messages, i, prompt))
    return samples


def _join(samples: list[Rendered], prompt: list[int], answer: list[int]) -> None:
    """Take in a turn: it goes on where the last sample ended, or begins one of its own."""
    last = samples[-1] if samples else None
    if last is not None and prompt[: len(last.token_ids)] == last.token_ids:
        given = prompt[len(last.token_ids) :]
        samples[-1] = Rendered(last.token_ids + given + answer, last.loss_mask + [0] * len(given) + [1] * len(answer))
    else:
        samples.append(_sample(prompt, answer))


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


def render_one(samples: list[Rendered]) -> Rendered:
    """The only sample; ValueError where there are several."""
    if len(samples) > 1:
        raise ValueError(
            f"this conversation was served as {len(samples)} sequences, not as one: a later turn's prompt does not "
            "begin with the earlier turns' tokens (render_served gives one sample for each)"
        )
    return samples[0]


def without_end_tokens(messages: Sequence[Message], encoder: Encoder) -> list[Message]:
    """Answers without the special token that ends them: the template puts it there."""
    return [
        replace(message, content=encoder.without_end(message.content)) if message.role == "assistant" else message
        for message in messages
    ]
