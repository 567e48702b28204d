"""Draft shapes: the published ones to the parameter, any other that the family has, and what cannot be is one line."""

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from draftsmith.train.drafts.init import init_draft
from draftsmith.train.drafts.shapes import PRESETS, find_preset, reshaped


def llama_7b():
    return LlamaConfig(
        hidden_size=4096, intermediate_size=11008, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=32, vocab_size=32000, tie_word_embeddings=False,
    )  # fmt: skip


@pytest.mark.parametrize(("name", "millions"), [("290M", 465), ("543M", 869), ("796M", 1274), ("1.3B", 1345)])
def test_the_published_shapes_have_their_true_sizes(name, millions):
    shape = find_preset(name)
    config = reshaped(llama_7b(), shape.sizes)
    config.num_hidden_layers = shape.num_layers
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert round(sum(weight.numel() for weight in model.parameters()) / 1e6) == millions


def test_the_wide_presets_are_the_published_ones_at_the_targets_width():
    for wide, published in (("wide-1", "290M"), ("wide-3", "543M"), ("wide-5", "796M")):
        assert PRESETS[wide].num_layers == PRESETS[published].num_layers
        assert not PRESETS[wide].sizes
    with pytest.raises(ValueError, match="unknown preset '7B': wide-1, wide-3"):
        find_preset("7B")


def test_heads_follow_the_shape_and_keep_the_targets_grouping(make_model):
    config = make_model("llama").config  # 4 heads, 2 of keys and values
    made = reshaped(config, {"hidden_size": 48, "num_attention_heads": 6})
    assert (made.num_key_value_heads, made.head_dim) == (3, 8)


@pytest.mark.parametrize(
    ("sizes", "told"),
    [
        ({"depth": 3}, "no size 'depth'"),
        ({"hidden_size": 0}, "hidden_size is 0"),
        ({"hidden_size": 30}, "hidden_size 30 does not divide by 4"),
        ({"num_attention_heads": 6, "head_dim": 8, "num_key_value_heads": 4}, "6 heads do not divide by 4"),
        ({"hidden_size": 36}, "9 wide, and rotary positions need an even width"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(make_model, sizes, told):
    with pytest.raises(ValueError, match=told) as error:
        reshaped(make_model("llama").config, sizes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "gemma3", "phi3", "gpt_neox", "mistral"])
def test_a_draft_of_another_shape_runs_and_has_what_fits_of_its_target(make_model, kind):
    target = make_model(kind)
    draft = init_draft(
        target, num_layers=3, how="fresh", shape={"hidden_size": 16, "num_attention_heads": 2}, dtype=torch.float64
    ).eval()
    assert draft(torch.arange(5, 25)[None]).logits.isfinite().all()
    assert draft.config.num_hidden_layers == 3
    assert draft.get_input_embeddings().weight.shape == (61, 16)


def test_other_mlps_at_the_targets_width_keep_the_targets_attention(make_model):
    target = make_model("llama")
    draft = init_draft(target, num_layers=2, shape={"intermediate_size": 24}, dtype=torch.float64)
    ours, theirs = draft.model.layers[1], target.model.layers[1]
    assert ours.self_attn.q_proj.weight.equal(theirs.self_attn.q_proj.weight)
    assert ours.mlp.up_proj.weight.shape == (24, 32)
    with pytest.raises(ValueError, match="the target's layers do not fit another width"):
        init_draft(target, num_layers=2, shape={"hidden_size": 16})
