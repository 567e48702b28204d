"""Shapes in a family: sizes against real models, heads that divide, every supported family, estimated costs."""

from __future__ import annotations

import json

import pytest
import torch

from draftsmith.infer.costs.pass_costs import PassCost
from draftsmith.infer.measure.plan.shapes import (
    CandidateShape,
    Size,
    choose_dtype,
    default_shapes,
    estimate_cost,
    leave_one_out,
    load_config,
    parse_shapes,
    random_model,
    shaped_config,
    size_of,
)
from draftsmith.infer.models.architectures import prepare
from draftsmith.infer.models.pass_timer import CachedPassTimer
from draftsmith.infer.models.runner.model_runner import ModelRunner

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
    size = size_of(made, torch.float32, CPU)
    assert size.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert size.layers == model.config.num_hidden_layers == int(text.split("x")[0])
    assert model.get_input_embeddings().weight.shape == (config.vocab_size, int(text.split("x")[1]))
    lm = ModelRunner(model, prepare(model))
    timer = CachedPassTimer(lm)
    timer.place(2, 20)
    timer.run(3)
    held = sum(t[:, :1].nbytes for buffers in (lm.cache.keys, lm.cache.values) for t in buffers)
    assert size.token_bytes == held
    assert size.read_bytes == lm.weight_bytes


def test_the_target_itself_is_a_shape(config):
    itself = shaped_config(config, CandidateShape(8, 32))
    assert size_of(itself, torch.bfloat16, CPU) == size_of(config, torch.bfloat16, CPU)


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


def size(layers, width):
    layer = 12 * width * width * 2 * layers
    return Size(layers, 0, layer, 1000 * width * 2, 0, 0, 4 * width * layers, 0)


def cost(layers, width, bump=1.0):
    one = size(layers, width)

    def f(tokens):
        return bump * (1.0 + 0.3 * layers + tokens * (1e-7 * one.layer_bytes + 2e-7 * one.head_bytes))

    return PassCost([1, 8, 64], [f(1), f(8), f(64)], 1e-6 * one.token_bytes, 1e-8 * one.token_bytes, (2,))


SHAPES = [(1, 512), (2, 512), (5, 512), (1, 256), (4, 256)]
MEASURED = [(size(*shape), cost(*shape)) for shape in SHAPES]


@pytest.mark.parametrize("shape", [(3, 512), (4, 512), (2, 256), (3, 384)])
def test_a_shape_between_the_others_costs_what_its_layers_and_weights_add_up_to(shape):
    said, truth = estimate_cost(MEASURED, size(*shape)), cost(*shape)
    for rows, tokens, context in [(1, 1, 0), (8, 2, 500), (1, 8, 1000)]:
        assert said(rows, tokens, context) == pytest.approx(truth(rows, tokens, context), rel=1e-6)
    assert said.buckets == (2,)


def test_an_estimate_never_falls_with_the_tokens():
    noisy = [(one, PassCost([1, 8], [c.seconds[0] * 1.4, c.seconds[0]])) for one, c in MEASURED]
    said = estimate_cost(noisy, size(3, 512))
    assert list(said.seconds) == sorted(said.seconds)


def test_a_shape_whose_context_seemed_to_cost_nothing_does_not_make_it_free_for_all():
    """Between what is seen and what pairs add, noise may give one shape all of the one and nothing of the other."""
    size_0, cost_0 = MEASURED[3]
    odd = [*MEASURED[:3], (size_0, PassCost(cost_0.tokens, cost_0.seconds, 0.0, 2e-6)), MEASURED[4]]
    said, truth = estimate_cost(odd, size(3, 512)), cost(3, 512)
    assert said.per_seen == pytest.approx(truth.per_seen, rel=0.1)


def test_shapes_left_out_tell_how_good_estimates_are():
    more = [*MEASURED, (size(2, 256), cost(2, 256))]
    assert leave_one_out(more, 1, 100) == pytest.approx([0.0] * 6, abs=1e-6)
    odd = [*more, (size(3, 512), cost(3, 512, bump=2.0))]
    assert leave_one_out(odd, 1, 100)[-1] == pytest.approx(-0.5, abs=0.05)


def test_shapes_that_nothing_could_be_told_without_are_left_in():
    """Of two narrow shapes neither can go: with one of them nobody knows what a head takes and what a layer."""
    assert leave_one_out(MEASURED, 1, 100) == pytest.approx([0.0] * 3, abs=1e-6)
    assert leave_one_out(MEASURED[:3], 1, 100) == []


def test_two_shapes_are_too_few():
    with pytest.raises(ValueError, match="3 measured shapes or more, and there are 2"):
        estimate_cost(MEASURED[:2], size(3, 512))
