"""Timing passes: rounds and medians on a clock of our own, the fit on known costs, and real cached models."""

import random
from itertools import pairwise

import numpy as np
import pytest
import torch

from draftsmith.infer.costs.identity import machine
from draftsmith.infer.costs.pass_costs import PassCost
from draftsmith.infer.costs.timing import (
    PassShape,
    TimedPass,
    expected_seconds,
    fit,
    grid,
    left_out,
    measure_together,
    non_negative_fit,
)
from draftsmith.infer.models.architectures import prepare
from draftsmith.infer.models.pass_timer import CachedPassTimer
from draftsmith.infer.models.runner.entries import Entries
from draftsmith.infer.models.runner.model_runner import ModelRunner

TRUTH = PassCost([1, 4, 16, 64], [0.95, 1.15, 1.95, 6.95], per_seen=1e-4, per_pair=1e-5, per_row=0.05)
ROWS, TOKENS, CONTEXTS = (1, 4), (1, 4, 16), (0, 100, 1000)


def measure(timer, rows, tokens, contexts, **options):
    return measure_together({"": (timer, grid(rows, tokens, contexts))}, **options)[""]


class FakeTimer:
    """Passes take what TRUTH says on a clock that only they turn; `hiccup` is a share of passes that take 20 times."""

    buckets: tuple[int, ...] = ()
    device = torch.device("cpu")
    max_positions = 1 << 30

    def __init__(self, now, factor=1.0, hiccup=0.0):
        self.now, self.factor, self.hiccup = now, factor, hiccup
        self.placed, self.closed, self.random = [], 0, random.Random(0)

    def place(self, rows, context):
        self.placed.append((rows, context))

    def run(self, tokens):
        rows, context = self.placed[-1]
        slow = 20.0 if self.random.random() < self.hiccup else 1.0
        self.now[0] += TRUTH.even(rows, tokens, context) * self.factor * slow

    def close(self):
        self.closed += 1


def test_a_few_slow_passes_do_not_show_in_a_median():
    now = [0.0]
    points = measure(FakeTimer(now, hiccup=0.1), ROWS, TOKENS, CONTEXTS, seconds=1e9, clock=lambda: now[0])
    assert len(points) == 18
    exact = [TRUTH.even(p.shape.rows, p.shape.tokens, p.shape.context) for p in points]
    assert sum(p.seconds == pytest.approx(e) for p, e in zip(points, exact)) >= 17


def test_passes_are_timed_next_to_one_another_in_a_new_order_each_round():
    now = [0.0]
    pass_timers = {"a": FakeTimer(now), "b": FakeTimer(now, factor=3.0)}
    jobs = {name: (timer, grid([1, 4], [1], [0, 100])) for name, timer in pass_timers.items()}
    points = measure_together(jobs, seconds=1e9, clock=lambda: now[0])
    ratios = [b.seconds / a.seconds for a, b in zip(points["a"], points["b"])]
    assert ratios == pytest.approx([3.0] * 4)
    orders = [tuple(pass_timers["a"].placed[at : at + 4]) for at in range(0, 40, 4)]
    assert len(set(orders)) > 3
    assert pass_timers["a"].closed == pass_timers["b"].closed == 1


def test_time_that_allows_no_three_rounds_is_refused_and_more_buys_more_rounds():
    def passes(seconds):
        now = [0.0]
        timer = FakeTimer(now)
        measure(timer, [1], [1], [0], seconds=seconds, clock=lambda: now[0])
        return len(timer.placed)

    assert passes(4.25) == 4
    assert passes(6.5) == 6
    assert passes(1e9) == 10
    with pytest.raises(ValueError, match=r"2\.5 s are too few"):
        passes(2.5)


def test_a_long_pass_is_timed_less_often_and_a_short_one_runs_before_it_counts():
    now = [0.0]
    timers = {name: FakeTimer(now, factor=factor) for name, factor in (("short", 0.01), ("mid", 1.0), ("long", 20.0))}
    jobs = {name: (timer, grid([1], [1], [0])) for name, timer in timers.items()}
    left = []
    points = measure_together(jobs, seconds=1e9, clock=lambda: now[0], progress=left.append)
    assert {name: len(timer.placed) for name, timer in timers.items()} == {"short": 10, "mid": 10, "long": 4}
    assert [points[name][0].seconds for name in timers] == pytest.approx([0.01, 1.0, 20.0])
    # 10 visits of 2 short passes, 10 of a middle one, 4 of a long one.
    assert now[0] == pytest.approx(20 * 0.01 + 10 + 80)
    assert left[:3] == [None] * 3
    assert all(before >= after for before, after in pairwise(left[3:]))
    assert left[-1] == pytest.approx(0.0)
    expected = expected_seconds({(name, point[0].shape): point[0].seconds for name, point in points.items()})
    assert expected == (pytest.approx(8 * 0.01 + 4 + 80), pytest.approx(now[0]))


def test_the_fit_gives_back_the_costs_behind_the_points():
    shapes = grid(ROWS, TOKENS, CONTEXTS)
    fitted = fit([TimedPass(shape, TRUTH.even(shape.rows, shape.tokens, shape.context)) for shape in shapes])
    for rows, tokens, context in [(1, 1, 0), (2, 8, 500), (4, 16, 3000), (3, 2, 50)]:
        assert fitted.even(rows, tokens, context) == pytest.approx(TRUTH.even(rows, tokens, context), rel=1e-6)


def test_a_fit_through_noise_never_falls_and_has_no_negative_slope():
    rng = random.Random(1)
    shapes = grid((1, 2, 4, 8), (1, 2, 4, 8), (16, 256))
    fitted = fit([TimedPass(shape, 1.0 + rng.random() * 0.3 - 2e-4 * shape.context) for shape in shapes])
    assert list(fitted.seconds) == sorted(fitted.seconds)
    assert fitted.per_seen >= 0
    assert fitted.per_pair >= 0
    assert fitted.even(1, 1, 0) > 0


def test_one_context_and_one_row_leave_the_slopes_at_zero():
    fitted = fit([TimedPass(shape, TRUTH.even(shape.rows, shape.tokens, 100)) for shape in grid([1], TOKENS, [100])])
    assert (fitted.per_row, fitted.per_seen, fitted.per_pair) == (0.0, 0.0, 0.0)
    assert fitted.even(1, 4, 100) == pytest.approx(TRUTH.even(1, 4, 100))


def test_rows_are_not_taken_for_tokens():
    """Two rows of one token may take longer than one row of two."""
    shapes = [*grid([1], (1, 2, 4, 8, 16), (0, 100)), *grid([4], (1, 4), (0, 100))]
    fitted = fit([TimedPass(shape, TRUTH.even(shape.rows, shape.tokens, shape.context)) for shape in shapes])
    assert fitted.per_row == pytest.approx(0.05)
    assert fitted.even(2, 1, 0) - fitted.even(1, 2, 0) == pytest.approx(0.05)
    assert fitted.shared(2)(1.0, 100.0, 100.0, 1.0) == pytest.approx(fitted.even(2, 1, 100) / 2)


def test_padded_passes_are_fitted_at_the_size_they_ran_at():
    """With a bucket of 16, passes of 5 to 16 tokens take what one of 16 does."""
    shapes = grid((1, 4, 8), (1, 2, 4), (0, 100))
    seconds = []
    for shape in shapes:
        tokens = shape.rows * shape.tokens
        padded = 16 if 4 < tokens < 16 else tokens
        seconds.append(TRUTH(padded, shape.rows * shape.context, tokens * shape.context, shape.rows))
    points = [TimedPass(shape, one) for shape, one in zip(shapes, seconds)]
    good, naive = fit(points, buckets=(1, 2, 4, 16)), fit([one for one in points if one.shape.rows != 8])
    assert [good.even(a.rows, a.tokens, a.context) for a in shapes] == pytest.approx(seconds, rel=1e-6)
    assert max(abs(naive.even(a.rows, a.tokens, a.context) / s - 1) for a, s in zip(shapes, seconds)) > 0.02


def test_left_out_points_tell_how_good_the_formula_is_between_them():
    straight = PassCost([1, 100], [1.0, 10.0], per_seen=1e-4)
    shapes = grid((1,), (1, 2, 4, 8, 16), (0, 500))

    def errors(bump):
        seconds = [straight.even(a.rows, a.tokens, a.context) + bump * (a.tokens == 4) for a in shapes]
        return left_out([TimedPass(a, taken) for a, taken in zip(shapes, seconds)])

    assert errors(0.0) == pytest.approx([0.0] * 6, abs=1e-6)
    assert max(map(abs, errors(1.0))) > 0.3


def test_columns_of_very_different_size_are_one_problem():
    design_MN = np.array([[1.0, 1e9], [1.0, 3e9], [1.0, 7e9]])
    np.testing.assert_allclose(non_negative_fit(design_MN, design_MN @ [2.0, 3e-9]), [2.0, 3e-9], rtol=1e-9)


def test_a_column_of_zeros_gets_nothing():
    np.testing.assert_allclose(non_negative_fit(np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([3.0, 3.0])), [3.0, 0.0])


@pytest.fixture
def lm(make_model):
    model = make_model("llama", torch.float32)
    return ModelRunner(model, prepare(model))


def test_a_timer_stands_behind_its_context_without_computing_it_and_commits_nothing(lm):
    seen = []
    lm.model.register_forward_pre_hook(lambda module, args, given: seen.append(given), with_kwargs=True)
    timer = CachedPassTimer(lm)
    timer.place(3, 40)
    assert not seen
    for _ in range(2):
        timer.run(5)
        given = seen.pop()
        assert given["input_ids"].shape == (1, 15)
        assert given["position_ids"].tolist() == [[40, 41, 42, 43, 44] * 3]
    timer.place(1, 7)
    timer.run(2)
    assert seen.pop()["position_ids"].tolist() == [[7, 8]]


def test_a_timer_leaves_the_rows_of_others_as_they_were(lm):
    lm.open("mine", 32)
    lm.prefill(["mine"], [[5, 6, 7, 8]])

    def stored():
        return lm.cache.keys[0][:, lm._rows["mine"].own.start :][:, :4].clone()

    kept = stored()
    timer = CachedPassTimer(lm)
    timer.place(2, 10)
    timer.run(3)
    timer.close()
    assert lm.length("mine") == 4
    torch.testing.assert_close(stored(), kept)
    lm.forward(["mine"], [Entries.chain([9])])


def test_a_wide_deep_model_takes_longer_than_a_small_one(make_model):
    small = make_model("llama", torch.float32)
    large = make_model("llama", torch.float32, hidden_size=256, intermediate_size=1024, num_hidden_layers=8)
    jobs = {
        name: (CachedPassTimer(ModelRunner(model, prepare(model))), grid([1], [1, 8], [32]))
        for name, model in (("small", small), ("large", large))
    }
    points = measure_together(jobs)
    assert all(b.seconds > 1.5 * a.seconds for a, b in zip(points["small"], points["large"]))


def test_costs_say_whose_they_are():
    found = machine(torch.device("cpu"), torch.bfloat16)
    assert found["device"] == "cpu"
    assert found["dtype"] == "bfloat16"
    assert found["threads"] == torch.get_num_threads()
    assert set(found) == {"device", "name", "cores", "threads", "torch", "dtype"}


@pytest.mark.gpu
def test_a_pass_on_a_gpu_is_timed_to_its_end(make_model):
    """Kernels are only queued by a call: unsynchronised, a pass of 512 tokens would seem as quick as one of 1."""
    model = make_model("llama", torch.bfloat16, hidden_size=2048, intermediate_size=8192, num_hidden_layers=4)
    timer = CachedPassTimer(ModelRunner(model.cuda(), prepare(model)))
    points = measure(timer, [8], [1, 256], [64])
    assert points[1].seconds > 1.5 * points[0].seconds


def test_equal_shapes_are_timed_once():
    assert grid([1, 1], [2], [3]) == [PassShape(1, 2, 3)]
