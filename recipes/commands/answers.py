"""`draftsmith answers`: the target's own answers to a set of prompts, by our engine or through a server."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from functools import partial
from json import dumps
from typing import TYPE_CHECKING, Any, Literal

from draftsmith.infer.rules.named import DEFAULT, RuleName
from draftsmith.recipes.cli.progress import progress
from draftsmith.recipes.cli.ranges import Above0To1, FloatFrom0, IntFrom0, IntFrom1

if TYPE_CHECKING:
    from draftsmith.infer.answers.sharded import Answer
    from draftsmith.infer.models.hf_target import HFTarget
    from draftsmith.infer.text.rendering import Template

SHOWN = 5
# Options that do not change an answer.
NOT_ANSWERS = ("json", "out", "batch_size", "drafters", "rule", "limit", "on_bad", "tp", "ray", "ray_workers")
PRESETS: dict[str, dict[str, float]] = {"greedy": {"temperature": 0.0}, "nucleus": {"temperature": 0.7, "top_p": 0.95}}


def answers(
    *,
    data: list[str],
    out: str,
    target: str | None = None,
    drafters: str = "",
    rule: RuleName = DEFAULT,
    server: str | None = None,
    model: str = "",
    tokenizer: str | None = None,
    preset: Literal["greedy", "nucleus"] = "greedy",
    temperature: FloatFrom0 | None = None,
    top_k: IntFrom0 | None = None,
    top_p: Above0To1 | None = None,
    max_new_tokens: IntFrom1 = 128,
    logprobs: bool = False,
    seed: IntFrom0 = 0,
    batch_size: IntFrom1 = 8,
    limit: IntFrom1 | None = None,
    on_bad: Literal["raise", "skip"] = "raise",
    template: str = "auto",
    dtype: str = "auto",
    device: str = "auto",
    tp: IntFrom1 = 1,
    ray: str | None = None,
    ray_workers: IntFrom1 | None = None,
    json: bool = False,
) -> int:
    """Answer every prompt and keep the token ids; run it again after an interruption to resume.

    Example: draftsmith answers --target DIR --data prompts.jsonl --out answers.jsonl --preset nucleus

    Args:
        data: prompts: files, folders or `datasets` names.
        out: JSONL file to write; prompts that it already answers are skipped.
        target: folder or Hub name of the model that answers.
        drafters: one drafter to speed it up, such as pld.
        rule: how drafts are verified: token, block (chains of drawn tokens as a whole), or traversal (trees as well).
        server: URL of an OpenAI-compatible server, instead of a target.
        model: name of the model on the server.
        tokenizer: folder or Hub name of the server's tokenizer.
        preset: greedy, or nucleus (temperature 0.7, top_p 0.95).
        temperature: overrides the preset.
        top_k: sample from this many of the likeliest tokens; 0 from all.
        top_p: overrides the preset.
        max_new_tokens: token limit of each answer.
        logprobs: keep the log-probability of every token, after temperature and truncation (for `draftsmith forecast`).
        seed: random seed of sampling.
        batch_size: answers decoded together, or concurrent requests.
        limit: read at most this many prompts.
        on_bad: rows that are not valid JSON or UTF-8: raise an error, or skip and count them.
        template: prompt template: auto (chat, or plain without one), chat (the tokenizer's own), plain, a format with
            {prompt}, or a FastChat name.
        dtype: type of the target's weights, such as bfloat16.
        device: device of the target, such as cuda or cpu.
        tp: ranks that the target's weights are split over, with a device each; they are started for you. Drafts stay
            whole unless they ask for the same: small:DRAFT[tp=2].
        ray: answer on many workers with Ray: local (this machine), or the HOST:PORT of a running cluster. Each loads
            the target; all must see --out under the same path.
        ray_workers: workers of --ray; default: one per core, or per GPU.
        json: print one JSON object on the last line.
    """
    config: dict[str, Any] = dict(locals())
    for name in NOT_ANSWERS:
        del config[name]
    from draftsmith.infer.files.locations import check_writable
    from draftsmith.infer.files.workers import check_workers, open_workers

    if ray is not None and server is not None:
        raise ValueError("--ray spreads a target's decoding over machines; a --server takes concurrent requests itself")
    if ray is not None and tp > 1:
        raise ValueError("--ray gives each worker a whole target, and --tp splits one over ranks: give either")
    check_workers(ray, ray_workers)
    from draftsmith.infer.answers.answer_file import AnswerFile, with_keys
    from draftsmith.infer.answers.sharded import answer_shards
    from draftsmith.infer.contract.sampling import resolve_settings
    from draftsmith.infer.models.load import check_model, choose_device, load_generation_config, load_target
    from draftsmith.infer.text.templates import find_template, load_tokenizer
    from draftsmith.recipes.cli.inputs import one_drafter, read_questions

    if (target is None) == (server is None):
        raise ValueError("give either --target or --server")
    if logprobs and server is not None:
        raise ValueError("--logprobs needs --target: a server's may be raw; `draftsmith forecast` reads its own logs")
    if tp > 1 and target is None:
        raise ValueError("--tp is for a --target that is decoded here; a --server has its own")
    check_writable(out)
    if target is not None:
        check_model(target, dtype, device, tp)
    elif tokenizer is None:
        raise ValueError("--server needs --tokenizer as well: answers keep token ids")
    asked = with_keys(read_questions(data, limit, on_bad))
    own = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    wanted = PRESETS[preset] | {key: value for key, value in own.items() if value is not None} | {"seed": seed}
    drafter = one_drafter(drafters)
    loaded = None
    if target is not None and ray is None:
        loaded = load_target(target, dtype=dtype, device=device, tp=tp)
    form = find_template(template, load_tokenizer(target or str(tokenizer)) if loaded is None else loaded.tokenizer)
    config["template"] = form.name
    if not logprobs:  # files from before there were any can be resumed
        del config["logprobs"]
    settings = resolve_settings(None if target is None else load_generation_config(target), **wanted)
    if logprobs and settings.greedy:
        raise ValueError("--logprobs needs a temperature above 0: greedy tokens are not drawn; give --temperature")
    began = time.perf_counter()
    opened: Callable[[], Answer]
    if target is None:
        assert server is not None
        opened = partial(_through_server, server, model, form, settings, max_new_tokens, batch_size)
    else:
        given = (None, None, None) if loaded is None else (loaded, drafter, form)
        kind = choose_device(device).type  # a worker sees the devices that it may use
        opened = partial(
            _by_engine, target, drafters, template, settings, dtype, kind, rule, logprobs, max_new_tokens, batch_size,
            *given,
        )  # fmt: skip
    cuda = target is not None and kind == "cuda"
    with AnswerFile(out, config | {"sampling": settings.to_json()}) as file:
        before = len(file.done)
        with open_workers(ray, ray_workers, cuda) as workers:
            shown = _Progress(before, len(asked))
            answer_shards(opened, asked, file, workers, batch_size, shown)
        seconds = time.perf_counter() - began
        failed = len(file.errors)
        summary = {"out": out, "answered": len(file.done) - before - failed, "failed": failed}
        summary |= {"there_already": before, "seconds": seconds, "cpu_seconds": workers.cpu_seconds}
    for key, error in list(file.errors.items())[:SHOWN]:
        print(f"question {key} has no answer: {error}", file=sys.stderr)
    if json:
        print(dumps(summary))
    else:
        counts = f", {failed} failed" if failed else ""
        print(f"{summary['answered']} answers in {seconds:.1f} s{counts}, {before} were there already: {out}")
    return int(failed > 0 and failed == len(file.done))


def _by_engine(
    target: str, drafters: str, template: str, settings: Any, dtype: str, device: str, rule: str, logprobs: bool,
    max_new_tokens: int, batch_size: int, loaded: HFTarget | None = None, drafter: Any = None,
    form: Template | None = None,
) -> Answer:  # fmt: skip
    """Called by each worker, which loads what it is not given."""
    from draftsmith.infer.answers.by_engine import answer_all
    from draftsmith.infer.models.load import load_target
    from draftsmith.infer.text.templates import find_template
    from draftsmith.recipes.cli.inputs import one_drafter

    decoder = load_target(target, dtype=dtype, device=device) if loaded is None else loaded
    drafter = one_drafter(drafters) if drafter is None else drafter
    form = find_template(template, decoder.tokenizer) if form is None else form
    drafter.bind(decoder)
    stops = decoder.stops(max_new_tokens)
    return lambda records, file, note: answer_all(
        decoder, drafter, records, form, settings, stops, file,
        batch_size=batch_size, rule=rule, logprobs=logprobs, progress=note,
    )  # fmt: skip


def _through_server(
    server: str, model: str, form: Template, settings: Any, max_new_tokens: int, batch_size: int
) -> Answer:
    from draftsmith.infer.answers.by_server import answer_through
    from draftsmith.infer.answers.server_client import Server

    to = Server(server, model, os.environ.get("OPENAI_API_KEY", ""))
    return lambda records, file, note: answer_through(
        to, records, form, settings, max_new_tokens, file, concurrency=batch_size, progress=note
    )


class _Progress:
    """Answers, tokens/s and the time left, over all workers, on one line."""

    def __init__(self, before: int, asked: int) -> None:
        self.began = time.perf_counter()
        self.before, self.asked = before, asked

    def __call__(self, rows: int, tokens: int) -> None:
        done, seconds = self.before + rows, time.perf_counter() - self.began
        left = seconds / max(rows, 1) * (self.asked - done)
        line = (
            f"{done}/{self.asked} answers, {rows / seconds:.1f}/s, {tokens / seconds:.0f} tokens/s, {left:.0f} s left"
        )
        progress(line, last=done == self.asked)
