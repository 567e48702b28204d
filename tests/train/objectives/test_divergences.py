"""Every loss and its slope against a plain float64 loop over the vocabulary and autograd; what each of them prefers."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from draftsmith.train.objectives.chunked_loss import chunked_loss
from draftsmith.train.objectives.divergences import Distributions, find_divergence, greedy, topk, total_variation
from draftsmith.train.teacher.live import LiveChunk

NAMES = ["forward_kl", "reverse_kl", "jsd", "total_variation", "sampled", "greedy", "topk", "cross_entropy"]


def naive(name, logits_V, target_logits_V, label, temperature, top_k, sharpness):
    """One position, token by token, as the definition says it."""
    vocab = len(logits_V)
    at = temperature or 1.0
    draft = torch.softmax(logits_V / at, -1)
    target = torch.softmax(target_logits_V / at, -1)
    if temperature == 0:
        target = torch.nn.functional.one_hot(target_logits_V.argmax(), vocab).double()
    tokens = range(vocab)
    if name == "forward_kl":
        return sum(target[i] * torch.log(target[i] / draft[i]) for i in tokens)
    if name == "reverse_kl":
        return sum(draft[i] * torch.log(draft[i] / target[i]) for i in tokens)
    if name == "jsd":
        mean = [(target[i] + draft[i]) / 2 for i in tokens]
        one = sum(target[i] * torch.log(target[i] / mean[i]) for i in tokens)
        return one / 2 + sum(draft[i] * torch.log(draft[i] / mean[i]) for i in tokens) / 2
    if name == "total_variation":
        return 1 - sum(torch.minimum(target[i], draft[i]) for i in tokens)
    if name == "sampled":
        return -torch.log(sum(torch.minimum(target[i], draft[i]) for i in tokens))
    if name == "cross_entropy":
        return -torch.log(torch.softmax(logits_V, -1)[label])
    draws = 1 if name == "greedy" else top_k
    sharp = torch.softmax(sharpness * logits_V, -1)
    return -torch.log(sum(target[i] * (1 - (1 - sharp[i]) ** draws) for i in tokens))


def random_problem(positions=5, vocab=9, seed=0, spread=2.0):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: spread * torch.randn(positions, vocab, generator=generator, dtype=torch.float64)  # noqa: E731
    return draw(), draw(), torch.randint(0, vocab, (positions,), generator=generator)


def agrees(name, logits, target_logits, labels, temperature, top_k=3, sharpness=1.5):
    distributions = Distributions(logits.clone(), LiveChunk(target_logits), labels, temperature, top_k, sharpness)
    loss, slope = find_divergence(name)(distributions)
    leaf = logits.clone().requires_grad_()
    plain = torch.stack([
        naive(name, leaf[c], target_logits[c], labels[c], temperature, top_k, sharpness) for c in range(len(leaf))
    ])  # fmt: skip
    (theirs,) = torch.autograd.grad(plain.sum(), leaf)
    torch.testing.assert_close(loss, plain.detach(), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(slope, theirs, rtol=1e-8, atol=1e-11)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
@pytest.mark.parametrize("name", NAMES)
def test_a_loss_and_its_slope_equal_a_plain_loop(name, temperature):
    agrees(name, *random_problem(), temperature)


@pytest.mark.parametrize("name", ["greedy", "topk", "cross_entropy"])
def test_at_temperature_0_the_targets_distribution_is_its_choice(name):
    agrees(name, *random_problem(), 0.0)


@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from(NAMES), seed=st.integers(0, 10**6), vocab=st.integers(2, 12), spread=st.floats(0.1, 6),
    temperature=st.floats(0.5, 3), top_k=st.integers(1, 6), sharpness=st.floats(0.5, 3),
)  # fmt: skip
def test_losses_equal_a_plain_loop_for_any_distributions(name, seed, vocab, spread, temperature, top_k, sharpness):
    agrees(name, *random_problem(2, vocab, seed, spread), temperature, top_k, sharpness)


@pytest.mark.parametrize("name", NAMES[:5])
def test_equal_distributions_have_no_loss_and_no_slope(name):
    logits, _, labels = random_problem()
    loss, slope = find_divergence(name)(Distributions(logits, LiveChunk(logits.clone()), labels))
    assert loss.abs().max() < 1e-12
    assert slope.abs().max() < 1e-12


def test_float32_stays_finite_where_distributions_lie_far_apart():
    logits = torch.tensor([[200.0, -200.0, 0.0], [0.0, 0.0, 80.0]])
    distributions = Distributions(logits, LiveChunk(-logits), torch.tensor([1, 0]))
    for name in NAMES:
        loss, slope = find_divergence(name)(distributions)
        assert loss.isfinite().all(), name
        assert slope.isfinite().all(), name


def distribution_of(*probs):
    return torch.tensor([probs], dtype=torch.float64).log()


def test_covering_prefers_drafts_that_rank_as_the_rule_asks():
    """Target .4 .3 .2 .1: a distribution flat over the best two covers as two draws should; a flat or a wrong one does
    not."""
    target = LiveChunk(distribution_of(0.4, 0.3, 0.2, 0.1))
    label = torch.tensor([0])

    def loss(rule, *probs):
        return rule(Distributions(distribution_of(*probs), target, label, top_k=2, sharpness=8.0))[0].item()

    # One argmax: only the first place counts. Two candidates: the first two.
    assert loss(greedy, 0.4, 0.3, 0.2, 0.1) == pytest.approx(-math.log(0.4), abs=0.08)
    assert loss(greedy, 0.1, 0.3, 0.2, 0.4) == pytest.approx(-math.log(0.1), abs=0.3)
    assert loss(topk, 0.5, 0.499, 0.0005, 0.0005) < loss(topk, 0.5, 0.0005, 0.499, 0.0005)
    assert loss(topk, 0.5, 0.499, 0.0005, 0.0005) < loss(topk, 0.25, 0.25, 0.25, 0.25)


def test_total_variation_is_the_chance_that_a_drawn_token_is_rejected():
    distributions = Distributions(
        distribution_of(0.7, 0.2, 0.1), LiveChunk(distribution_of(0.5, 0.1, 0.4)), torch.tensor([0])
    )
    assert total_variation(distributions)[0].item() == pytest.approx(1 - (0.5 + 0.1 + 0.1))


def test_an_unknown_loss_is_one_line_and_a_dotted_path_is_taken():
    with pytest.raises(ValueError, match="unknown loss 'kl': cross_entropy, forward_kl") as error:
        find_divergence("kl")
    assert "\n" not in str(error.value)
    assert find_divergence("draftsmith.train.objectives.divergences.jsd") is find_divergence("jsd")


@pytest.mark.parametrize("chunk", [13, 13 * 4, 13 * 100])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, 0.0), (0.5, 0.0), (2.0, 3.0)])
def test_chunks_exits_scale_and_cap_change_nothing(chunk, scale, softcap):
    """A mix of two losses at three exits, through the head, against autograd on whole logits."""
    generator = torch.Generator().manual_seed(3)
    head = nn.Linear(6, 13, dtype=torch.float64)
    states = [torch.randn(11, 6, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]
    target_logits = torch.randn(11, 13, generator=generator, dtype=torch.float64)
    weights = [0.2, 0.5, 0.3]

    def loss(logits, chunk, slope):
        distributions = Distributions(
            logits, LiveChunk(target_logits[chunk]), torch.zeros(len(logits), dtype=torch.long)
        )
        one, two = find_divergence("reverse_kl")(distributions), find_divergence("topk")(distributions)
        return (one[0] + 0.5 * two[0]).sum(), one[1] + 0.5 * two[1] if slope else None

    total, sums, _ = chunked_loss(states, head, weights, loss, scale=scale, softcap=softcap, chunk_entries=chunk)
    leaves = [*states, *head.parameters()]
    ours = torch.autograd.grad(total * 0.37, leaves)
    plain = []
    for state in states:
        logits = head(state) * scale
        logits = softcap * torch.tanh(logits / softcap) if softcap else logits
        plain.append(sum(
            naive("reverse_kl", logits[n], target_logits[n], 0, 1.0, 4, 1.0)
            + 0.5 * naive("topk", logits[n], target_logits[n], 0, 1.0, 4, 1.0)
            for n in range(11)
        ))  # fmt: skip
    theirs = torch.autograd.grad(sum(w * one for w, one in zip(weights, plain)) * 0.37, leaves)
    torch.testing.assert_close(sums, torch.stack(plain).detach())
    for mine, other in zip(ours, theirs):
        torch.testing.assert_close(mine, other)
