"""Costs between measured shapes: exact where the model behind them is the formula's, and honest where it is not."""

import pytest

from draftsmith.infer.costs.pass_costs import PassCost
from draftsmith.infer.measure.plan.shape_costs import estimate, left_out
from draftsmith.infer.measure.plan.shapes import Size


def size(layers, width):
    layer = 12 * width * width * 2 * layers
    return Size(layers, 0, layer, 1000 * width * 2, 0, 0, 4 * width * layers, 0)


def cost(layers, width, bump=1.0):
    one = size(layers, width)

    def f(tokens):
        return bump * (1.0 + 0.3 * layers + tokens * (1e-7 * one.layer_bytes + 2e-7 * one.head_bytes))

    return PassCost([1, 8, 64], [f(1), f(8), f(64)], 1e-6 * one.token_bytes, 1e-8 * one.token_bytes, (2,))


SHAPES = [(1, 512), (2, 512), (5, 512), (1, 256), (4, 256)]
MEASURED = [(size(*shape), cost(*shape)) for shape in SHAPES]


@pytest.mark.parametrize("shape", [(3, 512), (4, 512), (2, 256), (3, 384)])
def test_a_shape_between_the_others_costs_what_its_layers_and_weights_add_up_to(shape):
    said, truth = estimate(MEASURED, size(*shape)), cost(*shape)
    for rows, tokens, context in [(1, 1, 0), (8, 2, 500), (1, 8, 1000)]:
        assert said(rows, tokens, context) == pytest.approx(truth(rows, tokens, context), rel=1e-6)
    assert said.buckets == (2,)


def test_an_estimate_never_falls_with_the_tokens():
    noisy = [(one, PassCost([1, 8], [c.seconds[0] * 1.4, c.seconds[0]])) for one, c in MEASURED]
    said = estimate(noisy, size(3, 512))
    assert list(said.seconds) == sorted(said.seconds)


def test_a_shape_whose_context_seemed_to_cost_nothing_does_not_make_it_free_for_all():
    """Between what is seen and what pairs add, noise may give one shape all of the one and nothing of the other."""
    size_0, cost_0 = MEASURED[3]
    odd = [*MEASURED[:3], (size_0, PassCost(cost_0.tokens, cost_0.seconds, 0.0, 2e-6)), MEASURED[4]]
    said, truth = estimate(odd, size(3, 512)), cost(3, 512)
    assert said.per_seen == pytest.approx(truth.per_seen, rel=0.1)


def test_shapes_left_out_tell_how_good_estimates_are():
    more = [*MEASURED, (size(2, 256), cost(2, 256))]
    assert left_out(more, 1, 100) == pytest.approx([0.0] * 6, abs=1e-6)
    odd = [*more, (size(3, 512), cost(3, 512, bump=2.0))]
    assert left_out(odd, 1, 100)[-1] == pytest.approx(-0.5, abs=0.05)


def test_shapes_that_nothing_could_be_told_without_are_left_in():
    """Of two narrow shapes neither can go: with one of them nobody knows what a head takes and what a layer."""
    assert left_out(MEASURED, 1, 100) == pytest.approx([0.0] * 3, abs=1e-6)
    assert left_out(MEASURED[:3], 1, 100) == []


def test_two_shapes_are_too_few():
    with pytest.raises(ValueError, match="3 measured shapes or more, and there are 2"):
        estimate(MEASURED[:2], size(3, 512))
