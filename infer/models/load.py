"""Loads models and tokenizers from a folder or the Hub, and checks that draft and target share a tokenizer.

Missing paths raise; they are never tried as Hub names.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from draftsmith.infer.files.locations import may_be_on_hub
from draftsmith.infer.models.architectures import refusal
from draftsmith.infer.models.prepack import can_prepack, prepack
from draftsmith.infer.text.tokenizer import load_tokenizer, tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from draftsmith.infer.models.hf_target import HFTarget

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def load_model(
    name: str, *, dtype: str = "auto", device: str = "auto", for_decoding: bool = False
) -> tuple[Any, PreTrainedTokenizerBase]:
    """A causal LM in eval mode and its tokenizer. `dtype` auto: as stored; `device` auto: CUDA if there is one.

    `for_decoding`: the model must be able to verify trees, and its weights will not change, so they may be packed
    (prepack.py).
    """
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: auto, {', '.join(DTYPES)}")
    folder = Path(name)
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{name} is not a model folder: it has no config.json")
    elif not may_be_on_hub(name):
        raise ValueError(f"{name} does not exist, and is not a Hub name (owner/model)")
    tokenizer = load_tokenizer(name)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        reason = refusal(AutoConfig.from_pretrained(name)) if for_decoding else None
        if reason:
            raise ValueError(f"{name}: {reason}")
        model = AutoModelForCausalLM.from_pretrained(name, dtype=DTYPES.get(dtype, "auto"))
    except OSError as problem:
        raise ValueError(f"{name} could not be loaded: {str(problem).splitlines()[0]}") from problem
    model = model.to(device).eval()
    if for_decoding and can_prepack(model):
        prepack(model)
    return model, tokenizer


def load_target(name: str, *, dtype: str = "auto", device: str = "auto") -> HFTarget:
    """A Hugging Face causal LM as target."""
    from draftsmith.infer.models.hf_target import HFTarget

    model, tokenizer = load_model(name, dtype=dtype, device=device, for_decoding=True)
    return HFTarget(model, tokenizer)


def check_same_tokenizer(
    draft: PreTrainedTokenizerBase | None,
    draft_vocab_size: int,
    target: PreTrainedTokenizerBase | None,
    target_vocab_size: int,
    what: str,
) -> None:
    """Refuse a draft whose token ids mean other text. Padded vocabularies may differ in size; the tokenizers may not.

    If either tokenizer is missing (bare models), only the vocabulary sizes can be compared.
    """
    if draft is None or target is None:
        if draft_vocab_size != target_vocab_size:
            raise ValueError(
                f"{what} has a vocabulary of {draft_vocab_size} and the target one of {target_vocab_size}; give both "
                "tokenizers, to check that their ids mean the same"
            )
        return
    if tokenizer_fingerprint(draft) != tokenizer_fingerprint(target):
        raise ValueError(f"{what} has another tokenizer than the target: its token ids mean other text")
    if draft_vocab_size < len(target):
        raise ValueError(f"{what} embeds {draft_vocab_size} ids, but the tokenizer has {len(target)}")
