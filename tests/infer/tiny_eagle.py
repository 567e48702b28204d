"""EAGLE and MTP heads for tiny targets: planted ones are always right, fitted ones are right often. Not tests.

Legend: B texts, T positions, K unrolled steps, H width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tiny_models import tiny_model
from transformers import LlamaConfig

from draftsmith.infer.heads.eagle import EagleDesign, EagleHead
from draftsmith.infer.heads.mtp import MTPHead, MTPStack
from draftsmith.infer.models.layers import find_parts
from draftsmith.infer.models.runner.taps import Taps

CYCLE, STEP = 24, 7


def cyclic(start: int, count: int) -> list[int]:
    """What the planted target says after `start`."""
    return [(start + STEP * i) % CYCLE for i in range(1, count + 1)]


@torch.no_grad()
def cyclic_target() -> Any:
    """A target whose every token is a function of the one before: its states are that token's direction."""
    model = tiny_model("llama", vocab_size=CYCLE)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    model.model.embed_tokens.weight.copy_(torch.eye(CYCLE, 32, dtype=torch.float64))
    model.lm_head.weight.zero_()
    for token in range(CYCLE):
        model.lm_head.weight[(token + STEP) % CYCLE, token] = 20.0
    return model


def tiny_eagle(
    width: int = 32,
    hidden: int = 32,
    vocab: int = 61,
    version: int = 3,
    features: Sequence[str] = ("layer:0", "layer:1", "layer:2"),
    ids: Sequence[int] | None = None,
    layers: int = 1,
    seed: int = 5,
    **switches: bool,
) -> EagleHead:
    """A random head. Version 1 takes the target's embedding and head."""
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=vocab, max_position_embeddings=512, initializer_range=0.15,
        attn_implementation="sdpa",
    )  # fmt: skip
    design = EagleDesign(version, ("last",) if version == 1 else tuple(features), width, **switches)
    ids_V = None if ids is None else torch.tensor(sorted(ids))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = EagleHead(config, design, ids_V, own_head=version == 3)
    return head.double().eval()


@torch.no_grad()
def planted_eagle() -> EagleHead:
    """A version 1 head that hands the token on: the target's own head does the rest."""
    head = tiny_eagle(vocab=CYCLE, version=1)
    return planted(head)


def tiny_mtp() -> MTPHead:
    """A random MTP head of a llama's layer."""
    import copy

    model = tiny_model("llama", vocab_size=CYCLE, num_hidden_layers=1)
    inner = model.model
    norms = [copy.deepcopy(inner.norm) for _ in range(2)]
    head = MTPHead(model.config, MTPStack(inner.layers[0], inner.norm, inner.rotary_emb), *norms, blank_first=True)
    return head.double().eval()


@torch.no_grad()
def planted(head: Any) -> Any:
    """The head, made to hand its token on."""
    layer = head.model.layers[0]
    layer.self_attn.o_proj.weight.zero_()
    layer.mlp.down_proj.weight.zero_()
    head.fc.weight.copy_(torch.cat([torch.eye(32), torch.zeros(32, 32)], 1))
    return head


def lent(head: Any, model: Any) -> Any:
    """The head, with what it takes from this target."""
    parts = find_parts(model)
    head.lend(model.get_input_embeddings(), parts.head, parts.scale, parts.softcap)
    return head


def states_of(model: Any, names: Sequence[str], ids: Sequence[int]) -> dict[str, torch.Tensor]:
    """[T, W] of one full pass, by name."""
    with torch.no_grad(), Taps(model).taking(names) as taken:
        model(torch.tensor([list(ids)]), use_cache=False)
    return {name: taken[name][0] for name in names}


def fitted_eagle(head: EagleHead, model: Any, texts: Sequence[Sequence[int]], steps: int = 50, unroll: int = 2) -> Any:
    """`head`, overfitted to texts of its target: right often, and wrong often. Training-time test, `unroll` steps."""
    lent(head, model)
    length = min(map(len, texts))
    ids_BT = torch.tensor([list(text[-length:]) for text in texts])
    states = [states_of(model, head.features, ids) for ids in ids_BT.tolist()]
    features = {name: torch.stack([one[name] for one in states]) for name in head.features}
    count = length - 1 - unroll  # pairs whose targets are there at every step
    mask, positions = _unrolled(count, unroll)
    wanted_BK = torch.cat([ids_BT[:, 2 + k : 2 + k + count] for k in range(unroll)], 1)
    known_V = torch.full((model.config.vocab_size,), -100)
    known_V[torch.arange(model.config.vocab_size) if head.ids_V is None else head.ids_V] = torch.arange(
        model.config.vocab_size if head.ids_V is None else len(head.ids_V)
    )
    own = [parameter for parameter in head.parameters() if parameter.requires_grad]
    optimiser = torch.optim.Adam(own, lr=0.02)
    taps = Taps(head)
    for _ in range(steps):
        given = head.joined({name: one[:, :count] for name, one in features.items()})
        pairs = [head.pairs(ids_BT[:, 1 : 1 + count], given)]
        for k in range(1, unroll):
            with torch.no_grad(), taps.taking([head.recurrent]) as taken:
                _run(head, pairs, mask, positions)
            fed_back = taken[head.recurrent][:, -count:]
            pairs.append(head.pairs(ids_BT[:, 1 + k : 1 + k + count], fed_back))
        logits = _run(head, pairs, mask, positions)
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), known_V[wanted_BK].flatten(), ignore_index=-100)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return head.eval().requires_grad_(False)


def _run(head: EagleHead, pairs: Sequence[torch.Tensor], mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    given = torch.cat(list(pairs), 1)
    size = given.shape[1]
    logits: torch.Tensor = head(
        inputs_embeds=given, position_ids=positions[None, :size], attention_mask=mask[:, :, :size, :size]
    ).logits
    return logits


def _unrolled(count: int, unroll: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The mask: a query sees the true pairs up to its index, and its own earlier steps; and the positions."""
    at_N = torch.arange(count).repeat(unroll)
    step_N = torch.arange(unroll).repeat_interleave(count)
    true_NN = (step_N[None] == 0) & (at_N[None] <= at_N[:, None])
    own_NN = (at_N[None] == at_N[:, None]) & (step_N[None] <= step_N[:, None])
    mask = torch.where(true_NN | own_NN, 0.0, float("-inf")).double()
    return mask[None, None], at_N + step_N
