"""Training split over ranks, FSDP over gloo: losses, weights and folder are those of one rank; each holds a part."""

import csv
import json
import signal
import socket
import time

import processes
import pytest
import torch
from safetensors.torch import load_file

from draftsmith.recipes.cli import main
from draftsmith.train.run.sharding import put_weights

# `draftsmith WORDS`, which says after each step what share of all numbers its rank holds.
SHARES = """
import json
from torch import Tensor
from draftsmith.recipes.cli.main import main
from draftsmith.train.run.callbacks import AtSteps
from draftsmith.train.run.sharding import own_part

def share(tensors):
    tensors = list(tensors)
    return sum(own_part(each).numel() for each in tensors) / max(sum(each.numel() for each in tensors), 1)

end = AtSteps._end_step

def noted(self, trainer, module, batch):
    end(self, trainer, module, batch)
    (optimiser,) = trainer.optimizers
    trained = [weight for weight in module.draft.parameters() if weight.requires_grad]
    read = getattr(module.objective, "read", None)
    target = getattr(read, "model", None) or getattr(getattr(read, "states", None), "model", None)
    found = {
        "weights": share(module.draft.parameters()), "gradients": share(weight.grad for weight in trained),
        "states": share(each for states in optimiser.state.values() for each in states.values()
                        if isinstance(each, Tensor) and each.ndim),
        "layers of the target": share(target.model.layers.parameters()) if target else None,
    }
    print(json.dumps(found), flush=True)

AtSteps._end_step = noted
main()
"""
SMALL = ["--num_layers", "2", "--exits", "[1, 2]"]
KINDS = {
    "distil": ["distil", *SMALL],
    "eagle": ["eagle", "--unrolls", "2", "--noise", "0.2"],  # with Muon, which needs whole matrices
    "soft": ["soft", *SMALL, "--machine.gradient_checkpointing", "true", "--machine.compile", "false"],
    "sft": ["sft", "--num_layers", "2", "--lora_rank", "4"],
    "medusa": ["medusa", "--num_heads", "3"],
    "hydra": ["hydra", "--num_heads", "3", "--prefix", "true", "--dropout", "0.1"],
}


def command(kind, target, data, out, *more):
    words = [
        "train", *kind, "--target", target, "--data", data, "--out", out, "--max_steps", "4", "--text.max_length",
        "128", "--text.held_out", "0.2", "--text.cache", out.parent / "cache", "--optim.batch_size", "4", "--optim.lr",
        "1e-3", "--optim.micro_batch_size", "1", "--machine.workers", "0", "--machine.precision", "32-true",
        "--machine.device", "cpu", "--watch.val_every", "2", "--watch.val_prompts", "0", *more,
    ]  # fmt: skip
    return list(map(str, words))


def start(count, words, program=processes.COMMAND):
    """The ranks, begun as a launcher begins them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "GLOO_SOCKET_IFNAME": "lo"}
    where |= {"WORLD_SIZE": str(count), "NODE_RANK": "0"}
    words = [*words, "--devices", str(count)]
    return [processes.Started(program, *words, env={**where, "LOCAL_RANK": str(rank)}) for rank in range(count)]


def ended(ranks):
    """Their exit codes; none is left."""
    try:
        return [rank.wait() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()


def losses(out):
    with (out / "metrics.csv").open(newline="") as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def check_equal(ours, theirs):
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-5)
    names = sorted(path.name for path in theirs.iterdir())
    assert sorted(path.name for path in ours.iterdir()) == names
    (file,) = (name for name in names if name.endswith(".safetensors"))
    mine, other = load_file(ours / file), load_file(theirs / file)
    assert mine.keys() == other.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], other[name], rtol=1e-4, atol=1e-5)
    for name in ("config.json", "draftsmith.json"):
        assert (ours / name).exists() == (theirs / name).exists()
        assert not (ours / name).exists() or json.loads((ours / name).read_text()) == json.loads(
            (theirs / name).read_text()
        )


@pytest.mark.parametrize("kind", ["distil", "eagle", *(pytest.param(kind, marks=pytest.mark.slow)
                                                      for kind in ("soft", "sft", "medusa", "hydra"))])  # fmt: skip
def test_two_ranks_with_half_of_everything_train_to_the_model_of_one(kind, target_folder, chats, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert main.run(command(KINDS[kind], target_folder, chats, one)) == 0
    ranks = start(2, command(KINDS[kind], target_folder, chats, two, "--strategy", "fsdp"), SHARES)
    assert ended(ranks) == [0, 0], [rank.stderr for rank in ranks]
    check_equal(two, one)
    for rank in ranks:
        found = [json.loads(line) for line in rank.stdout.splitlines() if line.startswith('{"weights"')]
        assert len(found) == 4
        for shares in found:
            held = [share for share in shares.values() if share is not None]
            assert len(held) == (3 if kind in ("soft", "sft") else 4)
            assert all(0.4 < share < 0.6 for share in held), shares


@pytest.mark.slow
def test_under_ddp_each_rank_holds_everything(target_folder, chats, tmp_path):
    ranks = start(2, command(KINDS["distil"], target_folder, chats, tmp_path / "out", "--strategy", "ddp"), SHARES)
    assert ended(ranks) == [0, 0], [rank.stderr for rank in ranks]
    found = [json.loads(line) for line in ranks[0].stdout.splitlines() if line.startswith('{"weights"')]
    assert {share for shares in found for share in shares.values()} == {1.0}


def steps(out):
    path = out / "metrics.csv"
    return path.read_text().count(",train,") if path.exists() else 0


@pytest.mark.parametrize("on", [1, pytest.param(4, marks=pytest.mark.slow)])
def test_stopped_on_two_ranks_it_resumes_on_another_number(on, target_folder, chats, tmp_path):
    """From shards that other ranks wrote, with the optimiser's states."""
    one, out = tmp_path / "one", tmp_path / "out"
    long = ["--max_steps", "24", "--watch.val_every", "0"]
    assert main.run(command(KINDS["soft"], target_folder, chats, one, *long)) == 0
    words = command(KINDS["soft"], target_folder, chats, out, *long, "--strategy", "fsdp")
    ranks = start(2, words)
    until = time.monotonic() + 120
    while steps(out) < 3 and ranks[0].poll() is None and time.monotonic() < until:
        time.sleep(0.01)
    for rank in ranks:
        rank.send_signal(signal.SIGTERM)
    assert ended(ranks) == [143, 143], [rank.stderr for rank in ranks]
    (state,) = (out / "resume").iterdir()
    assert sum(path.suffix == ".distcp" for path in state.iterdir()) == 2
    assert 3 <= int(state.stem.removeprefix("step-")) < 24

    ranks = start(on, words)
    assert ended(ranks) == [0] * on, [rank.stderr for rank in ranks]
    assert f"resuming from {state.name}" in ranks[0].stderr
    check_equal(out, one)


@pytest.mark.slow
def test_shards_that_do_not_fit_on_the_disk_are_one_line(target_folder, chats, tmp_path):
    out = tmp_path / "out"
    words = command(KINDS["soft"], target_folder, chats, out, "--watch.save_every", "2", "--strategy", "fsdp")
    limited = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))\n" + processes.COMMAND
    ranks = start(2, words, limited)
    assert ended(ranks) == [2, 2], [rank.stderr for rank in ranks]
    (line,) = [line for line in ranks[0].stderr.splitlines() if line.startswith("draftsmith train")]
    assert "the checkpoint of step 2 could not be written (File too large); there is no earlier one" in line
    assert "Traceback" not in ranks[0].stderr + ranks[1].stderr
    assert list((out / "resume").iterdir()) == []


def test_gathered_weights_take_the_place_of_what_was_there_and_tied_ones_stay_tied():
    module = torch.nn.Sequential(torch.nn.Embedding(4, 2), torch.nn.Linear(2, 4, bias=False), torch.nn.LayerNorm(2))
    module[1].weight = module[0].weight
    module[2].weight.requires_grad_(False)
    module.register_buffer("scale", torch.ones(1))
    gathered = {name: torch.full_like(value, 7.0) for name, value in module.state_dict().items()}
    put_weights(module, gathered)
    assert module[1].weight is module[0].weight
    assert [weight.requires_grad for weight in module.parameters()] == [True, False, True]
    assert all(bool((weight == 7).all()) for weight in module.parameters())
    assert bool((module.scale == 1).all())
