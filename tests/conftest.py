"""Fixtures: tiny random targets of every supported family, a byte tokenizer, rows, and the drafters that every promise
is tried with."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_chats import build_target, conversations, write_jsonl
from tiny_folders import Folders, build
from tiny_models import shaken, tiny_model

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# For the processes that tests start: idle threads of theirs would only wait for one another.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# The models are tiny: a second thread only waits for the first.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Any]:
    return tiny_model


@pytest.fixture(scope="session")
def shake() -> Callable[..., Any]:
    return shaken


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """A tiny target on disk, and drafts that fit it and that do not."""
    return build(tmp_path_factory.mktemp("tiny"), shaken)


@pytest.fixture(scope="session")
def word_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tokenizer whose tokens are bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {"<end>": 0} | {letter: i + 1 for i, letter in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    folder = tmp_path_factory.mktemp("tokenizer")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations to train on."""
    return write_jsonl(tmp_path_factory.mktemp("data") / "chats.jsonl", conversations(40))


@pytest.fixture(scope="session")
def target_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_target(tmp_path_factory.mktemp("models") / "target")


@pytest.fixture(autouse=True)
def _quiet_threads() -> Iterator[None]:
    """Tests must not depend on the state of torch's own generator, nor change it for one another."""
    with torch.random.fork_rng(devices=[]):
        yield


# Begun first, so that pytest-xdist's workers finish at about the same time.
LONGEST = (
    "test_lossless.py",
    "test_sampled_drafts.py",
    "test_speculative.py",
    "test_hybrid_lossless.py",
    "test_two_ranks.py",
    "test_train_recipes.py",
    "test_bench.py",
    "test_stops.py",
    "test_ray.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first; skip tests of a CUDA device, with the reason, where there is none."""
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
