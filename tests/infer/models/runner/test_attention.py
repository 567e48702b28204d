"""Attention to pieces of a context: one 16-bit query may be attended for as two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from draftsmith.infer.models.runner import attention
from draftsmith.infer.models.runner.attention import Shaping, attend_piece, two_are_faster


@pytest.fixture(autouse=True)
def _timed_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DRAFTSMITH_CACHE", str(tmp_path))
    monkeypatch.setattr(attention, "two_are_faster", two_are_faster.__wrapped__)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_query_attended_for_as_two_has_the_same_attention(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, masked: bool
) -> None:
    torch.manual_seed(0)
    query_GQD, keys_GKD, values_GKD = torch.randn(3, 1, 16), torch.randn(3, 40, 16), torch.randn(3, 40, 16)
    mask_QK = torch.zeros(1, 40).index_fill(1, torch.tensor([3, 17]), -torch.inf) if masked else None
    exact, exact_log_sum = attend_piece(query_GQD, keys_GKD, values_GKD, mask_QK, Shaping(0.3))
    asked = []
    plain = attention._flash

    def noted(query: torch.Tensor, *others: object) -> attention.Part:
        asked.append(query.shape[1])
        return plain(query, *others)

    monkeypatch.setattr(attention, "_flash", noted)
    monkeypatch.setattr(attention, "_seconds", lambda queries, dtype: 1.0 / queries)
    halves = [one.to(dtype) for one in (query_GQD, keys_GKD, values_GKD)]
    out, log_sum = attend_piece(*halves, None if mask_QK is None else mask_QK.to(dtype), Shaping(0.3))
    assert asked == [2]
    assert out.shape == exact.shape
    assert log_sum.shape == exact_log_sum.shape
    assert (out.float() - exact).abs().max() < 0.03
    assert (log_sum - exact_log_sum).abs().max() < 0.03


def test_it_is_timed_once_for_a_machine_and_never_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([1.0, 0.7, 1.0, 0.9])
    monkeypatch.setattr(attention, "_seconds", lambda queries, dtype: next(seconds))
    assert [attention.two_are_faster(torch.bfloat16) for _ in range(2)] == [True, True]
    assert not attention.two_are_faster(torch.float16), "0.9 is not clearly less"
    assert not attention.two_are_faster(torch.float32)
    assert next(seconds, None) is None


def test_the_timing_times() -> None:
    assert attention._seconds(2, torch.bfloat16) > 0
