"""A run that was killed ends as the run that was not: same losses, same weights, bit for bit."""

import csv
import functools
import random
import resource
from pathlib import Path

import processes
import pytest
from safetensors.torch import load_file

from draftsmith.recipes.cli import main
from draftsmith.train.drafts.trainable import exit_curves
from draftsmith.train.run.callbacks import MEASURED
from draftsmith.train.run.run_record import Metrics, RunRecord

STEPS = 24


def command(target, data, out, *more):
    words = [
        "train", "soft", "--target", target, "--data", data,
        "--out", out, "--num_layers", "2", "--exits", "[1, 2]", "--max_steps", str(STEPS), "--text.max_length", "128",
        "--text.held_out", "0.2", "--text.cache", Path(out).parent / "cache", "--optim.batch_size", "4",
        "--optim.micro_batch_size", "2", "--optim.lr", "1e-3", "--machine.workers", "2",
        "--machine.precision", "32-true", "--machine.device", "cpu",
        "--watch.save_every", "3", "--watch.val_every", "10", "--watch.val_prompts", "2",
        "--watch.val_new_tokens", "8", *more,
    ]  # fmt: skip
    return list(map(str, words))


def run_here(words):
    assert main.run(words) == 0


def numbers(out):
    """Every row of metrics.csv without its times."""
    with (out / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{key: value for key, value in row.items() if "seconds" not in key and "_per_s" not in key} for row in rows]


@pytest.fixture(scope="module")
def finished(target_folder, chats, tmp_path_factory):
    """The run that was not killed."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run_here(command(target_folder, chats, out))
    return out


def test_killed_and_out_of_room_it_ends_as_if_nothing_had_been(
    target_folder, chats, finished, tmp_path, capsys, kill_at_step
):
    out = tmp_path / "out"
    words = command(target_folder, chats, out)
    kill_at_step(words, out, random.randrange(4, STEPS - 4))
    (good,) = (out / "resume").glob("step-*.ckpt")
    content = good.read_bytes()

    # A state does not fit any more, metrics.csv and run.json do.
    limited = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (100_000, 100_000))
    full = processes.run(processes.COMMAND, *words, before=limited)
    assert full.returncode == 2
    assert f"could not be written (File too large); the last good one is {good.name}" in full.stderr
    assert [path.name for path in (out / "resume").iterdir()] == [good.name]
    assert good.read_bytes() == content

    run_here(words)
    assert f"resuming from {good.name}" in capsys.readouterr().err
    assert numbers(out) == numbers(finished)
    ours, theirs = load_file(out / "model.safetensors"), load_file(finished / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    assert not (out / "resume").exists()


@pytest.mark.slow
def test_minutes_fix_max_steps_once_and_a_killed_run_keeps_to_them(
    target_folder, chats, tmp_path, capsys, kill_at_step
):
    """The run beside it has the same max_steps from its beginning, and nobody kills it."""
    out, beside = tmp_path / "out", tmp_path / "beside"
    words = command(target_folder, chats, out, "--minutes", "0.15")
    at = words.index("--max_steps")
    del words[at : at + 2]
    kill_at_step(words, out, random.randrange(MEASURED + 2, MEASURED + 6))
    before = RunRecord(out).read()
    assert before["max_steps"] > MEASURED
    assert before["state"] == "running"
    record = RunRecord(beside)
    record.begin({**before, "settings": {**before["settings"], "out": str(beside)}})

    run_here(words)
    assert "resuming from step-" in capsys.readouterr().err
    words[words.index(str(out))] = str(beside)
    run_here(words)
    assert "resuming" not in capsys.readouterr().err
    assert RunRecord(out).read()["max_steps"] == before["max_steps"]
    assert len([row for row in numbers(out) if row["kind"] == "train"]) == before["max_steps"]
    assert numbers(out) == numbers(beside)
    ours, theirs = load_file(out / "model.safetensors"), load_file(beside / "model.safetensors")
    assert all(ours[name].equal(theirs[name]) for name in theirs)


def test_a_finished_run_is_not_touched(finished):
    with pytest.raises(ValueError, match="holds a finished run: give a new folder"):
        RunRecord(finished).open({"settings": {}})


def test_other_settings_are_not_mixed_into_a_run_but_free_ones_may_change(tmp_path):
    settings = {"optim": {"lr": 0.001}, "machine": {"workers": 2}}
    RunRecord(tmp_path).begin(RunRecord(tmp_path).open({"settings": settings, "state": "running"}))
    RunRecord(tmp_path).open({"settings": {**settings, "machine": {"workers": 0}}})
    with pytest.raises(ValueError, match=r"other settings: optim.lr \(0.001, now 0.002\)"):
        RunRecord(tmp_path).open({"settings": {**settings, "optim": {"lr": 0.002}}})


def test_a_run_may_resume_on_other_ranks_but_deepspeeds_only_on_those_that_wrote_its_checkpoint(tmp_path):
    def settings(strategy, devices, micro):
        return {"strategy": strategy, "devices": devices, "num_nodes": 1, "optim": {"micro_batch_size": micro}}

    def begun(name, strategy):
        record = RunRecord(tmp_path / name)
        record.begin(record.open({"settings": settings(strategy, 2, 2), "state": "running"}))
        return record

    whole = begun("whole", "ddp")
    whole.open({"settings": settings("auto", 1, 4)})
    whole.open({"settings": settings("ddp", 4, 1)})
    with pytest.raises(ValueError, match=r"other settings: strategy \('ddp', now 'fsdp'\)"):
        whole.open({"settings": settings("fsdp", 2, 2)})
    split = begun("split", "deepspeed_stage_2")
    split.open({"settings": settings("deepspeed_stage_2", 2, 2)})
    with pytest.raises(ValueError, match=r"resume only on the ranks that wrote them: give --devices 2, --optim\.micro"):
        split.open({"settings": settings("deepspeed_stage_2", 4, 1)})
    with pytest.raises(ValueError, match="other settings: strategy"):
        split.open({"settings": settings("ddp", 2, 2)})


def test_a_folder_that_cannot_be_written_or_holds_other_things_is_one_clear_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written to: Not a directory"):
        RunRecord(tmp_path / "file" / "out").open({"settings": {}})
    with pytest.raises(ValueError, match="not empty and holds no run"):
        RunRecord(tmp_path).open({"settings": {}})


def test_a_run_that_never_began_leaves_the_folder_free(tmp_path):
    RunRecord(tmp_path / "out").open({"settings": {"target": "wrong"}})
    RunRecord(tmp_path / "out").open({"settings": {"target": "right"}})


def test_a_row_that_a_kill_cut_short_is_passed_over(tmp_path):
    metrics = Metrics(tmp_path / "metrics.csv", exit_curves([1]))
    metrics.begin(0)
    for step in (1, 2, 3):
        metrics.add(step=step, kind="train", loss=0.1 * step, seconds=1.0)
    whole = metrics.path.read_text()
    metrics.path.write_text(whole[:-7])
    metrics.begin(1)
    assert [row["step"] for row in metrics.rows()] == ["1"]
    assert float(metrics.rows()[0]["loss"]) == 0.1
