"""A 70B target over devices, and large stores, on paper."""

import json

import pytest

from draftsmith.recipes.studies import run_study
from draftsmith.recipes.studies.devices.on_paper import on_paper, rest_store, target_over

# Llama 3 70B has 70.55 billion weights, 1.05 billion of them each in its embedding and its output head.
WHOLE, TABLE = 141.1, 2.1


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_each_device_holds_its_share_of_the_layers_and_both_tables(ranks: int) -> None:
    one = target_over(ranks, "h100", 20.0, 4096, [8, 60])
    assert one["weights_gb"] == pytest.approx((WHOLE - 2 * TABLE) / ranks + 2 * TABLE, rel=0.005)
    assert one["fits"] == (ranks == 4)
    assert one["cache_mb_per_1k_tokens"] == pytest.approx(327.68 / ranks)
    # Nothing is faster than reading the weights that a pass needs.
    assert one["pass_ms"][1] > (one["weights_gb"] - TABLE) / 3350 * 1e3
    assert 1 <= one["times_one_token"][8] <= one["times_one_token"][60] < 1.1


def test_exchanges_are_what_more_devices_do_not_share() -> None:
    slow, fast = (target_over(4, "h100", exchange, 4096, [8]) for exchange in (40.0, 20.0))
    assert slow["pass_ms"][1] - fast["pass_ms"][1] == pytest.approx(160 * 0.02)
    assert target_over(1, "h100", 40.0, 4096, [8])["exchanges_ms"] == 0


def test_a_sparse_store_is_searched_segment_by_segment() -> None:
    one = rest_store(100e6, 5.78, 0.239, 16e6, 40.0)
    assert one["store_gb"] == pytest.approx(0.578)
    assert one["propose_ms"] == pytest.approx(0.25)
    assert one["build_core_hours"] * 3600 == pytest.approx(23.9)


def test_the_page_and_its_json(capsys: pytest.CaptureFixture[str]) -> None:
    run_study(on_paper, [])
    page = capsys.readouterr().out
    assert "2 x NVIDIA H100 SXM" in page
    assert "does not fit" in page
    run_study(on_paper, ["--json", "--ranks", "[4]"])
    found = json.loads(capsys.readouterr().out)
    assert [one["ranks"] for one in found["targets"]] == [4]
