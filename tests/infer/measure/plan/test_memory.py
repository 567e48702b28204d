"""What a survey holds, counted before it is built: against real models, and for a target larger than the machine."""

from __future__ import annotations

import pytest
import torch

from draftsmith.infer.costs.timing import grid, measure_together
from draftsmith.infer.measure.plan import memory
from draftsmith.infer.measure.plan.memory import check_room, needed_bytes
from draftsmith.infer.measure.plan.shapes import CandidateShape, SurveyRequest, random_model, shaped_config, size_of
from draftsmith.infer.models.architectures import prepare
from draftsmith.infer.models.pass_timer import CachedPassTimer
from draftsmith.infer.models.products import prepack
from draftsmith.infer.models.runner.arena import SCRATCH
from draftsmith.infer.models.runner.model_runner import ModelRunner

CPU, GIB = torch.device("cpu"), 2**30
SHAPES = [CandidateShape(1, 4096), CandidateShape(5, 4096)]


@pytest.fixture
def config_7b(make_model):
    config = make_model("llama").config
    config.update({"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000,
                   "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128, "dtype": "bfloat16",
                   "max_position_embeddings": 4096})  # fmt: skip
    return config


@pytest.fixture
def packs_bfloat16(monkeypatch):
    """A CPU that multiplies packed bfloat16, so that the count does not depend on this one."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)


def sized(config, gib, monkeypatch):
    """The sizes of a 7B target and its drafts on a machine of `gib` GiB, nearly all of it available."""
    monkeypatch.setattr(prepack, "total_memory", lambda: gib * GIB)
    monkeypatch.setattr(memory, "_room", lambda device: int((gib - 1.5) * GIB))
    sizes = {"target": size_of(config, torch.bfloat16, CPU)}
    return sizes | {str(one): size_of(shaped_config(config, one), torch.bfloat16, CPU) for one in SHAPES}


def test_a_7b_target_fits_into_24_gib_because_only_its_draft_is_packed(config_7b, packs_bfloat16, monkeypatch):
    sizes = sized(config_7b, 24, monkeypatch)
    assert sizes["target"].parameters == pytest.approx(6.74e9, rel=0.01)
    assert sizes["target"].packed_bytes == 0
    assert sizes["5x4096"].packed_bytes > 2 * GIB
    asked = SurveyRequest((1, 4), (128, 1024), (4, 14), SHAPES)
    assert 17 * GIB < needed_bytes(sizes, asked).total < 22 * GIB
    check_room(config_7b, sizes, asked, CPU)


def test_on_a_machine_with_room_for_copies_they_are_counted(config_7b, packs_bfloat16, monkeypatch):
    asked = SurveyRequest((1,), (128,), (4,), SHAPES)
    small, large = (needed_bytes(sized(config_7b, gib, monkeypatch), asked) for gib in (24, 64))
    assert large.weights - small.weights == pytest.approx(12.3 * GIB, rel=0.01)
    assert large.cache == small.cache


@pytest.mark.parametrize(
    ("gib", "rows", "mend"), [(24, (1, 8, 32), "--batch_sizes of at most"), (16, (1,), "smaller target")]
)
def test_what_does_not_fit_is_refused_with_needed_and_available_gib(
    config_7b, packs_bfloat16, monkeypatch, gib, rows, mend
):
    sizes = sized(config_7b, gib, monkeypatch)
    asked = SurveyRequest(rows, (128, 1024), (4, 14), SHAPES)
    needed = needed_bytes(sizes, asked).total / GIB
    with pytest.raises(ValueError, match=rf"^this needs {needed:.1f} GiB .* has {gib - 1.5} GiB available: .*{mend}"):
        check_room(config_7b, sizes, asked, CPU)


def test_the_batch_size_that_a_refusal_names_fits(config_7b, packs_bfloat16, monkeypatch):
    sizes = sized(config_7b, 24, monkeypatch)
    with pytest.raises(ValueError) as refused:
        check_room(config_7b, sizes, SurveyRequest((32,), (128, 1024), (4, 14), SHAPES), CPU)
    fits = int(str(refused.value).partition("at most ")[2].partition(",")[0])
    check_room(config_7b, sizes, SurveyRequest((fits,), (128, 1024), (4, 14), SHAPES), CPU)
    with pytest.raises(ValueError):
        check_room(config_7b, sizes, SurveyRequest((fits + 1,), (128, 1024), (4, 14), SHAPES), CPU)


@pytest.mark.parametrize("contexts", [(16, 128), (128, 300)])
@pytest.mark.parametrize("nodes", [(1, 4), (1, 100)])
def test_the_bytes_of_real_models_are_those_counted(make_model, contexts, nodes):
    config = make_model("llama", torch.bfloat16, hidden_size=64, num_hidden_layers=4).config
    shape = CandidateShape(2, 64, 4)
    asked = SurveyRequest((1, 3), contexts, nodes, [shape])
    held, sizes = 0, {}
    for name, made in (("target", config), (str(shape), shaped_config(config, shape))):
        sizes[name] = size_of(made, torch.bfloat16, CPU)
        model = random_model(made, torch.bfloat16, CPU)
        lm = ModelRunner(model, prepare(model))
        passes = grid(asked.batch_sizes, [1, *(count + 1 for count in asked.nodes)], asked.contexts)
        measure_together({"": (CachedPassTimer(lm), passes)})
        packed = [one.forward.packed for one in model.modules() if hasattr(one.forward, "packed")]
        assert bool(packed) == prepack.can_prepack(model)
        weights = sum(parameter.nbytes for parameter in model.parameters())
        slot_bytes = lm.cache.nbytes() // lm.cache.size
        held += weights + sum(copy.nbytes for copy in packed) + (lm.cache.largest - SCRATCH) * slot_bytes
    assert needed_bytes(sizes, asked).total == held


def test_too_many_positions_are_refused_before_anything_is_made(make_model):
    config = make_model("llama").config
    sizes = {"target": size_of(config, torch.float32, CPU)}
    with pytest.raises(ValueError, match="512 positions"):
        check_room(config, sizes, SurveyRequest((1,), (510,), (4,), [CandidateShape(1, 32)]), CPU)
