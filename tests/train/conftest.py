"""A byte tokenizer with a chat template, and corpora of random tokens."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_chats import chat_tokenizer

from draftsmith.train.data.corpus import Corpus


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return chat_tokenizer()


@pytest.fixture(scope="session")
def make_corpus() -> Callable[..., Corpus]:
    """A corpus of random samples with the given lengths, the second half of each learned."""

    def make(lengths: list[int], vocab: int = 61, seed: int = 0) -> Corpus:
        random = np.random.default_rng(seed)
        tokens = random.integers(3, vocab, sum(lengths)).astype(np.int32)
        masks = np.concatenate([np.arange(n) >= n // 2 for n in lengths]).astype(np.uint8)
        offsets = np.cumsum([0, *lengths])
        counts = np.array([n - max(n // 2, 1) for n in lengths])
        groups = np.arange(len(lengths), dtype=np.uint64)
        return Corpus(tokens, masks, offsets, groups, np.full(len(lengths), np.nan), counts, {})

    return make


@pytest.fixture
def kill_at_step() -> Callable[[Sequence[Any], Path, int], None]:
    """Starts a run and kills it once metrics.csv has a row of the step."""

    def kill(words: Sequence[Any], out: Path, step: int) -> None:
        process = subprocess.Popen(list(map(str, words)), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        until = time.monotonic() + 120
        try:
            while time.monotonic() < until and process.poll() is None:
                path = out / "metrics.csv"
                if path.exists() and sum(",train," in line for line in path.read_text().splitlines()) >= step:
                    break
                time.sleep(0.002)
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"

    return kill
