"""Draft shapes in a target's family: their configs, sizes, random models, and the estimated costs of unmeasured ones.

A shape's config is the target's own with another depth and width: heads of the target's size, the same ratio of
key/value heads, the intermediate size in proportion.

Costs of an unmeasured shape are fitted to those of measured shapes. At each number of tokens a pass takes `fixed +
per_layer * layers + per_byte * layer bytes + per_head_byte * head bytes`; what the context adds grows with the layers
and the bytes of a cached token. Coefficients are not negative.

Legend: M shapes, N features of a shape.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from draftsmith.infer.costs.pass_costs import PassCost
from draftsmith.infer.costs.timing import non_negative_fit
from draftsmith.infer.files.errors import first_line
from draftsmith.infer.files.locations import may_be_on_hub
from draftsmith.infer.models.architectures import refusal, state_refusal
from draftsmith.infer.models.layers import head_size, picked_config, stack_path, weight_bytes
from draftsmith.infer.models.load import DTYPES

if TYPE_CHECKING:
    from draftsmith.infer.measure.plan.head_shapes import CandidateHead

DEPTHS = (1, 2, 3, 5)
# Measured shapes needed to estimate the costs of another.
MIN_SHAPES = 3


@dataclass(frozen=True, slots=True)
class CandidateShape:
    """`heads` 0: as many heads as the target's head size gives."""

    layers: int
    width: int
    heads: int = 0

    @classmethod
    def parse(cls, text: str) -> CandidateShape:
        """LAYERSxWIDTH or LAYERSxWIDTHxHEADS."""
        if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(x[1-9]\d*)?", text):
            raise ValueError(f"{text!r} is no shape: write LAYERSxWIDTH, such as 2x512, or LAYERSxWIDTHxHEADS")
        return cls(*map(int, text.split("x")))

    def __str__(self) -> str:
        return "x".join(map(str, (self.layers, self.width, self.heads) if self.heads else (self.layers, self.width)))


@dataclass(frozen=True, slots=True)
class SurveyRequest:
    """The grid to measure; costs of the shapes in `estimated` are fitted to those of `shapes`. `heads` are timed beside
    the shapes."""

    batch_sizes: Sequence[int]
    contexts: Sequence[int]
    nodes: Sequence[int]
    shapes: Sequence[CandidateShape]
    estimated: Sequence[CandidateShape] = ()
    heads: Sequence[CandidateHead] = ()

    @property
    def timed(self) -> list[str]:
        """The names of the shapes and heads that are timed."""
        return [str(one) for one in (*self.shapes, *self.heads)]


@dataclass(frozen=True, slots=True)
class Size:
    """What a model is made of. `read_bytes`: weights read by one pass; `token_bytes`: a token's cache; `multiplied`:
    weights that each token is multiplied with, those of the layers and the head; `packed_bytes`: the copies of
    the weights that decoding makes (products/replace.py)."""

    layers: int
    parameters: int
    layer_bytes: int
    head_bytes: int
    read_bytes: int
    total_bytes: int
    token_bytes: int
    multiplied: int
    packed_bytes: int = 0

    @property
    def held_bytes(self) -> int:
        """All that a model ready for decoding holds, without its cache."""
        return self.total_bytes + self.packed_bytes

    @property
    def training_bytes(self) -> int:
        """float32 weights, gradients and Adam's two moments, without activations."""
        return 16 * self.parameters

    def to_json(self) -> dict[str, int]:
        return asdict(self) | {"training_bytes": self.training_bytes}


def load_config(name: str) -> Any:
    """The config of a folder, a Hub name or a config.json; no weights are read."""
    from transformers import AutoConfig

    path = Path(name)
    if not path.exists() and not may_be_on_hub(name):
        raise ValueError(f"{name} does not exist, and is not a Hub name (owner/model)")
    if path.is_dir() and not (path / "config.json").is_file():
        raise ValueError(f"{name} is not a model folder: it has no config.json")
    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, KeyError, ValueError) as problem:
        raise ValueError(f"the config of {name} could not be read: {first_line(problem)}") from problem
    reason = refusal(config) or state_refusal(config)
    if reason:
        raise ValueError(f"{name}: {reason}")
    return config


def choose_dtype(config: Any, name: str) -> torch.dtype:
    """The dtype to decode in; auto is the config's."""
    if name != "auto" and name not in DTYPES:
        raise ValueError(f"unknown dtype {name!r}: auto, {', '.join(DTYPES)}")
    dtype = DTYPES[name] if name != "auto" else config.dtype or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def shaped_config(config: Any, shape: CandidateShape) -> Any:
    """The target's config in another shape; a ValueError if the width does not divide into heads."""
    target = config.get_text_config()
    size = head_size(target)
    heads = shape.heads or shape.width // size
    if heads < 1 or shape.width % heads or (not shape.heads and shape.width % size):
        raise ValueError(
            f"the width of {shape} does not divide into "
            + (
                f"{heads} heads"
                if shape.heads
                else f"heads of {size}, as in the target: choose others with LAYERSxWIDTHxHEADS"
            )
        )
    if (shape.width // heads) % 2:
        raise ValueError(f"{shape} has heads of {shape.width // heads}: rotary positions need an even size")
    made = picked_config(config, [i % target.num_hidden_layers for i in range(shape.layers)])
    text = made.get_text_config()
    shared = max(1, target.num_attention_heads // key_heads(target))
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


def key_heads(text: Any) -> int:
    """Key/value heads; a num_key_value_heads counts only in families that declare it on the config class."""
    own = hasattr(type(text), "num_key_value_heads")
    return int((own and text.num_key_value_heads) or text.num_attention_heads)


def default_shapes(config: Any) -> list[CandidateShape]:
    """The target's width and half of it, with fewer layers than the target."""
    text = config.get_text_config()
    size = head_size(text)
    half = text.num_attention_heads // 2 * size
    # If heads of the target's size do not fill its width, keep the config's number of heads.
    square = size * text.num_attention_heads == text.hidden_size
    depths = [depth for depth in DEPTHS if depth < text.num_hidden_layers] or [1]
    shapes = [CandidateShape(depth, text.hidden_size, 0 if square else text.num_attention_heads) for depth in depths]
    if square and half >= size:
        shapes += [CandidateShape(depth, half) for depth in (2, 4) if depth < text.num_hidden_layers]
    return shapes


def random_model(config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """A model with random weights, for timing."""
    from transformers import AutoModelForCausalLM

    from draftsmith.infer.models.products.replace import replace_products

    config = copy.deepcopy(config)
    config.dtype = dtype
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), device:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).to(device).eval()
    replace_products(model)
    return model


def size_of(config: Any, dtype: torch.dtype, device: torch.device) -> Size:
    """Of the model that `random_model` makes, counted on one on the meta device."""
    from transformers import AutoModelForCausalLM

    from draftsmith.infer.models.products.replace import added_bytes

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    text = config.get_text_config()
    layers = list(model.get_submodule(stack_path(model)).parameters())
    head = model.get_output_embeddings()
    key_width = key_heads(text) * head_size(text)
    return Size(
        layers=int(text.num_hidden_layers),
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        layer_bytes=sum(parameter.nbytes for parameter in layers),
        head_bytes=0 if head is None else head.weight.nbytes,
        read_bytes=weight_bytes(model),
        total_bytes=sum(parameter.nbytes for parameter in model.parameters()),
        token_bytes=2 * int(text.num_hidden_layers) * key_width * dtype.itemsize,
        multiplied=sum(p.numel() for p in layers) + (0 if head is None else head.weight.numel()),
        packed_bytes=added_bytes(model) if device.type == "cpu" else 0,
    )


def parse_shapes(words: Sequence[str], config: Any) -> list[CandidateShape]:
    """The shapes in `words`, or the default ones; each is checked against the target's config."""
    shapes = [CandidateShape.parse(word) for word in words] if words else default_shapes(config)
    for shape in shapes:
        shaped_config(config, shape)
    return list(dict.fromkeys(shapes))


def estimate_cost(measured: Sequence[tuple[Size, PassCost]], wanted: Size) -> PassCost:
    """The costs of a shape of size `wanted` from MIN_SHAPES or more, measured at the same numbers of tokens."""
    check_enough(len(measured))
    tokens = list(measured[0][1].tokens)
    assert all(list(cost.tokens) == tokens for _, cost in measured), "shapes were measured at different passes"
    sizes = [size for size, _ in measured]
    seconds = [
        _at([cost.seconds[i] for _, cost in measured], [_weights(size) for size in sizes], _weights(wanted))
        for i in range(len(tokens))
    ]
    seen = [_context(size) for size in sizes]
    return PassCost(
        tokens,
        np.maximum.accumulate(seconds).tolist(),
        _at([cost.per_seen for _, cost in measured], seen, _context(wanted), relative=False),
        _at([cost.per_pair for _, cost in measured], seen, _context(wanted), relative=False),
        measured[0][1].buckets,
        _at([cost.per_row for _, cost in measured], [[size.layers] for size in sizes], [wanted.layers], relative=False),
    )


def check_enough(shapes: int) -> None:
    if shapes < MIN_SHAPES:
        raise ValueError(f"costs are estimated from {MIN_SHAPES} measured shapes or more, and there are {shapes}")


def leave_one_out(measured: Sequence[tuple[Size, PassCost]], rows: int, context: int) -> list[float]:
    """Relative errors of one-token passes, each shape estimated from the others.

    Shapes are skipped if the others alone could not separate the costs of layers, widths and heads.
    """
    design_MN = np.array([_weights(size) for size, _ in measured])
    design_MN /= design_MN.max(0, initial=1e-300)
    errors = []
    for i, (size, cost) in enumerate(measured):
        others = [*measured[:i], *measured[i + 1 :]]
        if len(others) < MIN_SHAPES or _rank(np.delete(design_MN, i, 0)) < _rank(design_MN):
            continue
        errors.append(estimate_cost(others, size).even(rows, 1, context) / cost.even(rows, 1, context) - 1)
    return errors


def _rank(design_MN: np.ndarray) -> int:
    return int(np.linalg.matrix_rank(design_MN, tol=1e-6))


def _weights(size: Size) -> list[float]:
    return [1.0, size.layers, size.layer_bytes, size.head_bytes]


def _context(size: Size) -> list[float]:
    return [size.layers, size.token_bytes]


def _at(
    values: Sequence[float], features: Sequence[Sequence[float]], wanted: Sequence[float], relative: bool = True
) -> float:
    values_M = np.array(values)
    # Costs of context and rows are fitted absolutely: noise may make one 0, and errors relative to 0 are undefined.
    weight_M = 1.0 / values_M if relative else np.ones(len(values))
    found_N = non_negative_fit(np.array(features) * weight_M[:, None], values_M * weight_M)
    return float(found_N @ np.array(wanted))
