"""How a run ends before its last step: its time is over, SIGTERM, a loss that is not finite."""

import csv
import json
import os
import signal
import time
from pathlib import Path

import processes
import pytest
import torch
from safetensors.torch import load_file

from draftsmith.recipes.cli.main import run
from draftsmith.train.objectives.distil import Distil
from draftsmith.train.objectives.sft import SFT
from draftsmith.train.objectives.soft import SoFT
from draftsmith.train.run.config import Machine, Optim, Text, TrainConfig, Watch
from draftsmith.train.run.module import Training
from draftsmith.train.run.run import train_draft
from draftsmith.train.run.stops import Stopped


def command(target, data, out, *more):
    words = [
        "train", "sft", "--target", target, "--data", data, "--out", out, "--num_layers", "2",
        "--text.max_length", "64", "--text.held_out", "0.2", "--text.cache", Path(out).parent / "cache",
        "--optim.batch_size", "4", "--optim.micro_batch_size", "1", "--machine.workers", "0", "--machine.device", "cpu",
        "--machine.precision", "32-true", "--watch.val_every", "0", "--watch.val_prompts", "0", *more,
    ]  # fmt: skip
    return list(map(str, words))


def facts_of(out):
    return json.loads((out / "run.json").read_text())


def train_rows(out):
    with (out / "metrics.csv").open(newline="") as file:
        return [row for row in csv.DictReader(file) if row["kind"] == "train"]


class SlowClock:
    """time.monotonic(), and `seconds` more for every micro-batch trained on."""

    def __init__(self, monkeypatch, seconds):
        self.micro_batches = 0
        real, step = time.monotonic, Training.training_step
        monkeypatch.setattr(time, "monotonic", lambda: real() + seconds * self.micro_batches)

        def slow(module, *args):
            self.micro_batches += 1
            return step(module, *args)

        monkeypatch.setattr(Training, "training_step", slow)


def test_minutes_end_at_a_micro_batch_where_not_one_step_fits(target_folder, chats, tmp_path, monkeypatch, capsys):
    """A minute per micro-batch, four to a step, three minutes."""
    timed, out = SlowClock(monkeypatch, 60), tmp_path / "out"
    words = command(target_folder, chats, out, "--minutes", "3", "--json")
    assert run(words) == 1
    assert timed.micro_batches == 3
    said = capsys.readouterr()
    assert json.loads(said.out.splitlines()[-1])["max_steps"] == 0
    assert "step 1  micro-batch 2/4  next step in 0:02:0" in said.err
    assert "optimiser steps of 4 rows fit the time" in said.err
    assert said.err.splitlines()[-1].startswith("draftsmith train: the time was over before the first optimiser step")
    ours, start = load_file(out / "model.safetensors"), load_file(target_folder / "model.safetensors")
    assert all(ours[name].equal(start[name]) for name in ours)
    assert facts_of(out)["state"] == "finished"


def test_minutes_keep_the_newest_finished_step_and_drop_the_rest(target_folder, chats, tmp_path, monkeypatch, capsys):
    """Six minutes are one step and two micro-batches; the model is that of a run of one step."""
    timed, out, one = SlowClock(monkeypatch, 60), tmp_path / "out", tmp_path / "one"
    assert run(command(target_folder, chats, out, "--minutes", "6")) == 0
    assert timed.micro_batches <= 6
    assert "about 1.5 optimiser steps of 4 rows fit the time" in capsys.readouterr().err
    facts = facts_of(out)
    assert (facts["max_steps"], len(train_rows(out)), facts["results"]["step"]) == (1, 1, 1)
    monkeypatch.undo()
    lr = train_rows(out)[0]["lr"]
    assert run(command(target_folder, chats, one, "--max_steps", "1", "--optim.lr", lr, "--optim.warmup", "0")) == 0
    ours, theirs = load_file(out / "model.safetensors"), load_file(one / "model.safetensors")
    assert all(ours[name].equal(theirs[name]) for name in ours)


def test_minutes_that_turn_out_too_short_for_max_steps_are_kept_all_the_same(
    target_folder, chats, tmp_path, monkeypatch
):
    """Ten steps of four seconds are planned; then every micro-batch takes a minute."""
    out = tmp_path / "out"
    timed = SlowClock(monkeypatch, 1)
    fixed = {}
    step = Training.training_step

    def slower(module, *args):
        planned = facts_of(out).get("max_steps")
        if planned:
            fixed.setdefault("max_steps", planned)
            timed.micro_batches += 59
        return step(module, *args)

    monkeypatch.setattr(Training, "training_step", slower)
    assert run(command(target_folder, chats, out, "--minutes", "2")) == 0
    facts = facts_of(out)
    assert facts["max_steps"] == len(train_rows(out)) < fixed["max_steps"] == facts["planned_steps"]
    assert facts["results"]["step"] == facts["max_steps"]


def test_a_run_of_minutes_really_ends_in_time(target_folder, chats, tmp_path, capsys):
    out = tmp_path / "out"
    began = time.monotonic()
    assert run(command(target_folder, chats, out, "--minutes", "0.04", "--optim.batch_size", "1024")) == 1
    assert time.monotonic() - began < 6
    assert (out / "model.safetensors").is_file()


def test_few_steps_in_the_data_are_warned_about_with_the_mend(target_folder, chats, tmp_path, capsys):
    assert run(command(target_folder, chats, tmp_path / "out", "--optim.batch_size", "64")) == 0
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if line.startswith("warning: ")]
    assert line.startswith("warning: 3 epochs of this data are only ")
    batch_size = line.split("--optim.batch_size ")[1].split()[0]
    assert run(command(target_folder, chats, tmp_path / "more", "--optim.batch_size", batch_size)) == 0
    assert "warning: " not in capsys.readouterr().err
    assert facts_of(tmp_path / "more")["max_steps"] >= 20


@pytest.mark.parametrize(
    ("objective", "learning"),
    [(SFT(), "sft"), (SoFT([1, 2]), "soft"), (Distil({"forward_kl": 1.0}), "distil")],
    ids=["sft", "soft", "distil"],
)
def test_a_loss_that_is_not_finite_stops_every_objective_and_keeps_the_last_good_state(
    objective, learning, target_folder, chats, tmp_path, monkeypatch
):
    out = tmp_path / "out"
    config = TrainConfig(
        str(target_folder), [str(chats)], str(out), 2, max_steps=9,
        text=Text(max_length=64, held_out=0.2, cache=str(tmp_path / "cache")),
        optim=Optim(batch_size=2, micro_batch_size=1), machine=Machine("cpu", "32-true", 0),
        watch=Watch(val_every=0, val_prompts=0, save_every=2),
    )  # fmt: skip
    kind, calls = type(objective), []
    real = kind.__call__

    def spoilt(self, draft, batch):
        sums = real(self, draft, batch)
        calls.append(1)
        return sums._replace(total=sums.total * float("nan"), per_exit_E=sums.per_exit_E + float("nan")) \
            if draft.training and int(batch["number"]) == 10 else sums  # fmt: skip

    monkeypatch.setattr(kind, "__call__", spoilt)
    with pytest.raises(
        Stopped, match=r"step 6: the loss is nan.*the last good state is .*step-00000004\.ckpt"
    ) as error:
        train_draft(objective, config)
    assert error.value.exit_code == 1
    assert "\n" not in str(error.value)
    state = torch.load(out / "resume" / "step-00000004.ckpt", weights_only=True)["state_dict"]
    assert all(weight.isfinite().all() for weight in state.values())
    assert len(train_rows(out)) == 5


@pytest.mark.parametrize("clip", ["1.0", "0"])
def test_a_learning_rate_that_ends_in_nan_is_one_line_and_exit_code_1(clip, target_folder, chats, tmp_path, capsys):
    out = tmp_path / "out"
    words = command(target_folder, chats, out, "--max_steps", "8", "--optim.lr", "1e30", "--optim.grad_clip", clip)
    assert run([*words, "--optim.warmup", "0"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("draftsmith train: step ")
    assert "lower --optim.lr" in last
    assert not (out / "model.safetensors").exists()


def start(words):
    return processes.Started(processes.COMMAND, *words)


def wait_for(condition, process):
    until = time.monotonic() + 60
    while not condition() and process.poll() is None and time.monotonic() < until:
        time.sleep(0.01)


LONG = ["--max_steps", "24", "--optim.batch_size", "8"]


@pytest.fixture(scope="module")
def whole(target_folder, chats, tmp_path_factory):
    """The run of LONG that no signal stops."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert run(command(target_folder, chats, out, *LONG)) == 0
    return out


@pytest.mark.parametrize("group", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["process", "group"])
def test_sigterm_saves_the_last_step_and_the_run_resumes_to_the_same_losses(
    group, whole, target_folder, chats, tmp_path
):
    """To the process, or to all of its group as `timeout` and schedulers send it, loading workers included."""
    out = tmp_path / "out"
    words = command(target_folder, chats, out, *LONG)
    process = start([*words, "--machine.workers", "2"])
    wait_for(lambda: (out / "metrics.csv").is_file() and len(train_rows(out)) >= 2, process)
    os.killpg(process.pid, signal.SIGTERM) if group else process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143, process.stderr
    said = process.stderr
    last = said.splitlines()[-1]
    assert "Traceback" not in said
    assert last.startswith("draftsmith train: stopped by SIGTERM after step ")
    assert "run the same command again" in last
    (state,) = (out / "resume").iterdir()
    assert f"after step {len(train_rows(out))};" in last
    assert state.name == f"step-{len(train_rows(out)):08d}.ckpt"

    assert run(words) == 0
    assert [(row["step"], row["loss"]) for row in train_rows(out)] == [
        (row["step"], row["loss"]) for row in train_rows(whole)
    ]
    ours, theirs = load_file(out / "model.safetensors"), load_file(whole / "model.safetensors")
    assert all(ours[name].equal(theirs[name]) for name in ours)


def test_a_state_saved_inside_an_accumulation_is_that_of_the_last_step(
    target_folder, chats, tmp_path, monkeypatch, capsys
):
    """The signal comes at the third of four micro-batches of step 3, while `minutes` has not yet fixed max_steps."""
    out = tmp_path / "out"
    words = command(target_folder, chats, out, "--minutes", "5")
    step = Training.training_step

    def signalled(module, batch, index):
        if int(batch["number"]) == 10:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(module, batch, index)

    monkeypatch.setattr(Training, "training_step", signalled)
    assert run(words) == 143
    monkeypatch.undo()
    assert "stopped by SIGTERM after step 2;" in capsys.readouterr().err
    before = facts_of(out)
    assert before["measured_steps"] == 2 < before["max_steps"]
    state = torch.load(out / "resume" / "step-00000002.ckpt", weights_only=True)
    assert state["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["ready"] == 8

    words = command(target_folder, chats, out, "--minutes", "5")
    (out / "run.json").write_text(json.dumps({**before, "max_steps": 6}))
    assert run(words) == 0
    beside = tmp_path / "beside"
    beside.mkdir()
    settings = {**before["settings"], "out": str(beside)}
    (beside / "run.json").write_text(json.dumps({**before, "max_steps": 6, "settings": settings}))
    assert run(command(target_folder, chats, beside, "--minutes", "5")) == 0
    assert [row["loss"] for row in train_rows(out)] == [row["loss"] for row in train_rows(beside)]
    assert len(train_rows(out)) == 6


def test_sigterm_before_the_first_step_is_one_line_too(target_folder, chats, tmp_path):
    out = tmp_path / "out"
    process = start(command(target_folder, chats, out, "--max_steps", "2", "--optim.batch_size", "1024"))
    wait_for(lambda: (out / "metrics.csv").is_file(), process)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143, process.stderr
    said = process.stderr
    assert said.splitlines()[-1].startswith("draftsmith train: stopped by SIGTERM before the first step was finished")
    assert "Traceback" not in said
