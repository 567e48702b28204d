"""Features on disk: what they hold and take, that a kill does not hurt them, and what does not fit is refused."""

import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

import draftsmith.train.teacher.feature_cache as format_of
from draftsmith.infer.models.load import load_model
from draftsmith.train.data.batches import assemble
from draftsmith.train.drafts.exits import TrainContext
from draftsmith.train.teacher.feature_cache import open_features
from draftsmith.train.teacher.features import LiveFeatures

LENGTHS = [12, 20, 9, 33, 15, 8, 24, 40, 11]
NAMES = ("layer:2", "last")


@pytest.fixture
def run(target_folder, make_corpus, monkeypatch):
    """Small shards, so that samples lie across their borders."""
    monkeypatch.setattr(format_of, "SHARD_BYTES", 16 * 2 * 32 * 2)
    target, _ = load_model(str(target_folder), dtype="float32", device="cpu")
    return TrainContext(target, target, make_corpus(LENGTHS), 64, "cpu")


@pytest.mark.parametrize(("dtype", "error"), [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_it_holds_the_live_states_of_every_token_and_gives_the_targets_distributions(run, tmp_path, dtype, error):
    cached = open_features(str(tmp_path / "cache"), run, NAMES, dtype)
    batch = assemble(run.corpus, [[3, 0, 5], [7], [8, 1, 2], [4, 6]], 64)
    kept, live = cached(batch), LiveFeatures(run.target, NAMES)(batch)
    there = batch["places"] >= 0
    assert int(there.sum()) == sum(LENGTHS)
    for name in NAMES:
        assert kept[name].dtype == getattr(torch, dtype)
        torch.testing.assert_close(kept[name][there].float(), live[name][there], rtol=error, atol=1e-5)
        assert not kept[name][~there].any()
    at = there.flatten().nonzero()[:, 0][5:40]
    some = torch.empty(0)
    ours, theirs = (
        each.distributions(at).chunk(slice(3, 20)).log_probs(1.0, some).exp() for each in (kept, live)
    )  # fmt: skip
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=error)


def test_the_disk_it_takes_is_announced_beforehand_within_a_tenth(target_folder, make_corpus, tmp_path, capsys):
    target, _ = load_model(str(target_folder), dtype="float32", device="cpu")
    run = TrainContext(target, target, make_corpus([60] * 40), 64, "cpu")
    open_features(str(tmp_path / "cache"), run, NAMES)
    line = capsys.readouterr().err.splitlines()[0]
    assert "2,400 positions x 128 bytes" in line
    said = float(line.split(" = ")[1].split(" MiB")[0]) * 2**20
    there = sum(path.stat().st_size for path in (tmp_path / "cache").iterdir())
    assert said == pytest.approx(there, rel=0.1)


def test_without_room_on_the_disk_nothing_is_begun(run, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ValueError, match=r"the feature cache takes 0\.0. MiB, and 0\.00 MiB are free"):
        open_features(str(tmp_path / "cache"), run, NAMES)
    assert not (tmp_path / "cache" / "features.json").exists()


def test_other_weights_other_text_and_other_states_are_refused_in_one_line(run, tmp_path, make_corpus, shake):
    folder = str(tmp_path / "cache")
    open_features(folder, run, NAMES)
    others = [
        (TrainContext(shake(run.target, 0.01), run.draft, run.corpus, 64, "cpu"), NAMES, "bfloat16", "other weights"),
        (TrainContext(run.target, run.draft, make_corpus(LENGTHS, seed=1), 64, "cpu"), NAMES, "bfloat16", "other data"),
        (run, ("layer:3",), "bfloat16", "states layer:2,last, now layer:3,last"),
        (run, NAMES, "float32", "dtype bfloat16, now float32"),
    ]
    for other, names, dtype, said in others:
        with pytest.raises(ValueError, match=f"is a feature cache of something else .*{said}") as error:
            open_features(folder, other, names, dtype)
        assert "\n" not in str(error.value)


def test_a_damaged_shard_a_strange_folder_and_a_file_are_refused(run, tmp_path):
    folder = tmp_path / "cache"
    open_features(str(folder), run, NAMES)
    shard = folder / "shard-00002.bin"
    content = bytearray(shard.read_bytes())
    content[7] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"shard-00002.bin is damaged or missing"):
        open_features(str(folder), run, NAMES)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and holds no feature cache"):
        open_features(str(tmp_path / "other"), run, NAMES)
    with pytest.raises(ValueError, match="is a file: features are `live` or the folder of a cache"):
        open_features(str(tmp_path / "other" / "thesis.txt"), run, NAMES)
    with pytest.raises(ValueError, match="unknown feature 'layer:9'"):
        open_features(str(tmp_path / "new"), run, ("layer:9",))


BUILD = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
import draftsmith.train.teacher.feature_cache as format_of
format_of.SHARD_BYTES = 64 * 256
from draftsmith.infer.models.load import load_model
from draftsmith.infer.text.templates import find_template, load_tokenizer
from draftsmith.train.data.corpus import load_corpus
from draftsmith.train.drafts.exits import TrainContext
target, data, out = sys.argv[1:4]
template = find_template("chat", load_tokenizer(target))
corpus = load_corpus([data], template, max_length=128, cache=Path(out).parent / "tokens")
model, _ = load_model(target, device="cpu")
format_of.open_features(out, TrainContext(model, model, corpus, 128, "cpu"), ["layer:2"])
"""


def test_killed_it_goes_on_after_the_last_whole_shard_and_ends_the_same(
    target_folder, chats, tmp_path, monkeypatch, capsys
):
    words = [sys.executable, "-c", BUILD, str(target_folder), str(chats)]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    monkeypatch.setattr(format_of, "SHARD_BYTES", 64 * 256)

    def build_here(out):
        monkeypatch.setattr(sys, "argv", ["-c", *words[3:], str(out)])
        exec(BUILD, {})

    build_here(whole)
    process = subprocess.Popen([*words, str(killed)], stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None and not (killed / "shard-00003.bin").exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    assert json.loads((killed / "features.json").read_text())["state"] == "building"
    kept = (killed / "shard-00001.bin").stat().st_mtime_ns
    (killed / ".shard-00009.bin.1.part").write_bytes(b"half")
    capsys.readouterr()
    build_here(killed)
    assert "there already" in capsys.readouterr().err
    assert (killed / "shard-00001.bin").stat().st_mtime_ns == kept
    for path in whole.glob("*.*"):
        assert (killed / path.name).read_bytes() == path.read_bytes(), path.name
