"""Loads models and tokenizers from a folder or the Hub, and checks that draft and target share a tokenizer.

Missing paths raise; they are never tried as Hub names.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import torch

from draftsmith.infer.files.errors import first_line
from draftsmith.infer.files.locations import may_be_on_hub
from draftsmith.infer.models.architectures import refusal
from draftsmith.infer.models.products.replace import replace_products
from draftsmith.infer.text.tokenizer import load_tokenizer, tokenizer_fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from draftsmith.infer.models.hf_target import HFTarget

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


def load_model(
    name: str, *, dtype: str = "auto", device: str = "auto", for_decoding: bool = False
) -> tuple[Any, PreTrainedTokenizerBase]:
    """A causal LM in eval mode and its tokenizer. `dtype` auto: as stored; `device` auto: CUDA if there is one.

    `for_decoding`: the model must be able to verify trees, and its weights will not change, so its products may be
    replaced by faster ones (products/replace.py).
    """
    check_model(name, dtype, device)
    tokenizer = load_tokenizer(name)
    model, _ = read_model(name, dtype, for_decoding)
    model = model.to(choose_device(device)).eval()
    if for_decoding:
        replace_products(model)
    return model, tokenizer


def read_model(name: str, dtype: str = "auto", for_decoding: bool = False) -> tuple[Any, list[str]]:
    """The model without its tokenizer, on the CPU, and the weights that its files lack: transformers makes these up."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with loading(name):
        reason = refusal(AutoConfig.from_pretrained(name)) if for_decoding else None
        if reason:
            raise ValueError(f"{name}: {reason}")
        model, found = AutoModelForCausalLM.from_pretrained(
            name, dtype=DTYPES.get(dtype, "auto"), output_loading_info=True
        )
    return model, sorted(found["missing_keys"])


@contextmanager
def loading(name: str) -> Iterator[None]:
    """ValueError in one line for files of the model `name` that cannot be read; progress only on a terminal."""
    from safetensors import SafetensorError
    from transformers.utils import logging

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    try:
        yield
    except (OSError, SafetensorError, RuntimeError, EOFError, UnpicklingError) as problem:
        reason = _damaged(Path(name)) or first_line(problem)
        raise ValueError(f"{name} could not be loaded: {reason}") from problem


def check_model(name: str, dtype: str = "auto", device: str = "auto", tp: int = 1) -> None:
    """Refuse a name, dtype, device or number of ranks that the model cannot be loaded with; reads no weights."""
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"unknown dtype {dtype!r}: auto, {', '.join(DTYPES)}")
    choose_device(device)
    folder = Path(name)
    if not name or "\0" in name:
        raise ValueError(f"{name!r} is not the name of a model: give a folder or a Hub name (owner/model)")
    if folder.exists():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{name} is not a model folder: it has no config.json")
    elif not may_be_on_hub(name):
        raise ValueError(f"{name} does not exist, and is not a Hub name (owner/model)")
    if tp > 1:
        from draftsmith.infer.models.tensor_parallel.sharding import check_sharding

        check_sharding(name, tp, device)


def choose_device(name: str) -> torch.device:
    """A device that this torch can use; auto is CUDA if there is a device, else the CPU."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    kind, _, index = name.partition(":")
    present = {"cpu": 1}
    if torch.cuda.is_available():
        present["cuda"] = torch.cuda.device_count()
    if torch.backends.mps.is_available():
        present["mps"] = 1
    if kind in present and (not index or (index.isdecimal() and int(index) < present[kind])):
        return torch.device(name)
    known = [f"{one}:{number}" if number else one for one, count in present.items() for number in range(count)]
    if kind in present:
        reason = f"there is no device {name!r} here"
    elif kind == "cuda" and torch.version.cuda is None and torch.version.hip is None:
        reason = f"device {name!r}: this torch ({torch.__version__}) is built without CUDA"
    elif kind in ("cuda", "mps"):
        reason = f"device {name!r}: torch finds no such device"
    else:
        reason = f"unknown device {name!r}" + ("; CUDA devices are called cuda" if kind == "gpu" else "")
    raise ValueError(f"{reason}; this machine has {', '.join(known)}")


def _damaged(folder: Path) -> str:
    """Which weight file of `folder` cannot be read, and why; empty if none."""
    from safetensors import SafetensorError, safe_open

    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as problem:
            return f"{path.name} is damaged or incomplete ({problem}); copy or download it again"
    return ""


def load_target(name: str, *, dtype: str = "auto", device: str = "auto", tp: int = 1) -> HFTarget:
    """A Hugging Face causal LM as target. `tp`: how many ranks, with a device each, its weights are split over. They
    are started here, unless torchrun has started this process as rank 0 of them."""
    from draftsmith.infer.models.hf_target import HFTarget

    if tp > 1:
        from draftsmith.infer.models.tensor_parallel.launch import load_leading

        return load_leading(name, dtype, device, tp)

    model, tokenizer = load_model(name, dtype=dtype, device=device, for_decoding=True)
    return HFTarget(model, tokenizer)


def load_config(name: str) -> Any:
    """The config of the model `name`."""
    from transformers import AutoConfig

    with loading(name):
        return AutoConfig.from_pretrained(name)


def load_generation_config(name: str) -> Any:
    """The sampling defaults that the model `name` comes with; reads no weights."""
    from transformers import AutoConfig, GenerationConfig

    try:
        return GenerationConfig.from_pretrained(name)
    except OSError:
        return GenerationConfig.from_model_config(AutoConfig.from_pretrained(name))


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
