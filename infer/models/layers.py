"""The parts of a Hugging Face causal LM (stack of layers, final norm, head), and models of some of its layers.

Found from the model itself, not from a list of families: the stack is the ModuleList with one entry per layer of the
config. What follows it is checked by its numbers; a model that does not check is refused.

Legend: T positions, D hidden, V vocabulary.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

# Models of layers like Llama's, which differ in biases, norms of heads and windows only.
LLAMA_LIKE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm")


@dataclass(frozen=True, slots=True)
class ModelParts:
    """`path`: where the stack is. Logits are `softcap * tanh(scale * head(norm(state)) / softcap)`; 0 is no cap."""

    path: str
    layers: nn.ModuleList
    norm: nn.Module
    head: nn.Module
    scale: float = 1.0
    softcap: float = 0.0

    def logits(self, states: torch.Tensor) -> torch.Tensor:
        """[..., D] states after some layer -> [..., V]."""
        return shaped_logits(self.head(self.norm(states)), self.scale, self.softcap)


def shaped_logits(logits: torch.Tensor, scale: float, softcap: float) -> torch.Tensor:
    logits = logits * scale if scale != 1.0 else logits
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def stack_path(model: Any) -> str:
    """The dotted path of the stack of layers."""
    count = model.config.get_text_config().num_hidden_layers
    found = [n for n, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not found:
        raise ValueError(f"{model.config.model_type} has no list of its {count} layers: it cannot be cut into exits")
    return min(found, key=lambda name: name.count("."))


def find_parts(model: Any) -> ModelParts:
    """The parts of `model`; ValueError if it is not layers, then a norm, then a head."""
    path = stack_path(model)
    owner = model.get_submodule(path.rpartition(".")[0])
    norm = next((getattr(owner, name) for name in NORMS if getattr(owner, name, None) is not None), nn.Identity())
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = float(getattr(config, "final_logit_softcapping", None) or 0.0)
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        raise ValueError(f"{model.config.model_type} has no linear output head: it cannot be cut into exits")
    return ModelParts(path, owner.get_submodule(path.rpartition(".")[2]), norm, head, scale, softcap)


@torch.no_grad()
def check_parts(model: Any, parts: ModelParts) -> None:
    """Refuse a model whose norm and head, on the states of its last layer, do not give its logits."""
    kept: list[torch.Tensor] = []
    hook = parts.layers[-1].register_forward_hook(lambda module, given, output: kept.append(state_of(output)))
    training = model.training
    model.eval()
    try:
        device = model.get_output_embeddings().weight.device
        vocab = model.config.get_text_config().vocab_size
        ids_1T = torch.arange(3, 9, device=device)[None] % vocab
        expected = model(input_ids=ids_1T, use_cache=False).logits
    finally:
        hook.remove()
        model.train(training)
    error = (parts.logits(kept[0]) - expected).abs().max() / expected.std()
    if not float(error) < 0.05:
        raise ValueError(
            f"{model.config.model_type} does more than a norm and a head after its last layer (logits differ by "
            f"{float(error):.2g} of their standard deviation): it cannot be cut into exits"
        )


def state_of(output: Any) -> torch.Tensor:
    """The hidden state in what a layer returns."""
    state = output[0] if isinstance(output, tuple) else output
    assert isinstance(state, torch.Tensor)
    return state


def picked_config(config: Any, picked: Sequence[int]) -> Any:
    """A copy of `config` for a model of the layers `picked`; lists with one entry per layer are cut to them too."""
    config = copy.deepcopy(config)
    text = config.get_text_config()
    count = text.num_hidden_layers
    for name, value in list(vars(text).items()):
        if isinstance(value, list) and len(value) == count and not name.startswith("_"):
            setattr(text, name, [value[i] for i in picked])
    text.num_hidden_layers = len(picked)
    if getattr(text, "max_window_layers", None):
        text.max_window_layers = min(text.max_window_layers, len(picked))
    return config


def first_layers(model: Any, count: int) -> Any:
    """`model` cut after `count` layers: a plain model that shares all weights with it."""
    config = picked_config(model.config, range(count))
    if hasattr(config, "sorted_exits"):
        del config.sorted_exits
    view, _ = _with_layers(model, config, list(_stack(model))[:count])
    return view


class Inlet(nn.Module):
    """Wraps the first layer of a block: runs it on `states` instead of the input it is called with."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.states: torch.Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)  # e.g. its attention type

    def forward(self, given: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        assert self.states is not None
        return self.layer(self.states, *args, **kwargs)


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive layers of a model as a base model without the final norm; all weights are shared.

    `inlet` takes the states to start from; None if the block starts at the embeddings.
    """

    model: Any
    inlet: Inlet | None


def inner_block(model: Any, start: int, end: int) -> Block:
    """The layers from `start` up to `end`. The model around them still makes positions, rotations and masks."""
    layers = list(_stack(model))[start:end]
    inlet = None
    if start:
        layers[0] = inlet = Inlet(layers[0])
    view, owner = _with_layers(model, picked_config(model.config, range(start, end)), layers)
    norm = next((name for name in NORMS if owner._modules.get(name) is not None), None)
    if norm is not None:
        owner._modules[norm] = nn.Identity()
    return Block(view.base_model, inlet)


def _stack(model: Any) -> Any:
    return model.get_submodule(stack_path(model))


def _with_layers(model: Any, config: Any, layers: list[nn.Module]) -> tuple[Any, Any]:
    """A shallow copy of `model` with another config and stack of layers, and the module that owns the stack."""
    view = owner = _shallow(model)
    *parents, stack = stack_path(model).split(".")
    for name in parents:
        if hasattr(owner, "config"):
            owner.config = config
        owner._modules[name] = _shallow(owner._modules[name])
        owner = owner._modules[name]
    if hasattr(owner, "config"):
        owner.config = config
    owner._modules[stack] = nn.ModuleList(layers)
    return view, owner


def _shallow(module: Any) -> Any:
    copied = copy.copy(module)
    copied._modules = dict(module._modules)
    return copied


def head_size(text: Any) -> int:
    """The width of an attention head, by the config of a language model."""
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def weight_bytes(model: Any) -> int:
    """Bytes of weights that a pass reads: all, with a head that is lent by another model, except an input embedding
    that is not shared with the head."""
    own = {id(parameter) for parameter in model.parameters()}
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    total = sum(parameter.nbytes for parameter in model.parameters()) - _saved_bytes(model)
    output, table = (getattr(module, "weight", None) for module in (head, embedding))
    if isinstance(output, torch.Tensor) and id(output) not in own:  # of a quantised layer it is a method
        total += output.nbytes
    if head is None or table is None or table is output or id(table) not in own:
        return total
    return total - table.nbytes


def parameter_bytes(modules: Iterable[nn.Module]) -> int:
    """Bytes of these modules' weights."""
    return sum(sum(parameter.nbytes for parameter in module.parameters()) - _saved_bytes(module) for module in modules)


def _saved_bytes(model: nn.Module) -> int:
    """Bytes of `model`'s weights that are not read because other products replace its layers (products/int8.py)."""
    return sum(getattr(layer.__dict__.get("forward"), "saved_bytes", 0) for layer in model.modules())
