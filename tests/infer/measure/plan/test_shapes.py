"""Shapes in a family: sizes counted against real models, heads that divide, configs of every supported family."""

from __future__ import annotations

import json

import pytest
import torch

from draftsmith.infer.measure.plan.shapes import (
    CandidateShape,
    choose_dtype,
    default_shapes,
    load_config,
    parse_shapes,
    random_model,
    shaped_config,
    size_of,
)
from draftsmith.infer.models.architectures import prepare
from draftsmith.infer.models.cached_lm import CachedLM
from draftsmith.infer.models.pass_timer import CachedPassTimer

CPU = torch.device("cpu")
FAMILIES = ["llama", "mistral", "gemma2", "gemma3", "qwen2", "qwen3", "phi3", "mixtral", "gpt_neox", "gpt2", "opt"]


@pytest.fixture
def config(make_model):
    return make_model("llama", num_hidden_layers=8).config


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", ["1x32", "3x32", "5x16", "2x64", "1x24x2"])
def test_a_shape_of_every_family_runs_and_weighs_what_was_counted(make_model, family, text):
    config = make_model(family).config
    made = shaped_config(config, CandidateShape.parse(text))
    model = random_model(made, torch.float32, CPU)
    size = size_of(made, torch.float32)
    assert size.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert size.layers == model.config.num_hidden_layers == int(text.split("x")[0])
    assert model.get_input_embeddings().weight.shape == (config.vocab_size, int(text.split("x")[1]))
    lm = CachedLM(model, prepare(model))
    lab = CachedPassTimer(lm)
    lab.place(2, 20)
    lab.run(3)
    held = sum(t[:1, :1].nbytes for buffers in (lm.cache.keys, lm.cache.values) for t in buffers)
    assert size.token_bytes == held
    assert size.read_bytes == lm.weight_bytes


def test_the_target_itself_is_a_shape(config):
    assert size_of(shaped_config(config, CandidateShape(8, 32)), torch.bfloat16) == size_of(config, torch.bfloat16)


def test_heads_keep_the_target_s_size_and_its_share_of_keys(config):
    made = shaped_config(config, CandidateShape(2, 16))
    assert (made.num_attention_heads, made.num_key_value_heads, made.head_dim) == (2, 1, 8)
    assert made.intermediate_size == 24
    made = shaped_config(config, CandidateShape(2, 24))
    assert (made.num_attention_heads, made.num_key_value_heads) == (3, 3)
    made = shaped_config(config, CandidateShape(2, 32, 2))
    assert (made.num_attention_heads, made.head_dim) == (2, 16)
    assert config.num_hidden_layers == 8


@pytest.mark.parametrize(
    ("text", "told"),
    [("2x20", "heads of 8"),
     ("2x32x3", "3 heads"), ("2x12x4", "even size"), ("2x4", "heads of 8"), ("0x32", "no shape"),
     ("2", "no shape"), ("2x", "no shape"), ("2x32x", "no shape"), ("axb", "no shape"), ("-1x32", "no shape")],
)  # fmt: skip
def test_absurd_shapes_are_refused(config, text, told):
    with pytest.raises(ValueError, match=told):
        parse_shapes([text], config)


def test_the_shapes_that_nobody_asked_for_are_shallow(make_model, config):
    assert [str(shape) for shape in default_shapes(config)] == ["1x32", "2x32", "3x32", "5x32", "2x16", "4x16"]
    big = make_model("llama", hidden_size=256, num_attention_heads=8, num_hidden_layers=40).config
    assert max(shape.layers for shape in default_shapes(big)) == 5
    for family in FAMILIES:
        config = make_model(family).config
        shapes = parse_shapes([], config)
        assert shapes
        assert all(shape.layers < config.num_hidden_layers or shape.layers == 1 for shape in shapes)


def test_only_a_config_is_needed_and_a_file_or_a_folder_will_do(config, tmp_path):
    config.save_pretrained(tmp_path)
    for name in (tmp_path, tmp_path / "config.json"):
        assert load_config(str(name)).num_hidden_layers == 8


def test_what_has_no_config_or_takes_no_trees_is_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_config(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_config(str(tmp_path))
    for text, told in (
        ("{broken", "could not be read"),
        ('{"a": 1}', "could not be read"),
        (json.dumps({"model_type": "bloom"}), "ALiBi"),
        (json.dumps({"model_type": "mamba"}), "state-space"),
        (json.dumps({"model_type": "t5"}), "encoder-decoder"),
    ):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=told):
            load_config(str(tmp_path))


def test_the_type_is_the_config_s_unless_another_is_asked_for(config):
    config.dtype = torch.bfloat16
    assert choose_dtype(config, "auto") == torch.bfloat16
    assert choose_dtype(config, "float32") == torch.float32
    config.dtype = None
    assert choose_dtype(config, "auto") == torch.float32
    with pytest.raises(ValueError, match="unknown dtype 'int4'"):
        choose_dtype(config, "int4")
