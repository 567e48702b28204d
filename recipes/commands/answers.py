"""`draftsmith answers`: the target's own answers to a set of prompts, by our loop or through a server."""

from __future__ import annotations

import os
import time
from json import dumps
from typing import TYPE_CHECKING, Any, Literal

from draftsmith.recipes.cli.progress import progress

if TYPE_CHECKING:
    from draftsmith.infer.models.hf_target import HFTarget

PRESETS: dict[str, dict[str, float]] = {"greedy": {"temperature": 0.0}, "nucleus": {"temperature": 0.7, "top_p": 0.95}}


def answers(
    *,
    data: list[str],
    out: str,
    target: str | None = None,
    drafters: str = "",
    server: str | None = None,
    model: str = "",
    tokenizer: str | None = None,
    preset: Literal["greedy", "nucleus"] = "greedy",
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    max_new_tokens: int = 128,
    seed: int = 0,
    batch_size: int = 8,
    limit: int | None = None,
    on_bad: Literal["raise", "skip"] = "raise",
    template: str = "chat",
    dtype: str = "auto",
    device: str = "auto",
    json: bool = False,
) -> None:
    """Answer every prompt and keep the token ids; run again after an interruption to go on.

    Example: draftsmith answers --target DIR --data prompts.jsonl --out answers.jsonl --preset nucleus

    Args:
        data: files, folders or `datasets` names with questions.
        out: the JSONL file to write; what it holds already is not answered again.
        target: folder or Hub name of the model that answers.
        drafters: one drafter to make it faster.
        server: instead of a target, the URL of an OpenAI-compatible server.
        model: the model's name on the server.
        tokenizer: with a server, the folder or Hub name of its tokenizer.
        preset: greedy, or nucleus (temperature 0.7, top_p 0.95).
        temperature: overrides the preset.
        top_k: sampling among so many tokens.
        top_p: overrides the preset.
        max_new_tokens: limit of each answer.
        seed: of sampling.
        batch_size: answers decoded, or requests under way, together.
        limit: so many prompts and no more.
        on_bad: what a row that is not valid JSON or UTF-8 does: raise, or skip (it is counted).
        template: how messages become a prompt.
        dtype: of the target's weights.
        device: where the target runs.
        json: print one JSON object on the last line.
    """
    aside = ("json", "out", "batch_size", "drafters", "limit", "on_bad")
    config: dict[str, Any] = {key: value for key, value in locals().items() if key not in ("aside", *aside)}
    from draftsmith.infer.answers.answer_file import AnswerFile, with_keys
    from draftsmith.infer.contract.sampling import resolve_settings
    from draftsmith.infer.models.load import load_target
    from draftsmith.recipes.cli.questions import read_questions

    if (target is None) == (server is None):
        raise ValueError("give either --target or --server")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, not {batch_size}")
    asked = with_keys(read_questions(data, limit, on_bad))
    own = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    wanted = PRESETS[preset] | {key: value for key, value in own.items() if value is not None} | {"seed": seed}
    loaded = None if target is None else load_target(target, dtype=dtype, device=device)
    settings = resolve_settings(None if loaded is None else loaded.generation_config, **wanted)
    began = time.perf_counter()
    with AnswerFile(out, config | {"sampling": settings.to_json()}) as file:
        before = len(file.done)
        if loaded is None:
            assert server is not None
            _through_server(server, model, tokenizer, template, asked, settings, max_new_tokens, batch_size, file)
        else:
            _by_loop(loaded, drafters, template, asked, settings, max_new_tokens, batch_size, file)
        took = time.perf_counter() - began
        summary = {"out": out, "answered": len(file.done) - before, "there_already": before, "seconds": took}
    if json:
        print(dumps(summary))
    else:
        print(f"{summary['answered']} answers in {took:.1f} s, {before} were there already: {out}")


def _by_loop(
    loaded: HFTarget, drafters: str, template: str, asked: Any, settings: Any, max_new_tokens: int, batch_size: int,
    file: Any,
) -> None:  # fmt: skip
    from draftsmith.infer.answers.by_engine import answer_all
    from draftsmith.infer.contract.row import Stops
    from draftsmith.infer.drafters.controls import Empty
    from draftsmith.infer.text.templates import find_template
    from draftsmith.recipes.cli.drafters import parse_drafters

    chosen = parse_drafters(drafters)
    if len(chosen) > 1:
        raise ValueError(f"answers takes one drafter, and got {len(chosen)}: {', '.join(chosen)}")
    assert loaded.tokenizer is not None
    drafter = next(iter(chosen.values()), Empty())
    drafter.bind(loaded)
    rendered = find_template(template, loaded.tokenizer)
    stops = Stops(max_new_tokens, loaded.eos_ids)
    progress = _Progress()
    answer_all(loaded, drafter, asked, rendered, settings, stops, file, batch_size=batch_size, progress=progress)


def _through_server(
    server: str, model: str, tokenizer: str | None, template: str, asked: Any, settings: Any, max_new_tokens: int,
    concurrency: int, file: Any,
) -> None:  # fmt: skip
    from draftsmith.infer.answers.by_server import Server, answer_through
    from draftsmith.infer.text.templates import find_template, load_tokenizer

    if tokenizer is None:
        raise ValueError("answers keep token ids: with --server give its --tokenizer as well")
    rendered = find_template(template, load_tokenizer(tokenizer))
    there = Server(server, model, os.environ.get("OPENAI_API_KEY", ""))
    answer_through(
        there, asked, rendered, settings, max_new_tokens, file, concurrency=concurrency, progress=_Progress()
    )


class _Progress:
    """Rows, tokens/s and the time that is left, on one line."""

    def __init__(self) -> None:
        self.began = time.perf_counter()
        self.first: int | None = None

    def __call__(self, done: int, asked: int, tokens: int) -> None:
        self.first = done - 1 if self.first is None else self.first
        took = time.perf_counter() - self.began
        left = took / (done - self.first) * (asked - done)
        progress(f"{done}/{asked} answers, {tokens / took:.0f} tokens/s, {left:.0f} s left", last=done == asked)
