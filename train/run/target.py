"""A small target from scratch on local text, tokenizer and chat template included: so that everything can be tried on a
machine without a hub.

A byte-level BPE is trained on the text first; then a Llama of random weights goes through the same training as any
draft does. What it says will be plausible, not right.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from draftsmith.infer.text.records import read_records
from draftsmith.train.data.batches import rank
from draftsmith.train.objectives.sft import SFT
from draftsmith.train.run.config import TrainConfig
from draftsmith.train.run.run import train_draft
from draftsmith.train.run.settings import Machine, Optim, Text, Watch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message.role + '|>\n' + message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def train_target(
    *,
    data: list[str],
    out: str,
    vocab_size: int,
    hidden_size: int,
    num_layers: int,
    max_steps: int | None,
    minutes: float | None,
    epochs: float,
    seed: int,
    text: Text,
    optim: Optim,
    machine: Machine,
    watch: Watch,
) -> dict[str, Any]:
    """Make `OUT/start` (tokenizer and random weights), train it, and leave the trained model in `out`."""
    start = Path(out) / "start"
    if rank() == 0 and not (start / "config.json").is_file() and not (Path(out) / "run.json").is_file():
        _make_start(start, data, vocab_size, hidden_size, num_layers, text, seed)
    plan = TrainConfig(
        target=str(start), data=data, out=out, num_layers=num_layers, epochs=epochs, max_steps=max_steps,
        minutes=minutes, seed=seed, text=text, optim=optim, machine=machine, watch=watch,
    )  # fmt: skip
    return train_draft(SFT(), plan)


def _make_start(
    start: Path, data: list[str], vocab_size: int, hidden_size: int, num_layers: int, text: Text, seed: int
) -> None:
    if hidden_size % 64:
        raise ValueError(f"hidden_size {hidden_size} must be a multiple of 64, the width of a head")
    tokenizer = train_tokenizer(texts(data, text.limit), vocab_size)
    print(f"tokenizer: {len(tokenizer)} tokens", file=sys.stderr)
    model = random_llama(tokenizer, hidden_size, num_layers, text.max_length, seed)
    part = start.with_name(f".start.{os.getpid()}.part")
    try:
        part.mkdir(parents=True)
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        os.replace(part, start)
    except OSError as error:
        raise ValueError(f"{start} could not be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def texts(data: list[str], limit: int | None) -> Iterator[str]:
    """All text of the records, for the tokenizer."""
    for record in read_records(data, limit=limit, on_bad="skip"):
        if record.text:
            yield record.text
        for message in record.messages:
            yield message.content


def train_tokenizer(source: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `vocab_size` tokens, with our chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    least = len(SPECIAL) + 256
    if vocab_size < least:
        raise ValueError(f"vocab_size {vocab_size}: bytes and special tokens alone are {least}")
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(source, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", bos_token="<s>", eos_token="</s>")
    tokenizer.chat_template = CHAT
    return tokenizer


def random_llama(
    tokenizer: PreTrainedTokenizerFast, hidden_size: int, num_layers: int, max_length: int, seed: int
) -> Any:
    """A Llama of random weights for `tokenizer`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=-(-hidden_size * 8 // 3 // 32) * 32,
        num_hidden_layers=num_layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=hidden_size // 64,
        max_position_embeddings=max(2048, max_length),
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
