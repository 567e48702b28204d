"""Numbers out of range are refused in one line before anything is read, loaded or written."""

import importlib.util
from dataclasses import fields, is_dataclass
from operator import attrgetter
from pathlib import Path

import pytest
import torch

from draftsmith.recipes.cli.main import run
from draftsmith.train.objectives.sft import SFT
from draftsmith.train.run.config import RANGES, Machine, Optim, TrainConfig, Watch, check_ranges, resolved
from draftsmith.train.run.run import train_draft


def numbers(config, prefix=""):
    for field in fields(config):
        value = getattr(config, field.name)
        if is_dataclass(value):
            yield from numbers(value, f"{prefix}{field.name}.")
        elif not isinstance(value, bool) and any(word in str(field.type) for word in ("int", "float")):
            yield f"{prefix}{field.name}"


def test_every_number_of_the_options_has_a_range_that_holds_its_default():
    config = TrainConfig("t", ["d"], "o", 2)
    assert set(RANGES) == set(numbers(config)) - {"shape"}
    check_ranges(config)
    for name in RANGES:
        attrgetter(name)(config)


@pytest.mark.parametrize(("fast", "precision"), [(True, "bf16-mixed"), (False, "32-true")])
def test_precision_follows_what_the_processor_multiplies_fast(fast, precision, monkeypatch):
    monkeypatch.setattr("draftsmith.infer.models.products.prepack.multiplies_bfloat16", lambda: fast)
    config = TrainConfig("t", ["d"], "o", 2, machine=Machine(device="cpu"))
    assert resolved(config).machine.precision == precision


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--max_steps", "-3"], "--max_steps -3: it must be at least 1"),
        (["--max_steps", "0"], "--max_steps 0: it must be at least 1"),
        (["--minutes", "0"], "--minutes 0.0: it must be above 0"),
        (["--minutes", "-1"], "--minutes -1.0: it must be above 0"),
        (["--minutes", ".nan"], "--minutes nan: it must be above 0"),
        (["--epochs", "0"], "--epochs 0.0: it must be above 0"),
        (["--epochs", ".inf"], "--epochs inf: it must be above 0"),
        (["--num_layers", "0"], "--num_layers 0: it must be at least 1"),
        (["--optim.batch_size", "0"], "--optim.batch_size 0: it must be at least 1"),
        (["--optim.micro_batch_size", "-1"], "--optim.micro_batch_size -1: it must be at least 0"),
        (["--optim.warmup", "-1"], "--optim.warmup -1.0: it must be at least 0 and at most 1"),
        (["--optim.lr", ".nan"], "--optim.lr nan: it must be at least 0"),
        (["--optim.beta2", "1"], "--optim.beta2 1.0: it must be at least 0 and below 1"),
        (["--text.held_out", "1"], "--text.held_out 1.0: it must be at least 0 and below 1"),
        (["--text.limit", "0"], "--text.limit 0: it must be at least 1"),
        (["--watch.save_every", "0"], "--watch.save_every 0: it must be at least 1"),
        (["--minutes", "1", "--max_steps", "2"], "--minutes and --max_steps are two lengths of one run: give one"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
@pytest.mark.parametrize("kind", ["sft", "target"])
def test_a_number_out_of_range_is_one_line_and_exit_code_2(kind, wrong, said, tmp_path, capsys):
    words = ["train", kind, "--data", "missing.jsonl", "--out", str(tmp_path / "out"), "--num_layers", "2", *wrong]
    assert run([*words, "--target", "missing"] if kind == "sft" else words) == 2
    assert capsys.readouterr().err.startswith(f"draftsmith train {kind}: {said}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kind", "wrong", "said"),
    [
        ("soft", ["--exits", "[]"], "exits is empty: give the layer counts"),
        ("distil", ["--exits", "[]"], "exits is empty: give the layer counts"),
        ("target", ["--vocab_size", "0"], "--vocab_size 0: it must be at least 262"),
        ("target", ["--hidden_size", "0"], "--hidden_size 0: it must be a multiple of 64"),
    ],
)
def test_sizes_of_one_command_are_refused_as_early(kind, wrong, said, tmp_path, capsys):
    words = ["train", kind, "--data", "missing.jsonl", "--out", str(tmp_path / "out"), "--num_layers", "2", *wrong]
    assert run(words if kind == "target" else [*words, "--target", "missing"]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


class Answers(SFT):
    whole_draft = True


def test_an_objective_that_needs_the_whole_draft_is_named_where_the_draft_is_sharded(tmp_path):
    config = TrainConfig("missing", ["missing"], str(tmp_path / "out"), 2, strategy="fsdp")
    with pytest.raises(ValueError, match="the objective Answers decodes with the whole draft, and fsdp shards it"):
        train_draft(Answers(), config)
    assert not Path(config.out).exists()


@pytest.mark.parametrize(
    ("strategy", "optim", "said"),
    [
        ("deepspeed_stage_3_offload", Optim(), "needs the extra `deepspeed`: pip install 'draftsmith[deepspeed]'"),
        ("fsdp_cpu_offload", Optim(name="muon"), "muon multiplies whole matrices, and fsdp_cpu_offload does not"),
    ],
)
def test_what_a_strategy_lacks_on_a_machine_with_a_gpu_is_one_line(strategy, optim, said, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = TrainConfig("t", ["d"], "o", 2, strategy=strategy, optim=optim, watch=Watch(val_prompts=0))
    with pytest.raises(ValueError) as error:
        resolved(config)
    assert said in str(error.value)
    assert "\n" not in str(error.value)
