"""What a rank other than 0 does: it carries out on its own runner what rank 0 sends, and says nothing."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from draftsmith.infer.models.architectures import prepare_target
from draftsmith.infer.models.load import check_model
from draftsmith.infer.models.runner.entries import Entries
from draftsmith.infer.models.runner.model_runner import ModelRunner
from draftsmith.infer.models.tensor_parallel.heartbeat import beat
from draftsmith.infer.models.tensor_parallel.launch import LOOPBACK, draft_share, join, own_runner
from draftsmith.infer.models.tensor_parallel.leading_runner import END_VERB
from draftsmith.infer.models.tensor_parallel.ranks import TIMEOUT, Ranks
from draftsmith.infer.models.tensor_parallel.sharding import load_shard

# How often a rank looks whether rank 0 is there, in seconds.
POLL_S = 0.5
ALONE = ("open", "fork", "close", "drop", "shorten", "place", "place_uncommitted", "commit")


def follow(runner: ModelRunner, ranks: Ranks) -> None:
    """Carry out verbs until rank 0 sends the last one. A message is for one model: 0 is the target, then come drafts as
    they are loaded."""
    runners = {0: runner}
    while True:
        number, verbs = ranks.receive()
        for verb, given in verbs:
            if verb == END_VERB:
                return
            if verb == "load":
                assert number not in runners
                runners[number] = draft_share(*given)
            else:
                carry_out(runners[number], verb, given)


def carry_out(runner: ModelRunner, verb: str, given: tuple[Any, ...]) -> None:
    if verb in ALONE:
        getattr(runner, verb)(*given)
    elif verb == "forward":
        rows, entries, wanted = given
        runner.forward(rows, _entries(entries), (), wanted)
    elif verb == "enter":
        rows, entries = given
        runner.enter(rows, _entries(entries))
    elif verb == "deepen":
        runner.deepen(*given)
    elif verb == "prefill":
        rows, tokens, blocks, with_logits = given
        runner.prefill(rows, tokens, (), blocks, on_logits=_ignore if with_logits else None)
    elif verb == "call":
        *args, named = given
        with torch.inference_mode():
            runner.model(
                *[_on(runner, value) for value in args], **{key: _on(runner, one) for key, one in named.items()}
            )
    else:
        raise AssertionError(f"unknown verb {verb}")


def _entries(given: Sequence[tuple[list[int], list[int]]]) -> list[Entries]:
    return [Entries(tokens, parents) for tokens, parents in given]


def _on(runner: ModelRunner, value: Any) -> Any:
    return value.to(runner.device) if isinstance(value, torch.Tensor) else value


def _ignore(rows: Any, counts: Any, logits_NV: torch.Tensor) -> None:
    pass


def main(words: str) -> None:
    """The process of a rank that rank 0 started. What goes wrong is its last line on standard error, which rank 0
    reads; where rank 0 itself is gone, rank 1 says so on the terminal."""
    given = json.loads(words)
    for number in (signal.SIGINT, signal.SIGTERM):  # rank 0 hears these, and lets the others end
        signal.signal(number, signal.SIG_IGN)
    ends = _WithParent(given["parent"], given["stderr"] if given["rank"] == 1 else None)
    try:
        torch.set_num_threads(given["threads"])
        store = dist.TCPStore(LOOPBACK, given["port"], given["tp"], is_master=False, timeout=TIMEOUT)
        beat(join(given["tp"], given["rank"], store), given["rank"])
        load_and_follow(given["name"], given["dtype"])
    except Exception as problem:
        time.sleep(POLL_S)  # what rank 0 held is closed a little before it is gone
        ends.if_gone()
        print(" ".join(f"{type(problem).__name__}: {problem}".split())[:300], file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)  # the processes end in any order: a destructor would wait for the others


def follow_launcher(name: str, dtype: str, device: str, tp: int) -> int:
    """Another rank than 0 in a process that torchrun started, up to its exit code; rank 0 says what is wrong."""
    try:
        check_model(name, dtype, device, tp)
        rank = int(os.environ["RANK"])
        beat(join(tp, rank, None), rank)
        load_and_follow(name, dtype)
    except ValueError:
        return 2
    except RuntimeError:
        os._exit(1)  # a rank is lost
    os._exit(0)


def load_and_follow(name: str, dtype: str) -> None:
    """A rank's part of a target, from loading it to the end."""
    ranks = Ranks()
    shard = load_shard(name, dtype)
    follow(own_runner(shard.model, prepare_target(shard.model)), ranks)


class _WithParent:
    """Ends this process with the one that started it."""

    def __init__(self, parent: int, stderr: int | None) -> None:
        self.parent, self.stderr = parent, stderr
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.if_gone()
            time.sleep(POLL_S)

    def if_gone(self) -> None:
        if os.getppid() == self.parent:
            return
        if self.stderr is not None:
            with contextlib.suppress(OSError):
                os.write(self.stderr, b"draftsmith: rank 0 of the target is gone: the other ranks end\n")
        os._exit(1)
