"""Medusa and Hydra heads for tiny targets: planted ones are always right, fitted ones are right often. Not tests.

Legend: T positions, H width, V vocabulary, K heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from tiny_models import tiny_model
from transformers import LlamaConfig

from draftsmith.infer.heads.hydra import HydraHeads
from draftsmith.infer.heads.medusa import MedusaHeads
from draftsmith.infer.models.runner.taps import Taps

PLANTED_VOCAB, PLANTED_STEP = 24, 7
# Logits apart enough for a confidence near 1.
SURE = 20


def follower(token: int, places: int = 1) -> int:
    """The token that a planted target has `places` places after `token`."""
    return (token + PLANTED_STEP * places) % PLANTED_VOCAB


@torch.no_grad()
def planted_target() -> Any:
    """A target whose every token is a function of the one before: its state is that token's own direction."""
    model = tiny_model("llama", vocab_size=PLANTED_VOCAB)
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    table = torch.eye(PLANTED_VOCAB, model.config.hidden_size, dtype=torch.float64)
    model.model.embed_tokens.weight.copy_(table)
    model.lm_head.weight.copy_(following(1))
    return model


def following(places: int, width: int = 32) -> torch.Tensor:
    """[V, H] an output matrix that turns a token's direction into the token `places` after it."""
    weight_VH = torch.zeros(PLANTED_VOCAB, width, dtype=torch.float64)
    for token in range(PLANTED_VOCAB):
        weight_VH[follower(token, places), token] = 1.0
    return weight_VH


@torch.no_grad()
def planted_medusa(heads: int = 4) -> MedusaHeads:
    made = MedusaHeads(32, PLANTED_VOCAB, heads).double()
    for number, head in enumerate(made.heads):
        head.lm_head.weight.copy_(SURE * following(number + 2))
    return made


@torch.no_grad()
def planted_hydra(heads: int = 4, reads: str = "path", prefix: bool = False) -> HydraHeads:
    """`reads`: the state, or the last token of the path, or the newest token of the row. `prefix`: with a layer that
    adds little to the states."""
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
                         num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.1)  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        made = HydraHeads(32, PLANTED_VOCAB, heads, prefix_config=config if prefix else None).double().eval()
    for number, head in enumerate(made.heads):
        block, places = head.blocks[0], {"state": number + 2, "path": 1, "newest": number + 1}[reads]
        start = 32 * {"state": 0, "path": number + 1, "newest": 1}[reads]
        for parameter in (block.linear.weight, block.linear.bias, block.res_connection.weight, head.lm_head.bias):
            parameter.zero_()
        assert isinstance(block.res_connection, torch.nn.Linear)
        block.res_connection.bias.zero_()
        block.res_connection.weight[:, start : start + 32] = torch.eye(32, dtype=torch.float64)
        head.lm_head.weight.copy_(SURE * following(places))
    return made


def random_heads(kind: str, vocab: int, heads: int = 3, seed: int = 3) -> Any:
    """Heads that know nothing, and are sure of it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made: Any = (MedusaHeads if kind == "medusa" else HydraHeads)(32, vocab, heads).double()
        for head in made.heads:
            torch.nn.init.normal_(head.lm_head.weight, std=0.3)
    return made.requires_grad_(False)


def fitted(kind: str, model: Any, texts: Sequence[Sequence[int]], heads: int = 3, steps: int = 30) -> Any:
    """Heads overfitted to a target's own texts: right often, and wrong often."""
    vocab, width = model.config.vocab_size, model.config.hidden_size
    table = model.get_input_embeddings().weight.detach()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        made: Any = (MedusaHeads if kind == "medusa" else HydraHeads)(width, vocab, heads).to(table)
    states_NH, ids_NT = _places(model, texts, heads)
    embedded_NTH = model.get_input_embeddings()(ids_NT).detach()
    optimiser = torch.optim.Adam(made.parameters(), lr=0.02)
    for _ in range(steps):
        if kind == "medusa":
            logits = list(made(states_NH).unbind(1))
        else:
            embedded = embedded_NTH.unbind(1)
            logits = [made.logits(i, states_NH, embedded[: i + 1]) for i in range(heads)]
        losses = [torch.nn.functional.cross_entropy(one, ids_NT[:, i + 1]) for i, one in enumerate(logits)]
        optimiser.zero_grad()
        torch.stack(losses).sum().backward()
        optimiser.step()
    return made.eval().requires_grad_(False)


def _places(model: Any, texts: Sequence[Sequence[int]], heads: int) -> tuple[torch.Tensor, torch.Tensor]:
    """[N, H] the target's last states, and [N, K + 1] the tokens that follow each."""
    states, ids, taps = [], [], Taps(model)
    for text in texts:
        with torch.no_grad(), taps.taking(["last"]) as taken:
            model(torch.tensor([text], device=model.device), use_cache=False)
        last = len(text) - heads - 1
        states.append(taken["last"][0, :last])
        ids.append(torch.tensor([text[at + 1 : at + heads + 2] for at in range(last)]))
    return torch.cat(states), torch.cat(ids).to(model.device)
