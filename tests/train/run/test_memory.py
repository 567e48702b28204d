"""The memory estimate against the parts it names, and against what a training process really takes."""

import os
import re
import socket
import subprocess
import sys

import pytest
import torch

from draftsmith.train.drafts.exits import ExitStates
from draftsmith.train.drafts.medusa import MedusaBuilder
from draftsmith.train.drafts.trainable import BuildContext
from draftsmith.train.run.memory import memory_estimate, saved_bytes, shards_of
from draftsmith.train.run.target import random_llama, train_tokenizer

# ru_maxrss would be the peak of the process that started this one, where that is higher.
MEASURE = """
import re, sys
from pathlib import Path
from draftsmith.recipes.cli.main import run
code = run(sys.argv[1:])
print("peak", int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024)
sys.exit(code)
"""


def test_the_memory_estimate_counts_what_is_there_and_what_is_spread(make_model):
    model = make_model("llama", dtype=torch.float32)
    draft = ExitStates(model, [1, model.config.num_hidden_layers])
    common = {"rows": 64, "length": 256, "optimiser": "adamw", "autocast": None, "cuda": True}
    plain = memory_estimate(draft, checkpointing=False, **common)
    beside = memory_estimate(draft, checkpointing=False, target=model, **common)
    saving = memory_estimate(draft, checkpointing=True, strategy="deepspeed_stage_3", ranks=2, **common)
    assert plain["total"] == pytest.approx(sum(size for name, size in plain.items() if name != "total"), abs=0.01)
    assert plain["optimiser"] == pytest.approx(2 * plain["weights"], abs=0.001)
    assert beside["total"] == pytest.approx(plain["total"] + plain["weights"], abs=0.002)
    assert saving["activations"] < plain["activations"]
    assert draft.training == model.training
    assert shards_of("ddp", 4) == {}
    assert shards_of("deepspeed_stage_2", 4) == {"optimiser": 4, "gradients": 4}


def test_two_ranks_of_fsdp_hold_half_and_gather_what_lies_outside_the_layers(make_model):
    sizes = {"vocab_size": 8192, "hidden_size": 256, "intermediate_size": 4096, "dtype": torch.float32}
    model, draft = make_model("llama", **sizes), ExitStates(make_model("llama", **sizes), [1, 2])
    common = {"rows": 1, "length": 256, "optimiser": "adamw", "autocast": None, "checkpointing": False}
    whole = memory_estimate(draft, target=model, cuda=True, **common)
    half = memory_estimate(draft, target=model, cuda=True, strategy="fsdp", ranks=2, **common)
    for name in ("weights", "gradients", "optimiser"):
        assert half[name] == pytest.approx(whole[name] / 2, abs=0.001)
    edges = 2 * 8192 * 256 * 4 / 2**30
    assert half["target"] == pytest.approx(edges + (whole["target"] - edges) / 2, abs=0.001)
    layer = (whole["weights"] - edges) / 2
    assert half["gathered"] == pytest.approx(edges + 4 * layer, abs=0.001)
    away = memory_estimate(draft, target=model, cuda=True, strategy="fsdp_cpu_offload", ranks=2, **common)
    assert away["offloaded"] == pytest.approx(half["weights"] + half["gradients"] + half["optimiser"], abs=0.002)
    assert away["total"] == pytest.approx(half["total"] - away["offloaded"], abs=0.002)
    assert not {"weights", "gradients", "optimiser"} & away.keys()
    zero = memory_estimate(draft, cuda=True, strategy="deepspeed_stage_2_offload", ranks=2, **common)
    assert zero["weights"] == whole["weights"]
    assert zero["offloaded"] == pytest.approx(half["gradients"] + half["optimiser"], abs=0.002)
    loading = memory_estimate(draft, cuda=False, strategy="fsdp", ranks=2, loaded=2**33, **common)
    assert loading["total"] == pytest.approx(8 + whole["weights"] + loading["process"], abs=0.01)


def test_heads_cost_their_weights_the_frozen_target_and_the_states_that_they_read(make_model, make_corpus):
    target = make_model("llama", dtype=torch.float32, vocab_size=8192, hidden_size=256)
    draft = MedusaBuilder(3).build(BuildContext(target, make_corpus([12]), torch.float32))
    common = {"rows": 64, "length": 2048, "optimiser": "adamw", "autocast": None, "checkpointing": False}
    parts = memory_estimate(draft, target=target, cuda=True, **common)
    each = 8192 * 256 * 4 / 2**30
    assert parts["target"] == pytest.approx(sum(weight.nbytes for weight in target.parameters()) / 2**30, abs=0.001)
    assert parts["weights"] == parts["gradients"] == pytest.approx(3 * each, abs=0.002)
    assert parts["optimiser"] == pytest.approx(6 * each, abs=0.003)
    assert parts["features"] == pytest.approx(64 * 2048 * 256 * 4 / 2**30, abs=0.001)
    assert parts["loss"] > 3 * each
    assert parts["activations"] > 3 * parts["features"]


def test_the_estimate_does_not_depend_on_where_tensors_happen_to_lie():
    """Of two results one is used; the memory of the other is free for the next tensors, or is not."""
    layer = torch.nn.Linear(64, 64)
    states = torch.ones(16, 64)

    def used():
        return layer(layer(states).tanh()).sum()

    def with_one_unused():
        layer(states).exp()
        return used()

    again = [saved_bytes(layer, with_one_unused) for _ in range(10)]
    assert set(again) == {saved_bytes(layer, used)} == {2 * 16 * 64 * 4}


@pytest.fixture(scope="module")
def wide_target(chats, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wide")
    tokenizer = train_tokenizer(iter([chats.read_text()]), 300)
    random_llama(tokenizer, 512, 12, 1024, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("layers", "rows", "precision"),
    [pytest.param(10, 1, "32-true", marks=pytest.mark.slow), (2, 8, "32-true")],
    ids=["weights", "activations"],
)
def test_the_estimate_is_within_a_quarter_of_the_peak_of_the_process(
    layers, rows, precision, wide_target, chats, tmp_path
):
    """Once most of it is weights and their states, once activations."""
    check_peak(["sft", "--num_layers", layers], rows, precision, wide_target, chats, tmp_path)


@pytest.mark.slow
def test_the_estimate_for_heads_is_within_a_quarter_of_the_peak_of_the_process(wide_target, chats, tmp_path):
    check_peak(["hydra", "--num_heads", "3"], 8, "32-true", wide_target, chats, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("strategy", "kind", "rows"),
    [
        ("ddp", ["sft", "--num_layers", 10], 1),
        ("fsdp", ["sft", "--num_layers", 10], 1),
        ("fsdp", ["hydra", "--num_heads", "3"], 8),
    ],
    ids=["ddp", "fsdp", "fsdp-hydra"],
)
def test_the_estimate_is_within_a_quarter_of_the_peak_of_each_rank(strategy, kind, rows, wide_target, chats, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "NODE_RANK": "0"}
    words = measured_words(kind, rows, "32-true", wide_target, chats, tmp_path)
    words += ["--optim.batch_size", 2 * rows, "--devices", 2, "--strategy", strategy, "--watch.val_prompts", "0"]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", MEASURE, *map(str, words)], text=True, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env={**os.environ, **where, "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        written = [rank.communicate(timeout=300) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], written
    for out, _ in written:
        check_estimate(written[0][1], out)


def measured_words(kind, rows, precision, wide_target, chats, tmp_path):
    return ["train", *kind, "--target", wide_target, "--data", chats, "--out", tmp_path / "out", "--max_steps", "2",
            "--text.max_length", "512", "--text.held_out", "0.2",
            "--text.cache", tmp_path / "cache", "--optim.batch_size", rows, "--optim.micro_batch_size", rows,
            "--machine.device", "cpu", "--machine.workers", "0", "--machine.precision", precision,
            "--watch.val_prompts", "1", "--watch.val_new_tokens", "2", "--watch.val_packs", "1"]  # fmt: skip


def check_peak(kind, rows, precision, wide_target, chats, tmp_path):
    words = measured_words(kind, rows, precision, wide_target, chats, tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, words)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    check_estimate(done.stderr, done.stdout)


def check_estimate(stderr, stdout):
    estimate = float(re.search(r"memory per device, estimated: ([\d.]+) GiB", stderr)[1])
    peak = int(stdout.split("peak ")[1]) / 2**30
    print(f"estimate {estimate:.2f} GiB, peak {peak:.2f} GiB")
    assert peak / 1.25 <= estimate <= peak * 1.25, stderr
