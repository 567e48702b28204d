"""A pass through a Llama-like model on a CPU without what transformers puts between its products.

Of a pass over one token of a small model, a fifth to a quarter is spent there: in modules that call modules, in masks
that are not used and in outputs that record themselves (LOG.md has figures). Here the same operations run in the same
order on the same weights, so every number is, bit for bit, what transformers' layers give;
tests/infer/models/runner/test_plain_stack.py holds it to that. Which models: LLAMA_LIKE, as transformers made them, on
a CPU. Every other model runs as it is, and so does one of these with a hook, an adapter, a quantised or a split layer.

Legend: N tokens of a pass, D hidden, H query heads, G key/value heads, E head size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from draftsmith.infer.models.layers import LLAMA_LIKE, Inlet
from draftsmith.infer.models.runner.arena import Arena
from draftsmith.infer.models.runner.attention import Reads, Shaping
from draftsmith.infer.models.runner.pass_inputs import PassInputs

OWN = (nn.Linear, nn.Embedding, nn.Identity, nn.ModuleList, Inlet)
ACTIVATIONS = ("transformers.activations", nn.SiLU.__module__)


def plain_stack(model: Any, base: Any = None) -> PlainStack | None:
    """The stack of `model`, or of `base`, which holds some of its layers; None if it has to run as it is."""
    if type(model).__name__ not in LLAMA_LIKE or type(model).__module__.partition(".")[0] != "transformers":
        return None
    base = model.model if base is None else base
    modules = [model, *base.modules(), model.lm_head]
    if not all(_as_made(module, type(model).__module__) for module in modules):
        return None
    return PlainStack(base, model.lm_head, modules)


def unhooked(stack: PlainStack | None) -> PlainStack | None:
    """None where somebody has hooked in since: then the model has to run as it is."""
    return None if stack is None or any(stack.hooks) else stack


def _as_made(module: nn.Module, home: str) -> bool:
    """Whether this module of a model from `home` does what its class says and no more, on a CPU."""
    if type(module) not in OWN and (type(module).__module__ not in (home, *ACTIVATIONS) or module.training):
        return False
    if hasattr(module, "_hf_hook"):
        return False
    if "forward" in module.__dict__ and type(module) is not nn.Linear:  # linear layers may have our products
        return False
    return all(type(one) is nn.Parameter and one.device.type == "cpu" for one in module.parameters(recurse=False))


class PlainStack:
    """Embedding, layers, final norm and head of a model, or of one of its blocks of layers."""

    def __init__(self, base: Any, head: nn.Linear, modules: Sequence[nn.Module]) -> None:
        self.hooks = [hooks for one in modules for hooks in (one._forward_hooks, one._forward_pre_hooks)]
        self.embedding = base.embed_tokens
        self.rotary = base.rotary_emb
        self.inlet = base.layers[0] if isinstance(base.layers[0], Inlet) else None
        kinds = getattr(base.config, "layer_types", None)
        self.layers = [PlainLayer(layer, kinds[i] if kinds else "") for i, layer in enumerate(base.layers)]
        self.norm = PlainNorm(base.norm) if not isinstance(base.norm, nn.Identity) else None
        self.head = head

    def logits(
        self, inputs: PassInputs, cache: Arena, taps: Sequence[str], any_kept: bool
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The logits of a pass at the places that were asked for, and the states asked for by name (taps.py)."""
        states_ND, taken = self.states(inputs, cache, taps)
        if not any_kept:
            return states_ND.new_empty((0, self.head.out_features)), taken
        if inputs.keep_K is not None:
            states_ND = states_ND[inputs.keep_K]
        return self.head.forward(states_ND), taken

    def states(
        self, inputs: PassInputs, cache: Arena, taps: Sequence[str] = ()
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """[N, D] the states after the last layer and its norm."""
        asked, marks, reads = inputs.arguments, inputs.arguments["attention_mask"], inputs.reads
        assert reads is not None, "a plain stack does not attend as the layers do"
        states_ND = self._first(asked)
        taken = {}
        cos_1NE, sin_1NE = self.rotary(states_ND[None], asked["position_ids"])
        half = sin_1NE.shape[-1] // 2
        turned_1NE = torch.cat((-sin_1NE[..., :half], sin_1NE[..., half:]), -1)
        turns = cos_1NE[0][:, None], turned_1NE[0][:, None]
        for number, layer in enumerate(self.layers):
            if taps and (name := f"layer:{number}") in taps:
                taken[name] = states_ND
            mark = marks[layer.kind] if isinstance(marks, Mapping) else marks
            states_ND = layer(states_ND, turns, cache, reads, mark)
        if taps and (name := f"layer:{len(self.layers)}") in taps:
            taken[name] = states_ND
        if self.norm is not None:
            states_ND = self.norm(states_ND)
        if "last" in taps:
            taken["last"] = states_ND
        return states_ND, taken

    def _first(self, asked: Mapping[str, Any]) -> torch.Tensor:
        """[N, D] what goes into the first layer."""
        if self.inlet is not None:
            assert self.inlet.states is not None
            return self.inlet.states[0]
        if "inputs_embeds" in asked:
            given_ND: torch.Tensor = asked["inputs_embeds"][0]
            return given_ND
        return nn.functional.embedding(asked["input_ids"][0], self.embedding.weight)


class PlainNorm:
    """An RMS norm, in float32 as transformers' are."""

    def __init__(self, norm: Any) -> None:
        self.weight_D = norm.weight
        self.shape = norm.weight.shape
        self.epsilon = norm.variance_epsilon

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        normed = nn.functional.rms_norm(states.float(), self.shape, None, self.epsilon)
        return self.weight_D * normed.to(states.dtype)


class PlainLayer:
    """One layer. `kind`: of its mask, where layers differ in that."""

    def __init__(self, layer: Any, kind: str) -> None:
        layer = layer.layer if isinstance(layer, Inlet) else layer
        attention, mlp = layer.self_attn, layer.mlp
        self.kind = kind
        self.number = attention.layer_idx
        self.size = attention.head_dim
        self.shaping = Shaping(float(attention.scaling))
        self.before, self.between = PlainNorm(layer.input_layernorm), PlainNorm(layer.post_attention_layernorm)
        self.query, self.key, self.value = attention.q_proj, attention.k_proj, attention.v_proj
        self.out = attention.o_proj
        own = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        self.query_norm, self.key_norm = (PlainNorm(norm) if norm is not None else None for norm in own)
        self.gate, self.up, self.down, self.activation = mlp.gate_proj, mlp.up_proj, mlp.down_proj, mlp.act_fn

    def __call__(
        self,
        states_ND: torch.Tensor,
        turns: tuple[torch.Tensor, torch.Tensor],
        cache: Arena,
        reads: Reads,
        mark: torch.Tensor,
    ) -> torch.Tensor:
        count, size = states_ND.shape[0], self.size
        normed_ND = self.before(states_ND)
        query_NHE = self.query.forward(normed_ND).view(count, -1, size)
        key_NGE = self.key.forward(normed_ND).view(count, -1, size)
        value_NGE = self.value.forward(normed_ND).view(count, -1, size)
        if self.query_norm is not None and self.key_norm is not None:
            query_NHE, key_NGE = self.query_norm(query_NHE), self.key_norm(key_NGE)
        heads = query_NHE.shape[1]
        cos_N1E, turned_N1E = turns
        both = torch.cat((query_NHE, key_NGE), 1)
        both = (both * cos_N1E).add_(both.roll(size // 2, -1).mul_(turned_N1E)).transpose(0, 1)[None]
        keys_1GSE, values_1GSE = cache.update(both[:, heads:], value_NGE.transpose(0, 1)[None], self.number)
        seen_1NHE = reads.attend(both[:, :heads], keys_1GSE, values_1GSE, mark, self.shaping)
        states_ND = states_ND + self.out.forward(seen_1NHE.reshape(count, -1))
        normed_ND = self.between(states_ND)
        gated = self.activation.forward(self.gate.forward(normed_ND)).mul_(self.up.forward(normed_ND))
        return states_ND + self.down.forward(gated)
