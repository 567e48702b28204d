"""Checks of what turns text into ids: tokenizer, special tokens, padded vocabulary, chat template; and of the context.

Each compares a draft with its target, and with the reference where there is one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from draftsmith.infer.measure.doctor.finding import Finding
from draftsmith.infer.measure.doctor.questions import QUESTIONS
from draftsmith.infer.models.positions import max_positions
from draftsmith.infer.text.rendering import Template
from draftsmith.infer.text.templates import find_template
from draftsmith.infer.text.tokenizer import PROBES, tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CONVERSATION = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "And 3 + 3?"},
]
SHOWN = 60


def check_tokenizer(own: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase) -> Finding:
    """The same ids for the same text."""
    check, texts = "tokenizer", [*PROBES, *QUESTIONS]
    if tokenizer_fingerprint(own) == tokenizer_fingerprint(target):
        return Finding.ok(check, f"the target's: {len(own)} tokens, and the same ids for the same text")
    pairs = [(_ids(own, text), _ids(target, text)) for text in texts]
    differing = sum(mine != theirs for mine, theirs in pairs)
    copy = "if the weights have the target's ids, copy the target's tokenizer files here; else it is no draft for it"
    shift = _shift(pairs)
    if shift:
        return Finding.wrong(check, f"every id is the target's {shift:+d}: one of the two has tokens inserted", copy)
    if differing:
        return Finding.wrong(check, f"{differing} of {len(texts)} texts get other ids than the target's", copy)
    mine, theirs = own.get_vocab(), target.get_vocab()
    others = sorted({*mine.items()} ^ {*theirs.items()}, key=lambda item: (item[1], item[0]))
    named = ", ".join(f"{token!r} ({number})" for token, number in others[:3]) or "its added tokens"
    return Finding.wrong(check, f"the same ids for {len(texts)} texts, but other tokens: {named}", copy)


def check_special_tokens(
    own: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase, config: Any, eos_ids: frozenset[int]
) -> Finding:
    """`config`: the draft's generation config; `eos_ids`: the target's."""
    check = "special tokens"
    for name in ("bos_token", "eos_token"):
        mine, theirs = getattr(own, name), getattr(target, name)
        if mine != theirs:
            return Finding.wrong(
                check, f"{name} is {mine!r}, and the target's is {theirs!r}", "copy the target's tokenizer_config.json"
            )
    named = getattr(config, "eos_token_id", None)
    ends = {named} if isinstance(named, int) else set(named or ())
    if ends and eos_ids and not ends & eos_ids:
        return Finding.wrong(
            check,
            f"answers end with {sorted(ends)} in its config, and with {sorted(eos_ids)} in the target's",
            "copy eos_token_id from the target's generation_config.json",
        )
    return Finding.ok(check, f"bos {own.bos_token!r}, eos {own.eos_token!r}, as the target's")


def check_vocabulary(rows: int, outputs: int, tokens: int, padding_likely: float) -> Finding:
    """`rows` of the embedding and `outputs` of the head for a tokenizer of `tokens`; `padding_likely`:
    the share of places where an id that is no token is the likeliest."""
    check = "vocabulary"
    again = "export it again with the embedding and the head of all tokens"
    if min(rows, outputs) < tokens:
        return Finding.wrong(check, f"{min(rows, outputs)} rows, but the tokenizer has {tokens} tokens", again)
    if rows != outputs:
        return Finding.wrong(check, f"{rows} rows in the embedding and {outputs} in the head", again)
    if padding_likely > 0:
        return Finding.wrong(
            check,
            f"an id beyond the {tokens} tokens is the likeliest at {padding_likely:.0%} of places",
            "set the head's rows of padding ids as the trained model has them (zeros, or its own)",
        )
    padding = f", {rows - tokens} of them padding that is never likely" if rows > tokens else ""
    return Finding.ok(check, f"{rows} rows for {tokens} tokens{padding}")


def check_template(own: PreTrainedTokenizerBase, config: Any, template: Template, same_tokenizer: bool) -> Finding:
    """`template`: the one that the target is served with."""
    check = "template"
    trained = getattr(config, "template_fingerprint", "")
    if trained and same_tokenizer:
        if trained == template.fingerprint():
            return Finding.ok(check, f"trained with the one that the target is served with ({template.name})")
        known = next((name for name in ("chat", "plain") if _fingerprint(name, template) == trained), "")
        with_it = f"with --template {known}" if known else "with the template it was trained with"
        return Finding.wrong(
            check,
            f"trained with {known or 'another one'}, and the target is served with {template.name}",
            f"serve the target {with_it}, or train the draft on conversations rendered with {template.name}",
        )
    if template.name != "chat":
        return Finding.unknown(check, f"it does not say which one it was trained with; it is served {template.name}")
    if not own.chat_template:
        return Finding.unknown(check, "it has none, and does not say which one it was trained with")
    mine, theirs = rendered(own), rendered(template.tokenizer)
    if mine == theirs:
        return Finding.ok(check, "its chat template renders a conversation as the target's does")
    at = next((i for i, (a, b) in enumerate(zip(mine, theirs)) if a != b), min(len(mine), len(theirs)))
    return Finding.wrong(
        check,
        f"another chat template: {mine[at : at + SHOWN]!r}, where the target's has {theirs[at : at + SHOWN]!r}",
        "if it was trained with the target's, copy chat_template.jinja; else train it with the target's",
    )


def check_context(config: Any, target_positions: int, reference: Any | None) -> Finding:
    check, own = "context", max_positions(config)
    before = max_positions(reference) if reference is not None else own
    if own != before:
        return Finding.wrong(
            check,
            f"{own} positions, and the reference {before}",
            f"write max_position_embeddings {before} into config.json",
        )
    if own >= target_positions:
        return Finding.ok(check, f"{own} positions, the target {target_positions}")
    return Finding.ok(check, f"{own} positions; beyond them the target's {target_positions} decode without drafts")


def rendered(tokenizer: PreTrainedTokenizerBase) -> str:
    """A conversation by a tokenizer's own chat template, or why it refuses it."""
    from jinja2 import TemplateError

    try:
        return str(tokenizer.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=True))
    except (TemplateError, ValueError, TypeError) as problem:
        return f"{type(problem).__name__}: {problem}"


def _fingerprint(name: str, template: Template) -> str:
    """Of the same target, served with another template."""
    try:
        return find_template(name, template.tokenizer, notice=lambda line: None).fingerprint()
    except ValueError:
        return ""


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return [int(token) for token in tokenizer(text, add_special_tokens=False)["input_ids"]]


def _shift(pairs: list[tuple[list[int], list[int]]]) -> int:
    """By how much all ids are shifted; 0 if they are not, or not all by the same."""
    if any(len(mine) != len(theirs) for mine, theirs in pairs):
        return 0
    shifts = {a - b for mine, theirs in pairs for a, b in zip(mine, theirs)}
    return shifts.pop() if len(shifts) == 1 else 0
