"""Models as they lie on disk: a tiny target with its tokenizer, and drafts that fit it and that do not."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
SPECIAL = ("<pad>", "<eos>", "<|start|>", "<|end|>")
EOS_IDS = [1, 3]
TOKENS = 300
CONTEXT = 512


@dataclass(frozen=True, slots=True)
class Folders:
    """`draft` has the target's tokenizer and a vocabulary padded further; `stranger` the size, not the tokenizer."""

    root: Path
    target: str
    draft: str
    same_size_draft: str
    stranger: str
    bfloat16: str
    tokenizer: Any


def byte_tokenizer(text: Sequence[str]) -> Any:
    """Byte-level BPE of TOKENS tokens with a chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(text, trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", pad_token="<pad>")
    made.chat_template = TEMPLATE
    assert len(made) == TOKENS
    return made


def tiny_llama(vocab: int = TOKENS, seed: int = 0, **changes: Any) -> Any:
    """Wide weights: greedy text varies, and logits lie far apart."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "max_position_embeddings": CONTEXT, "initializer_range": 0.15,
             "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": EOS_IDS,
             }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(vocab_size=vocab, **(sizes | changes)))
    model.generation_config = GenerationConfig(eos_token_id=EOS_IDS, pad_token_id=0)
    return model.eval()


def padded(model: Any, vocab: int) -> Any:
    """The same model with a vocabulary padded to `vocab`, as checkpoints are; the padding is never likely."""
    other = tiny_llama(vocab)
    state = copy.deepcopy(model.state_dict())
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        rows_VD = torch.zeros(vocab, state[name].shape[1], dtype=state[name].dtype)
        rows_VD[: state[name].shape[0]] = state[name]
        state[name] = rows_VD
    other.load_state_dict(state)
    return other


def save(folder: Path, model: Any, tokenizer: Any | None) -> str:
    model.save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return str(folder)


def build(root: Path, shake: Any) -> Folders:
    words = ["the quick brown fox jumps over the lazy dog", "what does the target say to that?"]
    tokenizer = byte_tokenizer(words * 4)
    other = byte_tokenizer(["anders gesagt, nichts davon stimmt überein", "wer weiß schon, wozu das gut ist"] * 4)
    model = tiny_llama()
    near = shake(model, 0.06)
    return Folders(
        root,
        target=save(root / "target", model, tokenizer),
        draft=save(root / "draft", padded(near, TOKENS + 20), tokenizer),
        same_size_draft=save(root / "same_size_draft", near, tokenizer),
        stranger=save(root / "stranger", near, other),
        bfloat16=save(root / "bfloat16", copy.deepcopy(model).to(torch.bfloat16), tokenizer),
        tokenizer=tokenizer,
    )
