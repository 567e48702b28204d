"""MTP heads of tiny checkpoints of each family, beside the same layer in transformers' own model."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from draftsmith.infer.heads.mtp_folder import LAYOUTS, load_mtp
from draftsmith.infer.models.runner.entries import Entries
from draftsmith.infer.models.runner.masks import MaskPlan
from draftsmith.infer.models.runner.model_runner import ModelRunner

VOCAB, WIDTH, LAYERS, PAIRS = 61, 32, 3, 6
COMMON = {
    "vocab_size": VOCAB, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "initializer_range": 0.15, "moe_intermediate_size": 16, "num_experts": 4,
    "num_experts_per_tok": 2, "shared_expert_intermediate_size": 16, "n_routed_experts": 4, "n_group": 1,
    "topk_group": 1, "n_shared_experts": 1, "kv_lora_rank": 8, "q_lora_rank": 16, "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1,
}  # fmt: skip
HYBRID = ["linear_attention", "full_attention", "full_attention"]
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_next": {"head_dim": 8, "num_key_value_heads": 2, "layer_types": HYBRID},
    "qwen3_5_text": {"head_dim": 8, "num_key_value_heads": 2, "layer_types": HYBRID},
    "qwen3_5_moe_text": {"head_dim": 8, "num_key_value_heads": 2, "layer_types": HYBRID},
    "deepseek_v3": {"num_key_value_heads": 4},
    "glm4_moe": {"head_dim": 8, "num_key_value_heads": 2},
    "glm4_moe_lite": {"num_key_value_heads": 4},
}
NAMES = {
    True: ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "fc", "norm"),
    False: ("enorm", "hnorm", "eh_proj", "shared_head.norm"),
}


@dataclass
class Checkpoint:
    folder: Path
    model: Any
    prefix: str
    layer: str
    parts: dict[str, torch.Tensor]

    def change(self, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
        tensors = load_file(self.folder / "model.safetensors")
        change(tensors)
        save_file(tensors, self.folder / "model.safetensors", metadata={"format": "pt"})
        return self.folder


def checkpoint(folder: Path, kind: str) -> Checkpoint:
    """A target of this family, with its last layer a second time as its MTP head's."""
    config = CONFIG_MAPPING[kind](**COMMON, **FAMILIES[kind])
    torch.manual_seed(0)
    # Grouped matrix products of experts know no float64.
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").double().eval()
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    qwen = kind.startswith("qwen")
    prefix = "mtp." if qwen else f"model.layers.{LAYERS}."
    layer = prefix + ("layers.0." if qwen else "")
    last = f"model.layers.{LAYERS - 1}."
    extra = {name.replace(last, layer): one.clone() for name, one in tensors.items() if name.startswith(last)}
    parts = {}
    for name in NAMES[qwen]:
        shape = (WIDTH, 2 * WIDTH) if name in ("fc", "eh_proj") else (WIDTH,)
        parts[name] = extra[f"{prefix}{name}.weight"] = torch.rand(shape, dtype=torch.float64) * 0.3
    if not qwen:  # copies of what the target lends
        extra[f"{prefix}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
        extra[f"{prefix}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    save_file(tensors | extra, folder / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint(folder, model, prefix, layer, parts)


def pairs() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    tokens = torch.randint(VOCAB, (PAIRS,), generator=generator)
    return tokens, torch.randn((PAIRS, WIDTH), generator=generator, dtype=torch.float64)


def causal() -> torch.Tensor:
    return torch.full((PAIRS, PAIRS), -1e30, dtype=torch.float64).triu(1)[None, None]


@torch.no_grad()
def expected(made: Checkpoint) -> torch.Tensor:
    """The head's logits, from the target's own layer, norm class, rotation and output head."""
    model, (tokens, states) = made.model, pairs()
    names = list(made.parts)

    def normed(given: torch.Tensor, name: str) -> torch.Tensor:
        norm = type(model.model.norm)(WIDTH, eps=model.config.rms_norm_eps).double()
        norm.weight.data = made.parts[name]
        out: torch.Tensor = norm(given)
        return out

    embedded = model.get_input_embeddings()(tokens)[None].clone()
    if names[0] == "enorm":
        embedded[:, 0] = 0
    joined = torch.cat([normed(embedded, names[0]), normed(states[None], names[1])], -1) @ made.parts[names[2]].T
    places = torch.arange(PAIRS)[None]
    model.config._attn_implementation = "eager"
    out = model.model.layers[-1](
        joined,
        position_embeddings=model.model.rotary_emb(joined, places),
        attention_mask=causal(),
        position_ids=places,
    )
    logits: torch.Tensor = model.lm_head(normed(out[0] if isinstance(out, tuple) else out, names[3]))[0]
    return logits


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_head_is_the_targets_own_layer_over_pairs(tmp_path, kind):
    made = checkpoint(tmp_path, kind)
    head = load_mtp(tmp_path, made.model.config)
    head.lend(made.model.get_input_embeddings(), made.model.get_output_embeddings())
    tokens, states = pairs()
    given = head.pairs(tokens, head.joined({"last": states}))
    want = expected(made)
    with torch.no_grad():
        whole = head(inputs_embeds=given[None], position_ids=torch.arange(PAIRS)[None], attention_mask=causal()).logits[
            0
        ]
    # Norms and rotations are in float32, whatever the weights are in.
    assert (whole - want).abs().max() < 1e-5 * want.std()
    runner, row, stepped = ModelRunner(head, MaskPlan()), object(), []
    runner.open(row)
    for i in range(PAIRS):
        stepped.append(runner.forward([row], [Entries([int(tokens[i])], [-1], given[i : i + 1])]).logits_NV)
        runner.commit([row], [[0]])
    assert (torch.cat(stepped) - want).abs().max() < 1e-5 * want.std()


def test_swapped_halves_would_be_seen(tmp_path):
    made = checkpoint(tmp_path, "qwen3_5_text")
    head = load_mtp(tmp_path)
    head.lend(made.model.get_input_embeddings(), made.model.get_output_embeddings())
    tokens, states = pairs()
    given = head.pairs(tokens, states).flip(-1).view(PAIRS, 2, WIDTH).flip(-1).reshape(PAIRS, 2 * WIDTH)
    with torch.no_grad():
        swapped = head(
            inputs_embeds=given[None], position_ids=torch.arange(PAIRS)[None], attention_mask=causal()
        ).logits[0]
    want = expected(made)
    assert (swapped - want).abs().max() > 0.1 * want.std()


def test_every_family_has_a_test():
    assert set(FAMILIES) == set(LAYOUTS)


def test_a_checkpoint_without_a_head_says_so(tmp_path):
    made = checkpoint(tmp_path, "qwen3_5_text")
    made.model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"brings no MTP head: it has no tensors mtp.\*"):
        load_mtp(tmp_path)


def test_families_whose_heads_are_not_built_are_refused_by_name(tmp_path, folders):
    with pytest.raises(ValueError, match="brings no MTP head"):
        load_mtp(folders.target)
    made = checkpoint(tmp_path, "glm4_moe")
    made.model.config.model_type = "mimo"
    with pytest.raises(
        ValueError, match="brings an MTP head, but those of mimo are not built here; built are those of"
    ):
        load_mtp(tmp_path, made.model.config)


def test_quantised_heads_are_refused(tmp_path):
    made = checkpoint(tmp_path, "qwen3_5_text")
    made.change(lambda held: held.update({f"{made.layer}mlp.up_proj.weight_scale_inv": torch.ones(1)}))
    with pytest.raises(ValueError, match=r"a quantised MTP head \(layers.0.mlp.up_proj.weight_scale_inv\)"):
        load_mtp(tmp_path)


@pytest.mark.parametrize(("kind", "second"), [("qwen3_5_text", "mtp.layers.1."), ("glm4_moe", "model.layers.4.")])
def test_heads_of_several_layers_are_refused(tmp_path, kind, second):
    made = checkpoint(tmp_path, kind)
    made.change(lambda held: held.update({f"{second}input_layernorm.weight": torch.ones(WIDTH)}))
    with pytest.raises(ValueError, match="brings several MTP layers"):
        load_mtp(tmp_path)


@pytest.mark.parametrize("part", ["mlp.experts.1.up_proj.weight", "input_layernorm.weight"])
def test_a_missing_tensor_is_named(tmp_path, part):
    made = checkpoint(tmp_path, "deepseek_v3")
    made.change(lambda held: held.pop(made.layer + part))
    with pytest.raises(ValueError, match=r"lacks .*(1.up_proj|input_layernorm).weight"):
        load_mtp(tmp_path)
