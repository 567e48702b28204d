"""Every sample once an epoch, no row too full, rows nearly full, and any pack known without the ones before it."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from draftsmith.train.data.packing import PackStream, pack


@given(st.lists(st.integers(1, 50), max_size=60), st.integers(50, 120), st.randoms(use_true_random=False))
def test_every_sample_is_packed_once_and_no_pack_is_too_full(lengths, capacity, random):
    order = list(range(len(lengths)))
    random.shuffle(order)
    packs = pack(np.array(lengths, dtype=np.int64), capacity, np.array(order, dtype=np.int64))
    assert sorted(i for samples in packs for i in samples) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in samples) <= capacity for samples in packs)


def stream(count=300, seed=3):
    lengths = np.random.default_rng(1).integers(5, 90, count)
    return PackStream(lengths, lengths - 1, np.arange(0, count, 2), 128, seed, shuffle=True), lengths


def test_an_epoch_holds_every_chosen_sample_once_and_epochs_differ():
    packs, _ = stream()
    size = packs.packs_in(1)
    first = [packs.pack(i) for i in range(size)]
    second = [packs.pack(i) for i in range(size, packs.packs_in(2))]
    for epoch in (first, second):
        assert sorted(i for samples in epoch for i in samples) == list(range(0, 300, 2))
    assert first != second
    assert packs.filled() > 0.95


def test_a_pack_is_the_same_whatever_was_asked_before():
    forward, _ = stream()
    seen = [forward.pack(i) for i in range(forward.packs_in(3))]
    jumped, _ = stream()
    for i in (len(seen) - 1, 0, len(seen) // 2):
        assert jumped.pack(i) == seen[i]
    assert stream(seed=4)[0].pack(0) != seen[0]


def test_loss_tokens_are_those_of_the_packs_samples():
    packs, lengths = stream()
    assert packs.loss_tokens(7) == sum(lengths[i] - 1 for i in packs.pack(7))
