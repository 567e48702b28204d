"""What is modelled is counted from the config: matrices, head, grouped heads, experts; and marked as modelled."""

from __future__ import annotations

import pytest
import torch
from tiny_folders import tiny_llama

from draftsmith.infer.costs.calibration import checked_costs
from draftsmith.infer.costs.pass_costs import Costs
from draftsmith.infer.costs.roofline import load_machine
from draftsmith.infer.files.atomic import write_json
from draftsmith.infer.measure.plan.modelled import draft_ratio, modelled_costs
from draftsmith.infer.measure.plan.this_machine import MATRICES, TOKENS, this_machine
from draftsmith.infer.measure.plan.work import work_of
from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.retrieval import PromptLookup


def test_a_llama_s_work_is_its_linear_layers_and_its_head():
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    work = work_of(config, torch.float32)
    assert work.matrices == {32 * 32: 6, 32 * 16: 6, 32 * 48: 9, 32 * 100: 1}
    assert work.token_bytes == 2 * 3 * 16 * 4
    assert work.pair_flops == 4 * 3 * 32
    assert not work.experts


@pytest.mark.parametrize("kind", ["mixtral", "qwen3_moe"])
def test_experts_are_counted_apart(kind):
    from transformers import AutoConfig

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "vocab_size": 100, "moe_intermediate_size": 48, "head_dim": 8}
    counts = {"num_local_experts": 8} if kind == "mixtral" else {"num_experts": 8}
    config = AutoConfig.for_model(kind, **sizes, **more, **counts, num_experts_per_tok=2)
    work = work_of(config, torch.bfloat16)
    assert (work.experts, work.active) == (8, 2)
    assert sum(weights * count for weights, count in work.expert_matrices.items()) == 3 * 3 * 32 * 48
    assert (
        sum(weights * count for weights, count in work.matrices.items())
        == 3 * (2 * 32 * 32 + 2 * 32 * 16 + 8 * 32) + 3200
    )


def test_modelled_costs_survive_a_file_and_size_no_drafts(tmp_path):
    model = tiny_llama(num_hidden_layers=2)
    costs = modelled_costs(model.config, torch.float32, load_machine("a100"), name="tiny")
    path = tmp_path / "costs.json"
    write_json(path, costs.to_json())
    again = Costs.load(path)
    assert "modelled on an A100" in again.describe()
    with pytest.raises(ValueError, match="modelled costs, and drafts are sized by measured ones"):
        checked_costs(again, HFTarget(model), "costs.json")


def test_a_target_that_does_not_fit_is_refused():
    from transformers import LlamaConfig

    config = LlamaConfig(hidden_size=8192, intermediate_size=28672, num_hidden_layers=80, num_attention_heads=64)
    with pytest.raises(ValueError, match=r"NVIDIA GeForce RTX 4090 has 22\.4 GiB"):
        modelled_costs(config, torch.bfloat16, load_machine("rtx4090"), name="llama-70b")


def test_this_cpu_is_measured_and_a_drafter_without_a_model_is_not_scaled():
    config = tiny_llama(num_hidden_layers=2).config
    found = this_machine(config, torch.float32, group_bytes=1)
    assert set(found.products) == {a * b for a, b in MATRICES}
    assert all(set(curve) == set(TOKENS) and min(curve.values()) > 0 for curve in found.products.values())
    assert found.layer_s > 0
    costs = modelled_costs(config, torch.float32, found, name="tiny")
    assert costs.describe().endswith("(modelled on this CPU)")
    assert costs.of("target")(1) > 2 * found.layer_s
    assert draft_ratio(PromptLookup(), torch.float32, found) == 1
