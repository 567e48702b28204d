"""`draftsmith serve`: an OpenAI-compatible server over one engine."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from json import dumps
from pathlib import Path

from draftsmith.infer.rules.named import DEFAULT, RuleName
from draftsmith.recipes.cli.ranges import FloatAbove0, IntFrom0, IntFrom1


def serve(
    *,
    target: str,
    drafters: str = "",
    host: str = "127.0.0.1",
    port: IntFrom0 = 8000,
    model_name: str = "",
    api_key: str = "",
    batch_size: IntFrom1 = 8,
    max_new_tokens: IntFrom1 = 2048,
    queue: IntFrom0 = 64,
    queue_s: FloatAbove0 = 60.0,
    body_kb: IntFrom1 = 4096,
    prefix_cache: IntFrom0 = 16384,
    learn: bool = False,
    chunk: IntFrom1 = 512,
    rule: RuleName = DEFAULT,
    template: str = "auto",
    controller: str = "",
    worker_url: str = "",
    dtype: str = "auto",
    device: str = "auto",
    tp: IntFrom1 = 1,
    json: bool = False,
) -> int:
    """Serve a target and a drafter to OpenAI's clients: chat completions, completions and models.

    All requests decode in one engine, each with its own settings, and get the text that they would get alone. Sampling
    settings that a request leaves out are the model's own. `/health` and `/metrics` (Prometheus) need no key. SIGTERM
    finishes what runs; a second one ends at once.

    Example: draftsmith serve --target DIR --drafters pld --port 8000

    Args:
        target: folder or Hub name of the target model.
        drafters: one drafter, such as pld, small:MODEL or mix=pld+small:MODEL; plain decoding by default.
        host: address to listen on; by default only this machine reaches it.
        port: port to listen on; 0 takes a free one.
        model_name: the model's name for clients; by default the last part of --target.
        api_key: a key that clients must give, or a file of such keys, one a line.
        batch_size: answers decoded together; others wait.
        max_new_tokens: the most tokens of an answer, and the limit of answers whose request gives none.
        queue: how many answers may wait; beyond that a request gets status 429.
        queue_s: how long an answer may wait, in seconds; beyond that its request gets status 503.
        body_kb: the largest request, in KiB.
        prefix_cache: how many tokens of finished answers and their prompts stay in the cache, so that prompts that
            begin alike are not read again; 0 keeps none.
        learn: let `rest` draft from the answers as they finish.
        chunk: how many tokens of joining prompts are read between two steps of the others.
        rule: how drafts are verified: token, block (chains of drawn tokens as a whole), or traversal (trees as well).
        template: how chats are rendered: auto (chat, or plain without one), chat (the tokenizer's own), plain, a format
            with {prompt}, or a FastChat name.
        controller: URL of a FastChat controller to register with, as one of its workers.
        worker_url: where that controller reaches this server; by default its own address.
        dtype: type of the target's weights, such as bfloat16.
        device: device of the target, such as cuda or cpu.
        tp: ranks that the target's weights are split over, with a device each; they are started for you. Drafts stay
            whole unless they ask for the same: small:DRAFT[tp=2].
        json: at the end, print what was served as one JSON object on the last line.
    """
    import uvicorn  # noqa: F401  # before a model is loaded: without the extra nothing works

    from draftsmith.infer.contract.protocols import LearnsAnswers
    from draftsmith.infer.engine.engine import Engine
    from draftsmith.infer.models.load import check_model, load_target
    from draftsmith.infer.serving.app import OpenAIApp
    from draftsmith.infer.serving.engine_thread import EngineThread, shares_prefixes
    from draftsmith.infer.serving.fastchat_worker import FastChatWorker
    from draftsmith.infer.serving.metrics import ServerMetrics
    from draftsmith.infer.serving.noted_logprobs import LogprobsRule
    from draftsmith.infer.serving.prompt_rows import PromptRows
    from draftsmith.infer.serving.server import LOOPBACK, listen, read_keys, serve_until_stopped, url_of
    from draftsmith.recipes.cli.inputs import one_drafter

    check_model(target, dtype, device, tp)
    keys = read_keys(api_key)
    if keys and controller:
        raise ValueError("FastChat sends its workers no key: leave out --api_key, or --controller")
    drafter = one_drafter(drafters, {"rest": {"learn": True}} if learn else None)
    if learn and not (isinstance(drafter, LearnsAnswers) and drafter.learns):
        raise ValueError(f"--learn is for drafters that learn from answers, such as rest, not for {drafters or 'none'}")
    sock = listen(host, port)
    with sock:
        loaded = load_target(target, dtype=dtype, device=device, tp=tp)
        drafter.bind(loaded)
        name = model_name or Path(target).name
        rows = PromptRows(loaded, template, min(max_new_tokens, loaded.max_positions))
        noting = LogprobsRule(rule)
        engine = Engine(loaded, drafter, batch_size=batch_size, rule=noting, chunk=chunk, learn=learn)
        thread = EngineThread(engine, noting, ServerMetrics(), queue=queue, queue_s=queue_s, prefix_cache=prefix_cache)
        if prefix_cache and not shares_prefixes(engine):
            reads = loaded.draft_shape == "tree"
            reason = f"{drafters} reads the target's states" if reads else "this target's state cannot branch"
            _say(f"--prefix_cache keeps nothing: {reason}, so no prompt is shared")
        if host not in LOOPBACK and not keys:
            _say(f"anyone who reaches {host}:{port} can use this server: see --api_key")
        app = OpenAIApp(thread, rows, name, keys, body_bytes=body_kb << 10)
        worker = FastChatWorker(app, controller, worker_url or url_of(sock)) if controller else None
        url = f"{url_of(sock)}/v1"
        _say(f"serving {name} on {url}")
        with worker.registered() if worker else nullcontext():
            finished = serve_until_stopped(app.starlette(worker.routes() if worker else ()), thread, sock, _say)
        if json:
            tokens = thread.metrics.registry.get_sample_value("draftsmith_generated_tokens_total")
            print(dumps({"model": name, "url": url, "tokens": int(tokens or 0), "finished": finished}))
    return 0 if finished else 1


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
