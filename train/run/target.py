"""A small target from scratch on local text, tokenizer and chat template included, to try everything without a hub.

A byte-level BPE tokenizer is trained first; then a randomly initialised Llama goes through the same training as a
draft. Its text will be plausible, not right.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from draftsmith.infer.files.atomic import folder_beside
from draftsmith.infer.text.records import read_records
from draftsmith.train.data.batches import rank
from draftsmith.train.objectives.sft import SFT
from draftsmith.train.run.config import TrainConfig, check_ranges
from draftsmith.train.run.run import train_draft

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL = ("<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>")
LEAST_VOCAB = len(SPECIAL) + 256
CHAT = (
    "{{ bos_token }}{% for message in messages %}{{ '<|' + message.role + '|>\n' + message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def train_target(config: TrainConfig, vocab_size: int, hidden_size: int) -> dict[str, Any]:
    """Create tokenizer and random weights in `config.target`, train them, and leave the model in `config.out`."""
    check_ranges(config)
    if vocab_size < LEAST_VOCAB:
        raise ValueError(
            f"--vocab_size {vocab_size}: it must be at least {LEAST_VOCAB}, for the bytes and special tokens"
        )
    if hidden_size < 64 or hidden_size % 64:
        raise ValueError(f"--hidden_size {hidden_size}: it must be a multiple of 64, the width of a head")
    start = Path(config.target)
    if rank() == 0 and not (start / "config.json").is_file() and not (Path(config.out) / "run.json").is_file():
        _make_start(start, config, vocab_size, hidden_size)
    return train_draft(SFT(), config)


def _make_start(start: Path, config: TrainConfig, vocab_size: int, hidden_size: int) -> None:
    tokenizer = train_tokenizer(texts(config.data, config.text.limit), vocab_size)
    print(f"tokenizer: {len(tokenizer)} tokens", file=sys.stderr)
    model = random_llama(tokenizer, hidden_size, config.layers, config.text.max_length, config.seed)
    with folder_beside(start) as part:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)


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
