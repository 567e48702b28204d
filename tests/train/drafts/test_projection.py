"""Embeddings of another width: the best directions there are, one set for both matrices, nothing lost if all fit."""

import math

import pytest
import torch

from draftsmith.train.drafts.init import init_draft
from draftsmith.train.drafts.projection import main_directions, project_embeddings


def fresh(target, width):
    return init_draft(target, num_layers=1, how="fresh", shape={"hidden_size": width}, dtype=torch.float64)


def test_what_lies_in_few_directions_survives_whole(make_model):
    """Embeddings and head of rank 8: a draft of width 8 has every product of theirs."""
    target = make_model("llama")
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(32, 8, generator=generator, dtype=torch.float64))[0]
    with torch.no_grad():
        for weight in (target.model.embed_tokens.weight, target.lm_head.weight):
            weight.copy_(torch.randn(61, 8, generator=generator, dtype=torch.float64) @ basis.T)
    draft = fresh(target, 8)
    products = target.model.embed_tokens.weight @ target.lm_head.weight.T
    ours = draft.model.embed_tokens.weight @ draft.lm_head.weight.T
    torch.testing.assert_close(ours, products * math.sqrt(32 / 8), rtol=1e-4, atol=1e-5)
    assert project_embeddings(target, draft) == pytest.approx(1.0)


def test_no_other_directions_hold_more_of_the_second_moment(make_model):
    target = make_model("llama", tie_word_embeddings=True)
    target.tie_weights()
    draft = fresh(target, 16)
    assert draft.lm_head.weight is draft.model.embed_tokens.weight
    held = project_embeddings(target, draft)
    embedding = target.model.embed_tokens.weight.detach().double()
    values = torch.linalg.svdvals(embedding) ** 2
    assert held == pytest.approx(float(values[:16].sum() / values.sum()), rel=1e-6)
    assert float(
        (draft.model.embed_tokens.weight.detach().double() ** 2).sum() / (embedding**2).sum()
    ) == pytest.approx(held)


def test_directions_are_orthonormal_and_each_matrix_weighs_the_same():
    large, small = torch.zeros(5, 4), torch.zeros(5, 4)
    large[:, 0], small[:, 1], small[:, 2] = 100.0, 3.0, 1.0
    basis, held = main_directions([large, small], 2)
    torch.testing.assert_close(basis.T @ basis, torch.eye(2))
    torch.testing.assert_close(basis.abs().argmax(0), torch.tensor([0, 1]))
    assert held == pytest.approx(0.5 + 0.5 * 0.9 + 0.05, abs=1e-6)


def test_a_wider_draft_gets_the_targets_columns_and_zeros(make_model):
    target = make_model("llama")
    draft = fresh(target, 40)
    assert draft.lm_head.weight[:, 32:].abs().max() == 0
    torch.testing.assert_close(draft.model.embed_tokens.weight[:, :32], target.model.embed_tokens.weight)
