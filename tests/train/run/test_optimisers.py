"""The learning rate is a function of the step alone; Muon's updates are near rotations; the estimate adds up."""

import pytest
import torch
from torch import nn

from draftsmith.train.run.optimisers import LearningRateSchedule, make_optimiser, orthogonalised


def test_the_learning_rate_climbs_to_its_peak_and_falls_to_its_floor():
    schedule = LearningRateSchedule(peak=2.0, max_steps=100, warmup=0.1, floor=0.1)
    rates = [schedule.lr(step) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == rates[9] == rates[10] == 2.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert schedule.lr(100) == pytest.approx(0.2)


def test_the_first_steps_of_a_run_by_the_clock_do_not_depend_on_its_length():
    unknown = LearningRateSchedule(1.0, max_steps=10**9, measured=8)
    known = LearningRateSchedule(1.0, max_steps=50, measured=8)
    assert [unknown.lr(step) for step in range(8)] == [known.lr(step) for step in range(8)]
    assert unknown.lr(20) != known.lr(20)


@pytest.mark.parametrize("shape", [(8, 8), (6, 20), (20, 6)])
def test_an_orthogonalised_matrix_keeps_directions_and_evens_out_sizes(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    made = orthogonalised(matrix)
    sizes = (u.T @ made @ v.T).diagonal()
    assert ((sizes > 0.6) & (sizes < 1.3)).all()
    torch.testing.assert_close(u @ torch.diag(sizes) @ v, made)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_decay_is_for_matrices_and_frozen_weights_are_left_out(name):
    model = nn.ModuleDict({"inner": nn.Linear(4, 4), "frozen": nn.Linear(4, 4), "edge": nn.Linear(4, 4, bias=False)})
    model["frozen"].requires_grad_(False)
    optimiser = make_optimiser(model.named_parameters(), name, 0.1, 0.5, (0.9, 0.95), frozenset({"edge.weight"}))
    decay = {id(weight): group["weight_decay"] for group in optimiser.param_groups for weight in group["params"]}
    assert decay == {id(model["inner"].weight): 0.5, id(model["edge"].weight): 0.5, id(model["inner"].bias): 0.0}
    matrices = [id(w) for group in optimiser.param_groups if group.get("matrices") for w in group["params"]]
    assert matrices == ([id(model["inner"].weight)] if name == "muon" else [])
    with pytest.raises(ValueError, match="every weight is frozen"):
        make_optimiser(model["frozen"].named_parameters(), name, 0.1, 0.0, (0.9, 0.95), frozenset())


def test_muon_without_matrices_is_adam():
    weights = [nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(5))]
    ours = make_optimiser([("a", weights[0])], "muon", 0.1, 0.0, (0.9, 0.95), frozenset())
    theirs = torch.optim.AdamW([weights[1]], lr=0.1, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(5):
        for weight, optimiser in zip(weights, (ours, theirs)):
            weight.grad = torch.linspace(-1, 1, 5) * (step + 1)
            optimiser.step()
    torch.testing.assert_close(weights[0], weights[1])
