"""`draftsmith generate`: text from a target and a drafter, streamed for one prompt, batched for many."""

from __future__ import annotations

import sys
from json import dumps
from typing import TYPE_CHECKING, Any

from draftsmith.infer.rules.named import DEFAULT, RuleName
from draftsmith.recipes.cli.ranges import Above0To1, FloatAbove0, FloatFrom0, From0To1, IntFrom0, IntFrom1

if TYPE_CHECKING:
    from draftsmith.infer.contract.row import Row
    from draftsmith.infer.contract.trace import Generation


def generate(
    *,
    target: str,
    prompt: str = "",
    data: list[str] | None = None,
    drafters: str = "",
    system: str = "",
    max_new_tokens: IntFrom1 = 128,
    temperature: FloatFrom0 | None = None,
    top_k: IntFrom0 | None = None,
    top_p: Above0To1 | None = None,
    min_p: From0To1 | None = None,
    repetition_penalty: FloatAbove0 | None = None,
    stop: list[str] | None = None,
    stop_ids: list[IntFrom0] | None = None,
    seed: IntFrom0 = 0,
    batch_size: IntFrom1 = 1,
    rule: RuleName = DEFAULT,
    template: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    tp: IntFrom1 = 1,
    stats: bool = False,
    json: bool = False,
) -> None:
    """Generate text; a drafter makes it faster and does not change the output.

    Example: draftsmith generate --target DIR --drafters pld --prompt "Write a haiku."

    Args:
        target: folder or Hub name of the target model.
        prompt: the prompt; `-` reads it from standard input.
        data: questions instead of a prompt: files, folders or `datasets` names; all are answered.
        drafters: one drafter, such as pld, small:MODEL or mix=pld+small:MODEL; plain decoding by default. `rest`
            without a store learns from each answer for the next ones.
        system: a system message.
        max_new_tokens: token limit of each answer.
        temperature: 0 is greedy; by default the model's own.
        top_k: sample from this many of the likeliest tokens; 0 from all.
        top_p: sample from the likeliest tokens, up to this total probability.
        min_p: sample from tokens with at least this share of the likeliest one's probability.
        repetition_penalty: above 1 makes tokens that are already in the text less likely.
        stop: strings that end an answer.
        stop_ids: token ids that end an answer, in addition to the model's own.
        seed: random seed of sampling.
        batch_size: answers decoded together.
        rule: how drafts are verified: token, block (chains of drawn tokens as a whole), or traversal (trees as well).
        template: prompt template: auto (chat, or plain without one), chat (the tokenizer's own), plain, a format with
            {prompt}, or a FastChat name.
        dtype: type of the target's weights, such as bfloat16.
        device: device of the target, such as cuda or cpu.
        tp: ranks that the target's weights are split over, with a device each; they are started for you. Drafts stay
            whole unless they ask for the same: small:DRAFT[tp=2].
        stats: after the text, print tokens/s, accepted_length and times to standard error; the JSON always has them.
        json: print one JSON object on the last line.
    """
    from draftsmith.infer.engine.engine import Engine
    from draftsmith.infer.engine.prompts import rows_of
    from draftsmith.infer.measure.metrics import speed_figures
    from draftsmith.infer.models.load import check_model, load_target
    from draftsmith.recipes.cli.inputs import PLAIN, one_drafter

    check_model(target, dtype, device, tp)
    prompts = _prompts(prompt, data, system)
    drafter = one_drafter(drafters)
    loaded = load_target(target, dtype=dtype, device=device, tp=tp)
    rows = rows_of(
        loaded, prompts, template=template, seed=seed, stop=stop or (), stop_ids=stop_ids or (),
        max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty,
    )  # fmt: skip
    drafter.bind(loaded)
    stream = len(rows) == 1 and not json
    with Engine(loaded, drafter, batch_size=batch_size, rule=rule) as engine:
        done = engine.run(rows, on_tokens=_Streamed(sys.stdout) if stream else None, strict=True)
    figures = {"drafter": drafters or PLAIN} | speed_figures(done)
    if json:
        results = [_result(generation) for generation in done]
        found = results[0] if data is None else {"generations": results}
        print(dumps(found | {"stats": figures}, ensure_ascii=False))
    elif stream:
        print()
    else:
        for generation in done:
            print(f"== {generation.row}\n{generation.text}")
    if stats:
        print(_stats(figures), file=sys.stderr)


def _stats(figures: dict[str, Any]) -> str:
    """The figures in two lines. There is no speedup: nothing was decoded without the drafter."""
    numbers = {name: "-" if value is None else f"{value:.2f}" for name, value in figures.items() if name != "drafter"}
    return (
        f"{figures['tokens']} tokens, {numbers['tokens_per_s']} tokens/s, prefill {numbers['prefill_s']} s, "
        f"decode {numbers['decode_s']} s\n"
        f"drafter {figures['drafter']}: accepted_length {numbers['accepted_length']}, "
        f"acceptance_rate {numbers['acceptance_rate']}"
    )


def _prompts(prompt: str, data: list[str] | None, system: str) -> list[tuple[str, list[Any]]]:
    """Key and messages of each prompt: of records the first turn, and the system message unless `system` is given."""
    from draftsmith.infer.answers.answer_file import with_keys
    from draftsmith.infer.text.record import Message
    from draftsmith.recipes.cli.inputs import read_questions

    if prompt and data is not None:
        raise ValueError("give either --prompt or --data, not both")
    head = [Message("system", system)] if system else []
    if data is None:
        text = sys.stdin.read() if prompt == "-" else prompt
        if not text.strip():
            raise ValueError("the prompt is empty: give --prompt or --data")
        return [("0", [*head, Message("user", text)])]
    prompts = []
    for asked in with_keys(read_questions(data)):
        own = [] if system or not asked.record.system else [Message("system", asked.record.system)]
        prompts.append((asked.key, [*head, *own, Message("user", asked.record.questions[0])]))
    return prompts


def _result(generation: Generation) -> dict[str, Any]:
    from draftsmith.infer.measure.metrics import trace_figures

    return {
        "id": generation.row,
        "text": generation.text,
        "token_ids": generation.token_ids,
        "stop": generation.stop,
        "metrics": trace_figures(generation.traces) | {"ttft_s": generation.first_s, "seconds": generation.seconds},
    }


class _Streamed:
    """Prints new text as it is decoded, without incomplete characters."""

    def __init__(self, out: Any) -> None:
        self.out = out
        self.shown = ""

    def __call__(self, row: Row, tokens: list[int]) -> None:
        assert row.tokenizer is not None
        text = str(row.tokenizer.decode(row.new_ids, skip_special_tokens=True))
        if not row.stop:
            text = text.rstrip("�")
        if text.startswith(self.shown):
            self.out.write(text[len(self.shown) :])
            self.out.flush()
            self.shown = text
