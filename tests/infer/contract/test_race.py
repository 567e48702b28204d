"""The race: its noise is a function of seed, row and position, its winner a draw, and positions are independent."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from itertools import product

import pytest
import torch
from planted import plant

import draftsmith.infer.contract.distribution as distribution_module
import draftsmith.infer.contract.race as race_module
from draftsmith.infer.contract.distribution import NodeDistribution
from draftsmith.infer.contract.draft import ROOT, Draft
from draftsmith.infer.contract.race import RaceNoise, first, race_noise
from draftsmith.infer.contract.row import Row
from draftsmith.infer.contract.sampling import Settings

CPU = torch.device("cpu")
PROBS = [0.45, 0.3, 0.2, 0.05, 0.0]
LOGITS_V = torch.tensor(PROBS, dtype=torch.float64).log()


def chi_square_limit(freedom: int) -> float:
    """The 99.9th percentile (Wilson and Hilferty)."""
    return freedom * (1 - 2 / (9 * freedom) + 3.09 * (2 / (9 * freedom)) ** 0.5) ** 3


def pair_statistic(draw: Callable[[str, int], int], count: int = 4000) -> tuple[float, int]:
    """Chi-square of the pairs of tokens at two positions of `count` rows, and its degrees of freedom."""
    seen = Counter((draw(str(row), 7), draw(str(row), 8)) for row in range(count))
    pairs = {(a, b): PROBS[a] * PROBS[b] * count for a, b in product(range(4), repeat=2)}
    assert set(seen) <= set(pairs), "a token without probability won"
    return sum((seen[pair] - wanted) ** 2 / wanted for pair, wanted in pairs.items()), len(pairs) - 1


def test_the_winners_at_two_positions_are_independent_draws() -> None:
    statistic, freedom = pair_statistic(lambda row, position: first(LOGITS_V, 3, row, position))
    assert statistic < chi_square_limit(freedom)


def test_planted_noise_of_another_position_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(race_module, "NOISE", RaceNoise())
    plant(monkeypatch, RaceNoise, "at", "key(seed, row, position,", "key(seed, row, position // 2 * 0,")
    statistic, freedom = pair_statistic(lambda row, position: first(LOGITS_V, 3, row, position))
    assert statistic > 5 * chi_square_limit(freedom)


def test_noise_depends_on_seed_row_and_position_alone() -> None:
    noise_V = race_noise(1, "a", 5, 40, CPU)
    others = [race_noise(2, "a", 5, 40, CPU), race_noise(1, "b", 5, 40, CPU), race_noise(1, "a", 6, 40, CPU)]
    assert not any(torch.equal(noise_V, other) for other in others)
    assert torch.equal(RaceNoise().at(1, "a", 5, 40, CPU), noise_V)


def test_noise_is_the_same_in_another_process_with_more_threads() -> None:
    code = (
        "import torch; torch.set_num_threads(2); from draftsmith.infer.contract.race import race_noise; "
        "print(race_noise(1, 'a', 5, 70_000, torch.device('cpu')).numpy().tobytes().hex()[-4000:])"
    )
    theirs = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    assert theirs == race_noise(1, "a", 5, 70_000, CPU).numpy().tobytes().hex()[-4000:]


def test_the_newest_noise_is_kept_within_a_bound() -> None:
    kept = RaceNoise(most_bytes=3 * 80)
    found = [kept.at(0, "r", position, 10, CPU) for position in range(5)]
    assert kept.kept_bytes == 3 * 80
    assert kept.at(0, "r", 4, 10, CPU) is found[4]
    again = kept.at(0, "r", 0, 10, CPU)
    assert again is not found[0]
    assert torch.equal(again, found[0])
    assert torch.equal(kept.at(0, "r", 9, 1000, CPU), RaceNoise().at(0, "r", 9, 1000, CPU)), "larger than the bound"


def test_a_nodes_draw_is_that_of_its_position_whatever_was_drafted() -> None:
    logits_NV = torch.randn(4, 50, generator=torch.Generator().manual_seed(1))
    settings = Settings(temperature=0.7, seed=5)

    def drawn(ids: list[int], draft: Draft, node: int) -> int:
        return NodeDistribution(logits_NV[[0, 3, 3, 3]], Row("r", ids, settings), draft, None).draw(node)

    below = drawn([1, 2], Draft().chain([3, 4], "t"), 1)
    assert below == NodeDistribution(logits_NV[[3]], Row("r", [1, 2, 3, 4], settings), Draft(), None).draw(ROOT)
    draws = {drawn([1] * length, Draft(), ROOT) for length in range(2, 40)}
    assert len(draws) > 5


def test_planted_noise_by_depth_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, NodeDistribution, "draw", "len(self._row.ids) + len(", "len(")
    assert distribution_module.NodeDistribution is NodeDistribution
    with pytest.raises(AssertionError):
        test_a_nodes_draw_is_that_of_its_position_whatever_was_drafted()
