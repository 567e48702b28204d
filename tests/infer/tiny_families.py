"""A tiny random model of any causal LM family of the installed transformers, its plain answers, and a drafter that is
right in parts. Not tests: what tests share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.models.dbrx.configuration_dbrx import DbrxAttentionConfig

from draftsmith.infer.contract.draft import ROOT, Draft
from draftsmith.infer.contract.protocols import Budget
from draftsmith.infer.contract.row import Row
from draftsmith.infer.drafters.controls import ScriptedDrafter
from draftsmith.infer.models.twin import random_model, tiny_config

# What a family's default config leaves open, or what makes it a decoder.
CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [2]},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "dbrx": {"attn_config": DbrxAttentionConfig(rope_theta=1e4, clip_qkv=8)},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 4},
    "reformer": {"axial_pos_embds": False},
    "xmod": {"default_language": "en_XX"},
}
SHARING = {"zamba", "zamba2"}  # whose attention layers share their weights
FLOAT32 = {"xglm"}  # whose own forward pass raises in float64


class HalfRight(ScriptedDrafter):
    """Trees: the plain answer for one to four tokens, often wrong at one depth, a wrong sibling first."""

    def propose(self, rows: Sequence[Row], budgets: Sequence[Budget], policy: Any = None) -> list[Draft]:
        drafts = []
        for row, budget in zip(rows, budgets):
            done, draft, at = len(row.new_ids), Draft(), ROOT
            ahead = self._answers[row.key][done : done + min(1 + done % 4, budget.depth)]
            for depth, token in enumerate(ahead):
                wrong = draft.outright(at, (token + 1 + depth) % 80, self.name)
                if depth + 2 <= budget.depth:
                    draft.outright(wrong, (token + 3) % 80, self.name)
                at = draft.outright(at, (token + 2) % 80 if 7 * done % 5 == depth else token, self.name)
            drafts.append(draft)
        return drafts


def tiny_family(kind: str) -> Any:
    config = CONFIG_MAPPING[kind]()
    family = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    if family.config_class is not type(config) and isinstance(config.get_text_config(), family.config_class):
        config = config.get_text_config()
    if getattr(config, "is_decoder", None) is False:
        config.is_decoder = True
    for name, value in CHANGES.get(kind, {}).items():
        setattr(config, name, value)
    model = random_model(tiny_config(config, each=2 if kind in SHARING else 1), family)
    if kind in FLOAT32:
        return model
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")  # grouped matrix products of experts take no float64
    return model.double()


def plain_answer(model: Any, ids: list[int], new_tokens: int) -> list[int]:
    ids_1T = torch.tensor([ids])
    made_1T = model.generate(ids_1T, attention_mask=torch.ones_like(ids_1T), max_new_tokens=new_tokens, do_sample=False)
    return made_1T[0, len(ids) :].tolist()
