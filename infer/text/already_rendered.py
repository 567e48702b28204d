"""Prompts that are rendered already, as logs of completion requests keep them, so that no template wraps them again.

Such a prompt opens a user turn in the words of some template and ends where that template's answer begins. Both are
required, so that text which only mentions such words is left alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import takewhile

from draftsmith.infer.text.record import Message

Write = Callable[[Sequence[Message], bool], str]

# Longer than what any format writes between the last question and the answer.
TAIL = 300
# Two turns that show what a template writes around questions and answers.
QUESTION, ANSWER, NEXT = "draftsmithquestionprobe", "draftsmithanswerprobe", "draftsmithnextprobe"


@dataclass(frozen=True, slots=True)
class Format:
    """What rendered prompts of one format look like.

    Args:
        name: for messages.
        opening: regular expression of a user turn's beginning, searched for.
        closing: regular expression of what the text before an answer ends with.
        gap: white space between that and the answer, where the prompt does not end in any.
        turn: a later user turn, with {prompt}; {end} is the token that ends an answer.
        end: that token; empty for the tokenizer's EOS token.
    """

    name: str
    opening: str
    closing: str
    gap: str
    turn: str
    end: str = ""

    def matches(self, text: str) -> bool:
        tail = re.search(rf"(?:{self.closing})\s*\Z", text[-TAIL:])
        if tail is None:
            return False
        opening = re.compile(self.opening, re.MULTILINE).search(text)
        return opening is not None and opening.end() <= max(len(text) - TAIL, 0) + tail.start()

    def write(self, eos: str) -> Write:
        """Conversations that begin with a prompt of this format: it is kept, later turns are rendered like it."""
        end = self.end or eos

        def write(messages: Sequence[Message], generation: bool) -> str:
            text = ""
            for number, message in enumerate(messages):
                if message.role == "user":
                    whole = number == 0 or self.matches(message.content)
                    later = self.turn.replace("{end}", end).replace("{prompt}", message.content)
                    text = message.content if whole else text + later
                elif message.role == "assistant":
                    text += ("" if text[-1:].isspace() else self.gap) + message.content + end
                else:
                    raise ValueError(f"a {message.role} message cannot follow a prompt that is already rendered")
            return text

        return write


THINKING = r"(?:\s*<think>\s*(?:</think>)?)?"
KNOWN = (
    # FastChat puts its system message before the first "USER:", on the same line.
    Format("vicuna", r"(?:^|</s>|[.!?] )\s*USER:\s", r"\sASSISTANT:", " ", "USER: {prompt} ASSISTANT:"),
    Format("Llama 2", r"\A\s*(?:<s>)?\s*\[INST\]", r"\[/INST\]", " ", "[INST] {prompt} [/INST]"),
    Format(
        "ChatML", r"\A\s*<\|im_start\|>(?:system|user)\n", rf"<\|im_start\|>assistant{THINKING}", "\n",
        "\n<|im_start|>user\n{prompt}{end}\n<|im_start|>assistant\n", "<|im_end|>",
    ),
    Format(
        "Llama 3", r"\A\s*(?:<\|begin_of_text\|>)?<\|start_header_id\|>(?:system|user)<\|end_header_id\|>",
        r"<\|start_header_id\|>assistant<\|end_header_id\|>", "\n\n",
        "<|start_header_id|>user<|end_header_id|>\n\n{prompt}{end}<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|eot_id|>",
    ),
    Format(
        "Gemma", r"\A\s*(?:<bos>)?<start_of_turn>user\n", r"<start_of_turn>model", "\n",
        "\n<start_of_turn>user\n{prompt}{end}\n<start_of_turn>model\n", "<end_of_turn>",
    ),
    Format(
        "Zephyr", r"\A\s*(?:<s>)?\s*<\|(?:system|user)\|>\n", r"\n<\|assistant\|>", "\n",
        "\n<|user|>\n{prompt}{end}\n<|assistant|>\n",
    ),
    Format("one_shot", r"^### Human:\s", r"\n### Assistant:", " ", "\n### Human: {prompt}\n### Assistant:"),
    Format("Alpaca", r"^### Instruction:\s", r"\n### Response:", " ", "\n\n### Instruction: {prompt}\n\n### Response:"),
)  # fmt: skip


def format_of(write: Write, through_special: Callable[[str], str], bos: str) -> Format | None:
    """The format that a template itself writes, or None where its turns have no words or tokens of their own.

    `through_special` cuts a text after its first special token; `bos` begins every text, and logs often leave it out.
    """
    turns = [Message("user", QUESTION), Message("assistant", ANSWER), Message("user", NEXT)]
    try:
        before, _, rest = write(turns, True).partition(QUESTION)
        first, _, rest = rest.partition(ANSWER)
        between, _, after = rest.partition(NEXT)
    except ValueError:
        return None  # a template that refuses this conversation
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(before[::-1], between[::-1])))
    opening, closing = before[len(before) - same :].strip().removeprefix(bos).strip(), after.strip()
    if not all(re.search(r"\w{2}", part) for part in (opening, closing)):
        return None
    end = through_special(between)
    return Format(
        "this template",
        rf"(?:^|[>\]])\s*{re.escape(opening)}",
        re.escape(closing),
        first[len(first.rstrip()) :],
        between[len(end) :] + "{prompt}" + after,
        end,
    )
