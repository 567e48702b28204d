"""A server in this process, on a free port: its event loop in one thread, its engine in another."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from tiny_folders import TEMPLATE, byte_tokenizer, tiny_llama
from tiny_models import shaken

from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.contract.sampling import Settings
from draftsmith.infer.contract.trace import Generation
from draftsmith.infer.drafters.controls import Empty
from draftsmith.infer.engine.engine import Engine
from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.infer.serving.app import OpenAIApp
from draftsmith.infer.serving.engine_thread import EngineThread
from draftsmith.infer.serving.metrics import ServerMetrics
from draftsmith.infer.serving.noted_logprobs import LogprobsRule
from draftsmith.infer.serving.prompt_rows import PromptRows
from draftsmith.infer.serving.server import listen, url_of

WORDS = ["the quick brown fox jumps over the lazy dog", "what does the target say to that?", "Ünïcode 🙂 東京"]
MODEL = "tiny"
# Asks for token ids with the text.
IDS = {"return_token_ids": True}
# Answers to tools, calls and plain turns alike.
TOOL_TEMPLATE = (
    "{% if tools %}<|start|>tools\n{% for tool in tools %}{{ tool.function.name }} {% endfor %}<|end|>\n{% endif %}"
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}"
    "{% for call in m.tool_calls or [] %}{{ call.function.name }}:{{ call.function.arguments.city }}{% endfor %}"
    "<|end|>\n{% endfor %}{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def models(context: int = 512) -> tuple[Any, Any, Any]:
    """A target whose text varies, a draft for it, and their tokenizer; in float64, where batches change no token."""
    model = tiny_llama(max_position_embeddings=context, initializer_range=0.3).to(torch.float64)
    tokenizer = byte_tokenizer(WORDS * 4)
    tokenizer.chat_template = TOOL_TEMPLATE
    assert TOOL_TEMPLATE.endswith(TEMPLATE[-60:])
    return model, shaken(model, 0.06), tokenizer


class RunningServer:
    """`target` and `drafter` behind HTTP. What it serves is in `app`, `thread` and `engine`."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        drafter: Any = None,
        *,
        batch_size: int = 4,
        queue: int = 64,
        queue_s: float = 60.0,
        prefix_cache: int = 0,
        max_new_tokens: int = 64,
        learn: bool = False,
        worker: Callable[[OpenAIApp, str], Any] | None = None,
        **app: Any,
    ) -> None:
        self.target = HFTarget(model, tokenizer)
        self.drafter = Empty() if drafter is None else drafter
        self.drafter.bind(self.target)
        rule = LogprobsRule()
        self.engine = Engine(self.target, self.drafter, batch_size=batch_size, rule=rule, learn=learn, chunk=128)
        self.thread = EngineThread(
            self.engine, rule, ServerMetrics(), queue=queue, queue_s=queue_s, prefix_cache=prefix_cache
        )
        self.rows = PromptRows(self.target, "auto", max_new_tokens)
        self.app = OpenAIApp(self.thread, self.rows, MODEL, **app)
        self._sock = listen("127.0.0.1", 0)
        self.url = url_of(self._sock)
        self.worker = worker(self.app, self.url) if worker is not None else None

    @cached_property
    def reference(self) -> HFTarget:
        """The same model with a cache of its own."""
        return HFTarget(self.target.model, self.target.tokenizer)

    def __enter__(self) -> RunningServer:
        import uvicorn

        more = self.worker.routes() if self.worker is not None else ()
        config = uvicorn.Config(self.app.starlette(more), log_level="warning", lifespan="off")
        self._server = uvicorn.Server(config)
        self._loop = threading.Thread(target=self._server.run, kwargs={"sockets": [self._sock]})
        self.thread.start()
        self._loop.start()
        until(lambda: self._server.started)
        return self

    def __exit__(self, *problem: object) -> None:
        self._server.should_exit = True
        self._server.force_exit = problem[0] is not None
        self._loop.join(30)
        self.thread.finish()
        assert self.thread.join(30)
        assert not self._loop.is_alive()

    def idle(self) -> bool:
        """Whether no request holds anything: no row, no seat, no note, no slot beyond those of kept rows."""
        state = self.thread.state()
        return (
            state["rows"] == state["waiting"] == len(self.thread.rule) == 0
            and not self.engine.busy
            and len(self.engine) == state["kept"]
        )


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    """Wait for something that another thread or process does."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def row_of(server: RunningServer, ids: Sequence[int], most: int = 24, key: str = "0", **settings: Any) -> Row:
    """The row that the server should make of a prompt."""
    return Row(key, list(ids), Settings(**settings), Stops(most, server.target.eos_ids), server.target.tokenizer)


def alone(server: RunningServer, row: Row, drafter: Any = None) -> Generation:
    """What a row says decoded alone: plainly, unless a drafter is given."""
    own = Empty() if drafter is None else drafter
    own.bind(server.reference)
    (done,) = Engine(server.reference, own).run([row], strict=True)
    return done
