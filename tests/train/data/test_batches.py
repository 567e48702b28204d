"""A packed row holds documents that do not know of one another, in every supported family."""

import os
import signal
import time
from pathlib import Path

import numpy as np
import processes
import pytest
import torch

from draftsmith.train.data.batches import IGNORED, MicroBatches, assemble
from draftsmith.train.data.packing import PackStream
from draftsmith.train.drafts.exits import ExitStates
from draftsmith.train.run.data_module import Batches

KINDS = ["llama", "mistral", "gemma2", "gemma3", "qwen2", "qwen3", "phi3", "mixtral", "gpt_neox", "gpt2", "opt"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_document_in_a_pack_has_the_states_that_it_has_alone(make_model, make_corpus, kind):
    corpus = make_corpus([30, 20, 7])
    draft = ExitStates(make_model(kind), [1, 2]).eval()
    packed, labels = draft(assemble(corpus, [[1, 0, 2]], 64))
    alone = [draft(assemble(corpus, [[i]], 64)) for i in (1, 0, 2)]
    assert torch.equal(labels, torch.cat([labels for _, labels in alone]))
    for exit in range(2):
        expected = torch.cat([states[exit] for states, _ in alone])
        torch.testing.assert_close(packed[exit], expected, rtol=0, atol=1e-10)


def test_labels_are_the_next_learned_token_of_the_same_document(make_corpus):
    corpus = make_corpus([4, 6])
    batch = assemble(corpus, [[0, 1]], 12)
    a, b = corpus.sample(0)[0].tolist(), corpus.sample(1)[0].tolist()
    x = IGNORED
    assert batch["labels"][0].tolist() == [x, a[2], a[3], x, x, x, b[3], b[4], b[5], x, x, x]
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 4, 5, 0, 1]
    assert int((batch["labels"] != x).sum()) == corpus.loss_counts.sum()


def micro(corpus, batch_size, size, rank=0, ranks=1):
    stream = PackStream(corpus.lengths, corpus.loss_counts, np.arange(len(corpus)), 64, 0, shuffle=True)
    return MicroBatches(corpus, stream, batch_size, size, rank, ranks)


def test_ranks_and_micro_batches_share_out_the_same_step_and_know_its_tokens(make_corpus):
    corpus = make_corpus([10 + i % 20 for i in range(100)])
    whole = micro(corpus, 8, 8)[3]
    parts = [micro(corpus, 8, 2, rank, 2)[3 * 2 + part] for part in range(2) for rank in range(2)]
    assert torch.equal(torch.cat([part["input_ids"] for part in parts]), whole["input_ids"])
    assert {int(part["loss_tokens"]) for part in parts} == {int((whole["labels"] != IGNORED).sum())}


def test_workers_do_not_change_the_order(make_corpus):
    from draftsmith.train.data.batches import BatchStream

    batches = micro(make_corpus([10 + i % 20 for i in range(100)]), 4, 2)
    plain, spread = iter(BatchStream(batches, 5, 0)), iter(BatchStream(batches, 5, 2))
    for number in range(5, 12):
        one, two = next(plain), next(spread)
        assert int(one["number"]) == int(two["number"]) == number
        assert torch.equal(one["input_ids"], two["input_ids"])


def test_held_out_batches_give_every_rank_as_many_and_each_sample_once(make_corpus):
    corpus = make_corpus([10 + i % 20 for i in range(40)])
    held = np.arange(0, 40, 3)
    data = Batches(corpus, np.arange(1, 40, 3), held, max_length=64, batch_size=2, micro_batch_size=1)
    ranks = [list(data.val_batches(rank, 3)) for rank in range(3)]
    assert len({len(batches) for batches in ranks}) == 1
    learned = sum(int((batch["labels"] != IGNORED).sum()) for batches in ranks for batch in batches)
    assert learned == corpus.loss_counts[held].sum()


LOADER = """
import multiprocessing, sys, time
from draftsmith.train.data.batches import BatchStream

multiprocessing.set_start_method(sys.argv[1], force=True)
batches = iter(BatchStream(["x" * int(sys.argv[2])] * 100, 0, 2))
next(batches)
print(*(worker.pid for worker in batches._workers), flush=True)
time.sleep(600)
"""


def runs(pid):
    """Whether the process is there, and no zombie."""
    path = Path(f"/proc/{pid}/stat")
    try:
        return path.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition, seconds):
    until = time.monotonic() + seconds
    while not condition() and time.monotonic() < until:
        time.sleep(0.05)
    return condition()


@pytest.mark.parametrize(("method", "size"), [("fork", 500_000), ("forkserver", 10)])
def test_workers_end_when_their_run_is_killed(method, size):
    """torch's own watch leaves those for ever that wait for a reader of what a pipe does not hold, and those that a
    fork server started."""
    run = processes.Started(LOADER, method, size)
    try:
        assert wait_until(lambda: run.stdout.endswith("\n"), 120), run.stderr
    finally:
        run.kill()
    workers = [int(pid) for pid in run.stdout.split()]
    assert len(workers) == 2
    try:
        assert wait_until(lambda: not any(map(runs, workers)), 10)
    finally:
        for pid in filter(runs, workers):
            os.kill(pid, signal.SIGKILL)
