"""The chunked loss and all its gradients against a plain float64 loop; its memory against one exit's."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from draftsmith.infer.models.layers import shaped_logits
from draftsmith.train.objectives.chunked_loss import chunked_cross_entropy


def problem(exits=3, positions=11, width=6, vocab=17, bias=False, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    head = nn.Linear(width, vocab, bias=bias, dtype=dtype)
    with torch.no_grad():
        for weight in head.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    states = [torch.randn(positions, width, generator=generator).to(dtype).requires_grad_() for _ in range(exits)]
    return states, head, torch.randint(0, vocab, (positions,), generator=generator)


@pytest.mark.parametrize("chunk", [17, 17 * 4, 17 * 100])
@pytest.mark.parametrize(("bias", "scale", "softcap"), [(False, 1.0, 0.0), (True, 0.5, 0.0), (True, 2.0, 3.0)])
def test_loss_and_gradients_equal_a_plain_loop(chunk, bias, scale, softcap):
    states, head, labels = problem(bias=bias)
    weights = [0.2, 0.5, 0.3]
    total, sums, _ = chunked_cross_entropy(
        states, head, labels, weights, scale=scale, softcap=softcap, chunk_entries=chunk
    )
    leaves = [*states, *head.parameters()]
    ours = torch.autograd.grad(total * 0.37, leaves)
    plain = []
    for state in states:
        loss = torch.zeros((), dtype=torch.float64)
        for i, label in enumerate(labels):
            loss = loss - torch.log_softmax(shaped_logits(head(state[i]), scale, softcap), -1)[label]
        plain.append(loss)
    theirs = torch.autograd.grad(sum(w * loss for w, loss in zip(weights, plain)) * 0.37, leaves)
    torch.testing.assert_close(sums, torch.stack(plain).detach())
    for mine, naive in zip(ours, theirs):
        torch.testing.assert_close(mine, naive)


def test_a_frozen_head_gets_no_gradient_and_the_states_get_theirs():
    states, head, labels = problem()
    free = torch.autograd.grad(chunked_cross_entropy(states, head, labels, [1, 1, 1])[0], states)
    head.requires_grad_(False)
    kept = torch.autograd.grad(chunked_cross_entropy(states, head, labels, [1, 1, 1])[0], states)
    assert all(torch.equal(a, b) for a, b in zip(free, kept))


def test_a_batch_without_labels_costs_nothing_and_has_a_gradient_of_zero():
    states, head, labels = problem(positions=0)
    total, sums, _ = chunked_cross_entropy(states, head, labels, [1, 1, 1])
    total.backward()
    assert total.item() == 0
    assert sums.tolist() == [0, 0, 0]
    assert not head.weight.grad.any()


def test_under_autocast_products_are_bfloat16_and_sums_float32():
    states, head, labels = problem(dtype=torch.float32, positions=300, width=32)
    exact, _, _ = chunked_cross_entropy(states, head, labels, [1, 0, 0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rough, sums, _ = chunked_cross_entropy(states, head, labels, [1, 0, 0])
    assert sums.dtype == torch.float32
    assert 0 < abs(rough.item() / exact.item() - 1) < 0.01


# The high-water mark of this process alone: getrusage's is inherited from the process that started it.
PEAK = """
import sys, torch
from draftsmith.train.objectives.chunked_loss import chunked_cross_entropy
exits, vocab = int(sys.argv[1]), int(sys.argv[2])
def megabytes(name):
    (line,) = (line for line in open("/proc/self/status") if line.startswith(name))
    return int(line.split()[1]) / 1024
head = torch.nn.Linear(128, vocab, bias=False)
states = [torch.randn(2048, 128, requires_grad=True) for _ in range(exits)]
labels = torch.randint(0, vocab, (2048,))
open("/proc/self/clear_refs", "w").write("5")
before = megabytes("VmRSS")
chunked_cross_entropy(states, head, labels, [1 / exits] * exits)[0].backward()
print(megabytes("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's high-water mark")
@pytest.mark.parametrize("vocab", [32_000, pytest.param(128_000, marks=pytest.mark.slow)])
def test_three_exits_take_at_most_1_3_times_the_memory_of_one(vocab):
    def peak(exits):
        words = [sys.executable, "-c", PEAK, str(exits), str(vocab)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=300, check=True)
        return float(done.stdout)

    one, three = peak(1), peak(3)
    assert one > 64  # MiB of one chunk: the measurement sees it
    assert three <= 1.3 * one
