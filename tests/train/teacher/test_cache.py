"""A teacher on disk: what it holds and takes, that a kill does not hurt it, and what does not fit is refused."""

import json
import shutil
import signal
import sys
import time

import numpy as np
import processes
import pytest
import torch

import draftsmith.train.teacher.cache as format_of
from draftsmith.infer.models.load import load_model
from draftsmith.train.data.batches import assemble
from draftsmith.train.drafts.exits import ExitStates, TrainContext
from draftsmith.train.drafts.init import init_draft
from draftsmith.train.objectives.distil import Distil
from draftsmith.train.objectives.divergences import Distributions
from draftsmith.train.teacher.cache_build import open_or_build
from draftsmith.train.teacher.live import LiveTeacher

LENGTHS = [12, 20, 9, 33, 15, 8, 24, 40, 11]


@pytest.fixture
def run(target_folder, make_corpus, monkeypatch):
    """Small shards, so that samples lie across their borders."""
    monkeypatch.setattr(format_of, "SHARD_POSITIONS", 16)
    target, _ = load_model(str(target_folder), dtype="float32", device="cpu")
    draft = init_draft(target, num_layers=2)
    return TrainContext(target, draft, make_corpus(LENGTHS), 64, "cpu")


def folder_bytes(folder):
    return sum(path.stat().st_size for path in folder.iterdir())


def test_it_holds_the_live_distributions_likeliest_tokens_and_the_rest_of_their_mass(run, tmp_path):
    cached = open_or_build(str(tmp_path / "cache"), run, top_k=8, temperature=1.0)
    batch = assemble(run.corpus, [[3, 0, 5], [7], [8, 1]], 64)
    live = LiveTeacher(run.target)(batch)
    some = torch.log_softmax(torch.randn(int((batch["labels"] >= 0).sum()), 262), -1)
    kept = cached(batch).chunk(slice(None)).log_probs(1.0, some).exp()
    whole = live.chunk(slice(None)).log_probs(1.0, some).exp()
    top = torch.topk(whole, 8, dim=-1)
    assert torch.equal(cached(batch).chunk(slice(None)).choice(), whole.argmax(-1))
    torch.testing.assert_close(kept.gather(1, top.indices), top.values, rtol=2e-3, atol=1e-6)
    torch.testing.assert_close(kept.sum(-1), torch.ones(len(kept)))
    # The rest lies as in the draft.
    rest = kept.scatter(1, top.indices, 0.0)
    shape = some.exp().scatter(1, top.indices, 0.0)
    torch.testing.assert_close(rest / rest.sum(-1, keepdim=True), shape / shape.sum(-1, keepdim=True))


@pytest.mark.parametrize("name", ["forward_kl", "reverse_kl", "jsd", "total_variation", "sampled"])
def test_losses_and_slopes_are_those_of_distributions_whose_other_tokens_are_one(name):
    """Against float64 autograd on K + 1 outcomes, the rest being one of them."""
    from draftsmith.train.objectives.divergences import find_divergence
    from draftsmith.train.teacher.cache import CachedChunk

    generator = torch.Generator().manual_seed(0)
    logits, theirs = (2 * torch.randn(6, 20, generator=generator, dtype=torch.float64) for _ in range(2))
    target = torch.softmax(theirs, -1)
    top = torch.topk(target, 5, dim=-1)
    tail = target.scatter(1, top.indices, 0.0).sum(-1, keepdim=True)
    chunk = CachedChunk(top.indices, top.values.log(), tail.log(), 1.0)
    loss, slope = find_divergence(name)(Distributions(logits, chunk, torch.zeros(6, dtype=torch.long)))

    leaf = logits.clone().requires_grad_()
    draft = torch.softmax(leaf, -1)
    rest = draft.scatter(1, top.indices, 0.0).sum(-1, keepdim=True)
    q, p = torch.cat([draft.gather(1, top.indices), rest], -1), torch.cat([top.values, tail], -1)
    mean = (p + q) / 2
    plain = {
        "forward_kl": lambda: (p * (p / q).log()).sum(-1),
        "reverse_kl": lambda: (q * (q / p).log()).sum(-1),
        "jsd": lambda: 0.5 * (p * (p / mean).log() + q * (q / mean).log()).sum(-1),
        "total_variation": lambda: 1 - torch.minimum(p, q).sum(-1),
        "sampled": lambda: -torch.minimum(p, q).sum(-1).log(),
    }[name]()
    torch.testing.assert_close(loss, plain.detach())
    torch.testing.assert_close(slope, torch.autograd.grad(plain.sum(), leaf)[0])


def test_with_nearly_all_tokens_kept_the_objective_is_the_live_one(run, tmp_path):
    draft = ExitStates(run.draft, [1, 2])
    batch = assemble(run.corpus, [[3, 0], [7]], 64)
    found = []
    for options in ({}, {"teacher": str(tmp_path / "cache"), "teacher_top_k": 261}):
        objective = Distil({"forward_kl": 1.0, "topk": 1.0}, exits=[1, 2], **options)
        objective.begin(run)
        sums = objective(draft, batch)
        gradient = torch.autograd.grad(sums.total, run.draft.lm_head.weight)[0]
        found.append((sums.per_exit_E, gradient))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-2, atol=1e-3)


def test_the_disk_it_takes_is_told_beforehand_within_a_tenth(target_folder, make_corpus, tmp_path, capsys):
    target, _ = load_model(str(target_folder), dtype="float32", device="cpu")
    run = TrainContext(target, init_draft(target, num_layers=1), make_corpus([60] * 40), 64, "cpu")
    open_or_build(str(tmp_path / "cache"), run, top_k=32, temperature=1.0)
    line = capsys.readouterr().err.splitlines()[0]
    told = float(line.split(" = ")[1].split(" MiB")[0]) * 2**20
    assert told == pytest.approx(folder_bytes(tmp_path / "cache"), rel=0.1)


def test_without_room_on_the_disk_nothing_is_begun(run, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ValueError, match=r"the teacher cache takes 0\.0. MiB, and 0\.00 MiB are free"):
        open_or_build(str(tmp_path / "cache"), run, top_k=8, temperature=1.0)
    assert not (tmp_path / "cache" / "teacher.json").exists()


def test_other_weights_other_text_and_other_settings_are_refused_in_one_line(run, tmp_path, make_corpus, shake):
    folder = str(tmp_path / "cache")
    open_or_build(folder, run, top_k=8, temperature=1.0)
    others = [
        (TrainContext(shake(run.target, 0.01), run.draft, run.corpus, 64, "cpu"), 8, 1.0, "other weights"),
        (TrainContext(run.target, run.draft, make_corpus(LENGTHS, seed=1), 64, "cpu"), 8, 1.0, "other data"),
        (run, 9, 1.0, "top_k 8, now 9"),
        (run, 8, 0.7, "temperature 1.0, now 0.7"),
    ]
    for other, top_k, temperature, told in others:
        with pytest.raises(ValueError, match=f"is a teacher cache of something else .*{told}") as error:
            open_or_build(folder, other, top_k=top_k, temperature=temperature)
        assert "\n" not in str(error.value)


def test_a_damaged_shard_a_strange_folder_and_a_file_are_refused(run, tmp_path):
    folder = tmp_path / "cache"
    open_or_build(str(folder), run, top_k=8, temperature=1.0)
    shard = folder / "shard-00002.bin"
    content = bytearray(shard.read_bytes())
    content[7] ^= 1
    shard.write_bytes(content)
    with pytest.raises(ValueError, match=r"shard-00002.bin is damaged or missing"):
        open_or_build(str(folder), run, top_k=8, temperature=1.0)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    with pytest.raises(ValueError, match="not empty and holds no teacher cache"):
        open_or_build(str(tmp_path / "other"), run, top_k=8, temperature=1.0)
    with pytest.raises(ValueError, match="is a file"):
        open_or_build(str(tmp_path / "other" / "thesis.txt"), run, top_k=8, temperature=1.0)
    with pytest.raises(ValueError, match="1 to 261 of this vocabulary"):
        open_or_build(str(tmp_path / "new"), run, top_k=262, temperature=1.0)


BUILD = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
import draftsmith.train.teacher.cache as format_of
format_of.SHARD_POSITIONS = 128
import draftsmith.train.teacher.cache_build as build
from draftsmith.infer.models.load import load_model
from draftsmith.infer.text.templates import find_template, load_tokenizer
from draftsmith.train.data.corpus import load_corpus
from draftsmith.train.drafts.exits import TrainContext
target, data, out = sys.argv[1:4]
template = find_template("chat", load_tokenizer(target))
corpus = load_corpus([data], template, max_length=128, cache=Path(out).parent / "tokens")
model, _ = load_model(target, device="cpu")
build.open_or_build(out, TrainContext(model, model, corpus, 128, "cpu"), top_k=16, temperature=1.0)
"""


def test_killed_it_goes_on_after_the_last_whole_shard_and_ends_the_same(
    target_folder, chats, tmp_path, monkeypatch, capsys
):
    words = [str(target_folder), str(chats)]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    monkeypatch.setattr(format_of, "SHARD_POSITIONS", 128)

    def build_here(out):
        monkeypatch.setattr(sys, "argv", ["-c", *words, str(out)])
        exec(BUILD, {})

    build_here(whole)
    process = processes.Started(BUILD, *words, killed)
    until = time.monotonic() + 120
    while time.monotonic() < until and process.poll() is None and not (killed / "shard-00003.bin").exists():
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it could be killed"
    assert json.loads((killed / "teacher.json").read_text())["state"] == "building"
    kept = (killed / "shard-00001.bin").stat().st_mtime_ns
    (killed / ".shard-00009.bin.1.part").write_bytes(b"half")
    capsys.readouterr()
    build_here(killed)
    assert "there already" in capsys.readouterr().err
    assert (killed / "shard-00001.bin").stat().st_mtime_ns == kept
    for path in whole.glob("*.*"):
        assert (killed / path.name).read_bytes() == path.read_bytes(), path.name


def test_positions_are_counted_as_batches_label_them(make_corpus):
    corpus = make_corpus(LENGTHS)
    before = format_of.learned_positions(corpus)
    batch = assemble(corpus, [[i] for i in range(len(LENGTHS))], 64)
    places = batch["places"][batch["labels"] >= 0].numpy()
    assert before[places].tolist() == list(range(int(np.sum(corpus.loss_counts))))
