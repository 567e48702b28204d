"""Pooled probabilities: sane before anything was seen, and right once enough was."""

from __future__ import annotations

import numpy as np
import pytest

from draftsmith.infer.drafters.mixed.pool import Naming, Pool


def test_agreement_counts_for_a_token_and_a_miss_against_it() -> None:
    pool = Pool(2)
    both = pool.probability(pool.misses({0: 0.3, 1: 0.3}), {0: Naming(0, 0.6, "a"), 1: Naming(0, 0.6, "b")})
    missed = pool.probability(pool.misses({0: 0.3, 1: 0.3}), {0: Naming(0, 0.6, "a")})
    missed_by_a_sure_one = pool.probability(pool.misses({0: 0.3, 1: 0.01}), {0: Naming(0, 0.6, "a")})
    assert 0.6 < both < 0.9
    assert missed_by_a_sure_one < missed < 0.6


def test_the_rates_of_what_was_seen_are_learned() -> None:
    """Source 0 says 0.9 and is right in a third of its cases, unless source 1 agrees: then always."""
    random = np.random.default_rng(0)
    pool = Pool(2)
    agreed = {0: Naming(0, 0.9, "a"), 1: Naming(0, 0.2, "b")}
    alone = {0: Naming(0, 0.9, "a")}
    for _ in range(400):
        for named, rate in ((agreed, 0.97), (alone, 0.33)):
            pool.observe({0: 0.1, 1: 0.8}, named, bool(random.random() < rate))
        pool.refit()
    assert pool.probability(pool.misses({0: 0.1, 1: 0.8}), agreed) == pytest.approx(0.97, abs=0.08)
    assert pool.probability(pool.misses({0: 0.1, 1: 0.8}), alone) == pytest.approx(0.33, abs=0.1)


def test_refitting_without_observations_changes_nothing_and_is_reproducible() -> None:
    one, other = Pool(3), Pool(3)
    before = one.weights_F.copy()
    one.refit()
    assert (one.weights_F == before).all()
    for pool in (one, other):
        pool.observe({0: 0.5, 2: 0.0}, {2: Naming(7, 1.0, "c")}, False)
        pool.refit()
    assert (one.weights_F == other.weights_F).all()
    assert (one.weights_F != before).any()
