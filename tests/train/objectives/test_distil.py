"""Distillation as a whole: it learns under every loss, sorted drafts too, from any teacher, and resumes exactly."""

import csv
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from draftsmith.infer.models.load import load_model
from draftsmith.recipes.cli.main import run
from draftsmith.train.data.batches import assemble
from draftsmith.train.drafts.exits import ExitStates, TrainContext
from draftsmith.train.drafts.init import init_draft
from draftsmith.train.objectives.distil import Distil
from draftsmith.train.run.config import Machine, Optim, Text, TrainConfig, Watch
from draftsmith.train.run.run import train_draft

LOSSES = ["forward_kl", "reverse_kl", "jsd", "total_variation", "sampled", "greedy", "topk", "cross_entropy"]


@pytest.fixture(scope="module")
def make_plan(target_folder, chats, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")

    def make(**changes):
        settings = {
            "target": str(target_folder), "data": [str(chats)], "num_layers": 2, "max_steps": 4,
            "watch": Watch(val_every=0, val_prompts=0, save_every=1000),
            "out": str(tmp_path_factory.mktemp("run") / "out"),
            "text": Text(max_length=128, held_out=0.2, cache=str(cache)),
            "optim": Optim(lr=1e-3, batch_size=4),
            "machine": Machine(device="cpu", precision="32-true", workers=0),
        }  # fmt: skip
        return TrainConfig(**{**settings, **changes})

    return make


def losses(out):
    with open(f"{out}/metrics.csv", newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file) if row["kind"] == "train"]


def begun(objective, target_folder, corpus, num_layers=2):
    """The objective with a target and a draft in float64, and the draft's exits."""
    target, _ = load_model(str(target_folder), dtype="float64", device="cpu")
    draft = init_draft(target, num_layers=num_layers, dtype=torch.float64)
    objective.begin(TrainContext(target, draft, corpus, 64, "cpu"))
    return target, ExitStates(draft, objective.exits(num_layers))


@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_overfits_one_batch(make_plan, name, tmp_path):
    text = Text(max_length=64, held_out=0.0, limit=1, cache=str(tmp_path))
    plan = make_plan(max_steps=80, optim=Optim(lr=1e-2, batch_size=1, warmup=0.0), text=text)
    train_draft(Distil({name: 1.0}), plan)
    found = losses(plan.out)
    # What is left at best: nothing; or what no draft has, of a target that is not sure itself.
    best = _best_covered(plan, name) if name in ("greedy", "topk") else 0.0
    assert found[-1] - best < 0.25 * (found[0] - best)


def _best_covered(plan, name):
    """The mean loss of logits that are free at every position."""
    from draftsmith.infer.text.templates import find_template, load_tokenizer
    from draftsmith.train.data.corpus import load_corpus
    from draftsmith.train.objectives.divergences import Distributions, find_divergence
    from draftsmith.train.teacher.live import LiveTeacher

    template = find_template("chat", load_tokenizer(plan.target))
    corpus = load_corpus(plan.data, template, max_length=64, cache=Path(plan.text.cache), limit=1)
    target, _ = load_model(plan.target, device="cpu")
    batch = assemble(corpus, [[i] for i in range(len(corpus))], 64)
    distributions = LiveTeacher(target)(batch).chunk(slice(None))
    logits = distributions.logits_CV.clone().requires_grad_()
    optimiser = torch.optim.Adam([logits], lr=0.1)
    for _ in range(300):
        both = Distributions(logits.detach(), distributions, torch.zeros(len(logits), dtype=torch.long))
        loss, logits.grad = find_divergence(name)(both)
        optimiser.step()
    return loss.mean().item()


def test_the_loss_is_the_mean_kl_to_the_target_over_the_learned_positions(target_folder, make_corpus):
    """Two documents in one row, each on its own in the plain computation; a mix of losses at two exits."""
    corpus = make_corpus([12, 20])
    objective = Distil({"forward_kl": 1.0, "cross_entropy": 0.5}, exits=[1, 2], exit_weights=[1, 3], temperature=2.0)
    target, draft = begun(objective, target_folder, corpus)
    sums = objective(draft, assemble(corpus, [[0, 1]], 64))
    plain = torch.zeros(2, dtype=torch.float64)
    for i in range(2):
        ids = torch.from_numpy(corpus.sample(i)[0].astype("int64"))[None]
        learned = torch.from_numpy(corpus.sample(i)[1][1:] != 0)
        theirs = torch.log_softmax(target(ids).logits[0, :-1] / 2, -1)
        with torch.no_grad():
            states = draft.model(ids, output_hidden_states=True)
            logits = [draft.head(draft.model.model.norm(states.hidden_states[1])), states.logits]
        for e in range(2):
            ours = torch.log_softmax(logits[e][0, :-1] / 2, -1)
            kl = (theirs.exp() * (theirs - ours)).sum(-1)[learned].sum()
            text = torch.nn.functional.cross_entropy(
                logits[e][0, :-1][learned], ids[0, 1:][learned], reduction="sum"
            )  # fmt: skip
            plain[e] += (kl + 0.5 * text).detach()
    torch.testing.assert_close(sums.per_exit_E, plain)
    torch.testing.assert_close(sums.total.detach(), 0.25 * plain[0] + 0.75 * plain[1])


def test_the_target_gets_no_gradient_and_is_not_changed(make_plan, target_folder):
    before = load_file(target_folder / "model.safetensors")
    corpus_plan = make_plan(max_steps=2)
    objective = Distil({"forward_kl": 1.0})
    train_draft(objective, corpus_plan)
    after = objective.read.states.model.state_dict()
    assert all(before[name].equal(after[name]) for name in before)
    assert not any(weight.requires_grad for weight in objective.read.states.parameters())


def test_a_sorted_draft_is_distilled_at_every_exit_and_loads_as_a_plain_model(make_plan):
    plan = make_plan(max_steps=40, optim=Optim(lr=1e-2, batch_size=4))
    facts = train_draft(Distil({"forward_kl": 1.0}, exits=[1, 2]), plan)
    with open(f"{plan.out}/metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["kind"] == "held_out"]
    for exit in (1, 2):
        assert float(rows[-1][f"loss_exit_{exit}"]) < 0.7 * float(rows[0][f"loss_exit_{exit}"])
    assert facts["settings"]["objective"]["losses"] == {"forward_kl": 1.0}
    model, _ = load_model(plan.out)
    assert model.config.sorted_exits == [1, 2]


def test_a_draft_goes_on_from_one_that_was_trained_before(make_plan):
    first = make_plan(max_steps=30, optim=Optim(lr=1e-2, batch_size=4))
    train_draft(Distil({"forward_kl": 1.0}), first)
    second = make_plan(max_steps=1, init=first.out, optim=Optim(lr=1e-6, batch_size=4))
    train_draft(Distil({"forward_kl": 1.0}), second)
    assert losses(second.out)[0] < 0.8 * losses(first.out)[0]
    with pytest.raises(ValueError, match="num_hidden_layers 2, not 1: a trained draft keeps its shape"):
        train_draft(Distil({"forward_kl": 1.0}), make_plan(num_layers=1, init=first.out))


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"losses": {}}, "give at least one"),
        ({"losses": {"kl": 1.0}}, "unknown loss 'kl'"),
        ({"losses": {"jsd": -1.0}}, "not negative"),
        (
            {"losses": {"jsd": 1.0}, "temperature": 0.0},
            "jsd compares distributions, which temperature 0",
        ),
        ({"losses": {"topk": 1.0}, "tree_top_k": 0}, "top_k 0 < 1"),
        ({"losses": {"jsd": 1.0}, "on_policy": 1.5}, "on_policy is 1.5"),
        ({"losses": {"jsd": 1.0}, "on_policy": 0.5, "teacher": "cache"}, "on-policy answers need a live teacher"),
        ({"losses": {"jsd": 1.0}, "exit_weights": [1.0]}, "without exits"),
    ],
)
def test_what_does_not_fit_together_is_refused_in_one_line(options, told):
    with pytest.raises(ValueError, match=told) as error:
        Distil(**options)
    assert "\n" not in str(error.value)


def test_a_teacher_with_another_vocabulary_is_refused(target_folder, make_corpus, make_model):
    corpus = make_corpus([12])
    target, _ = load_model(str(target_folder), device="cpu")
    with pytest.raises(ValueError, match="the teacher's vocabulary has 262 tokens, the draft's 61"):
        Distil({"jsd": 1.0}).begin(TrainContext(target, make_model("llama"), corpus, 64, "cpu"))


def command(target, data, out, *more):
    words = [
        sys.executable, "-m", "draftsmith.recipes", "train", "distil", "--target", target, "--data", data, "--out", out,
        "--num_layers", "2", "--exits", "[1, 2]", "--max_steps", "16", "--text.max_length", "128",
        "--text.held_out", "0.2", "--text.cache", Path(out).parent / "cache", "--optim.batch_size", "4",
        "--optim.micro_batch_size", "2", "--optim.lr", "1e-3", "--machine.workers", "0", "--machine.precision",
        "32-true", "--machine.device", "cpu", "--watch.save_every", "2", "--watch.val_every", "0",
        "--watch.val_prompts", "0", *more,
    ]  # fmt: skip
    return list(map(str, words))


@pytest.mark.slow
def test_two_processes_with_one_cache_train_to_the_losses_of_one_process(target_folder, chats, tmp_path):
    more = ["--teacher", tmp_path / "teacher", "--max_steps", "6", "--optim.micro_batch_size", "0"]
    one, two = tmp_path / "on-1", tmp_path / "on-2"
    assert run(command(target_folder, chats, one, *more)[3:]) == 0
    words = command(target_folder, chats, two, *more, "--devices", 2)
    done = subprocess.run(words, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert losses(two) == pytest.approx(losses(one), rel=1e-5)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--preset", "wide-3"], "give either --num_layers or --preset"),
        (
            ["--on_policy", "0.5", "--strategy", "fsdp"],
            "the objective Distil decodes with the whole draft, and fsdp shards it: use ddp",
        ),
        (["--losses", '{"kl": 1}'], "unknown loss 'kl'"),
        (["--teacher", "run.json"], "run.json is a file"),
    ],
)
def test_wrong_options_are_one_line_and_exit_code_2(more, told, target_folder, chats, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.json").write_text("{}")
    assert run(command(target_folder, chats, tmp_path / "out", *more)[3:]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert told in last
    assert not (tmp_path / "out" / "run.json").exists()


@pytest.mark.slow
def test_killed_with_on_policy_answers_it_ends_as_if_it_had_not_been(target_folder, chats, tmp_path, capsys):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    more = ["--losses", json.dumps({"forward_kl": 0.5, "sampled": 0.5}), "--on_policy", "0.5"]
    assert run(command(target_folder, chats, whole, *more)[3:]) == 0
    words = command(target_folder, chats, killed, *more)
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 120
    metrics = killed / "metrics.csv"
    while time.monotonic() < until and process.poll() is None:
        if metrics.exists() and metrics.read_text().count(",train,") >= 7:
            break
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, "it ended before it could be killed"
    capsys.readouterr()
    assert run(words[3:]) == 0
    assert "resuming from" in capsys.readouterr().err
    assert losses(killed) == losses(whole)
    ours, theirs = load_file(killed / "model.safetensors"), load_file(whole / "model.safetensors")
    assert all(ours[name].equal(theirs[name]) for name in theirs)
