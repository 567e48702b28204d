"""Draft shapes in a target's family, before any is trained: what they look like, weigh and hold, and random models.

The family's config is the target's own with another depth and width: heads of the target's size, as many key/value
heads a head, the intermediate size in proportion. This module knows configs; it knows no training and no times.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from draftsmith.infer.files.locations import may_be_on_hub
from draftsmith.infer.models.architectures import refusal
from draftsmith.infer.models.cached_lm import weight_bytes
from draftsmith.infer.models.layers import picked_config, stack_path
from draftsmith.infer.models.load import DTYPES

DEPTHS = (1, 2, 3, 5)


@dataclass(frozen=True, slots=True)
class CandidateShape:
    """`layers` deep and `width` wide; `heads` 0 is as many as the target's head size gives."""

    layers: int
    width: int
    heads: int = 0

    @classmethod
    def parse(cls, text: str) -> CandidateShape:
        """LAYERSxWIDTH or LAYERSxWIDTHxHEADS."""
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(x[1-9]\d*)?", text):
            raise ValueError(f"{text!r} is no shape: LAYERSxWIDTH, such as 2x512, or LAYERSxWIDTHxHEADS")
        return cls(*map(int, text.split("x")))

    def __str__(self) -> str:
        return "x".join(map(str, (self.layers, self.width, self.heads) if self.heads else (self.layers, self.width)))


@dataclass(frozen=True, slots=True)
class Size:
    """What a model is made of. `read_bytes` are what one pass reads of the weights, `token_bytes` a token's cache,
    `multiplied` the weights that every token is multiplied with: those of the layers and of the head."""

    layers: int
    parameters: int
    layer_bytes: int
    head_bytes: int
    read_bytes: int
    total_bytes: int
    token_bytes: int
    multiplied: int

    @property
    def training_bytes(self) -> int:
        """float32 weights, their gradients and Adam's two moments; activations come on top."""
        return 16 * self.parameters

    def to_json(self) -> dict[str, int]:
        return asdict(self) | {"training_bytes": self.training_bytes}


def load_config(name: str) -> Any:
    """The config of a folder, of a Hub name, or in a file of its own; no weights are looked for."""
    from transformers import AutoConfig

    path = Path(name)
    if not path.exists() and not may_be_on_hub(name):
        raise ValueError(f"{name} does not exist, and is no Hub name (owner/model)")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"{name} is not a model folder: it has no config.json")
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, KeyError, ValueError) as problem:
        raise ValueError(f"the config of {name} could not be read: {str(problem).splitlines()[0]}") from problem
    reason = refusal(config)
    if reason:
        raise ValueError(f"{name}: {reason}")
    return config


def choose_dtype(config: Any, name: str) -> torch.dtype:
    """The type that decoding would run in: as asked, or as the config says."""
    if name != "auto" and name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}: auto, {', '.join(DTYPES)}")
    said = DTYPES[name] if name != "auto" else config.dtype or torch.float32
    return getattr(torch, said) if isinstance(said, str) else said


def choose_device(name: str) -> torch.device:
    """As asked, or CUDA where there is one."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"unknown device {name!r}: auto, cpu, cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"there is no device {name}: torch sees no CUDA here")
    return torch.device(name)


def shaped_config(config: Any, shape: CandidateShape) -> Any:
    """The target's config in another shape; ValueError where heads and width do not divide."""
    target = config.get_text_config()
    size = head_size(target)
    heads = shape.heads or shape.width // size
    if heads < 1 or shape.width % heads or (not shape.heads and shape.width % size):
        raise ValueError(
            f"the width of {shape} does not divide into "
            + (f"{heads} heads" if shape.heads else f"heads of {size}, the target's: LAYERSxWIDTHxHEADS names others")
        )
    if (shape.width // heads) % 2:
        raise ValueError(f"{shape} has heads of {shape.width // heads}: rotary positions need an even size")
    made = picked_config(config, [i % target.num_hidden_layers for i in range(shape.layers)])
    text = made.get_text_config()
    shared = max(1, target.num_attention_heads // _key_heads(target))
    if heads % shared:
        shared = max(divisor for divisor in range(1, shared + 1) if heads % divisor == 0)
    text.hidden_size, text.num_attention_heads = shape.width, heads
    if getattr(target, "num_key_value_heads", None):
        text.num_key_value_heads = heads // shared
    if getattr(target, "head_dim", None):
        text.head_dim = shape.width // heads if shape.heads else size
    for name in ("intermediate_size", "ffn_dim", "n_inner"):
        if isinstance(getattr(target, name, None), int):
            setattr(text, name, max(8, round(getattr(target, name) * shape.width / target.hidden_size / 8) * 8))
    if hasattr(target, "word_embed_proj_dim"):
        text.word_embed_proj_dim = shape.width
    return made


def head_size(text: Any) -> int:
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def _key_heads(text: Any) -> int:
    """Families that share keys declare so; in others a number that stands in the config all the same means nothing."""
    own = hasattr(type(text), "num_key_value_heads")
    return int((own and text.num_key_value_heads) or text.num_attention_heads)


def default_shapes(config: Any) -> list[CandidateShape]:
    """The target's own width with few layers, and narrower ones; always shallower than the target."""
    text = config.get_text_config()
    size = head_size(text)
    half = text.num_attention_heads // 2 * size
    # Where heads of the target's size do not fill its width, the config's own number of heads is kept.
    square = size * text.num_attention_heads == text.hidden_size
    depths = [depth for depth in DEPTHS if depth < text.num_hidden_layers] or [1]
    shapes = [CandidateShape(depth, text.hidden_size, 0 if square else text.num_attention_heads) for depth in depths]
    if square and half >= size:
        shapes += [CandidateShape(depth, half) for depth in (2, 4) if depth < text.num_hidden_layers]
    return shapes


def random_model(config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A model with weights at random, ready to decode: what it says is of no interest, what it takes is."""
    from transformers import AutoModelForCausalLM

    from draftsmith.infer.models.prepack import can_prepack, prepack

    config = copy.deepcopy(config)
    config.dtype = dtype
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), device:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).eval()
    if can_prepack(model):
        prepack(model)
    return model


def size_of(config: Any, dtype: torch.dtype) -> Size:
    """Counted on a model without memory."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    text = config.get_text_config()
    layers = list(model.get_submodule(stack_path(model)).parameters())
    head = model.get_output_embeddings()
    key_width = _key_heads(text) * head_size(text)
    return Size(
        layers=int(text.num_hidden_layers),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layer_bytes=sum(parameter.nbytes for parameter in layers),
        head_bytes=0 if head is None else head.weight.nbytes,
        read_bytes=weight_bytes(model),
        total_bytes=sum(parameter.nbytes for parameter in model.parameters()),
        token_bytes=2 * int(text.num_hidden_layers) * key_width * dtype.itemsize,
        multiplied=sum(p.numel() for p in layers) + (0 if head is None else head.weight.numel()),
    )


def parse_shapes(words: Sequence[str], config: Any) -> list[CandidateShape]:
    """The shapes asked for, or the default ones; each is checked against the family."""
    shapes = [CandidateShape.parse(word) for word in words] if words else default_shapes(config)
    for shape in shapes:
        shaped_config(config, shape)
    return list(dict.fromkeys(shapes))
