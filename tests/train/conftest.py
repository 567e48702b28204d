"""A byte tokenizer with a chat template, conversations, and corpora made of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from draftsmith.train.data.corpus import Corpus

CHAT = "{% for m in messages %}{{ '<|' + m.role + '|>' }}{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"  # noqa: E501


def chat_tokenizer() -> Any:
    """256 bytes, three roles and an end: every text has one spelling."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*special, *letters])}
    made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = CHAT
    return tokenizer


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return chat_tokenizer()


def conversations(count: int, turns: int = 2, words: int = 6) -> list[dict[str, Any]]:
    rows = []
    for i in range(count):
        messages = []
        for turn in range(turns):
            messages.append({"role": "user", "content": f"count from {i} in turn {turn}"})
            said = " ".join(str(i + step) for step in range(words + (i * 7) % 5))
            messages.append({"role": "assistant", "content": said})
        rows.append({"id": str(i), "messages": messages})
    return rows


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jsonl(tmp_path_factory.mktemp("data") / "chats.jsonl", conversations(40))


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


@pytest.fixture(scope="session")
def target_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama of four layers with the byte tokenizer, as a plain Hugging Face folder."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = chat_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, bos_token_id=1, eos_token_id=2, pad_token_id=0,
        tie_word_embeddings=False, initializer_range=0.1,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        model = LlamaForCausalLM(config)
    folder = tmp_path_factory.mktemp("models") / "target"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
