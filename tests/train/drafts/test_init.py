"""Drafts cut from a target of any family have plain models as exits; embeddings of another width are projected."""

import math

import pytest
import torch

from draftsmith.infer.models.layers import find_parts, first_layers
from draftsmith.train.data.batches import assemble
from draftsmith.train.drafts.exits import ExitStates
from draftsmith.train.drafts.init import init_draft, main_directions, pick_layers, project_embeddings

KINDS = ["llama", "gemma2", "gemma3", "qwen3", "phi3", "mixtral", "gpt_neox", "gpt2", "opt"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_of_all_layers_is_its_target(make_model, kind):
    target = make_model(kind)
    draft = init_draft(target, num_layers=2, dtype=torch.float64).eval()
    ids = torch.arange(5, 25)[None]
    assert torch.equal(draft(ids).logits, target(ids).logits)


@pytest.mark.parametrize("kind", KINDS)
def test_a_view_of_the_first_layers_has_the_exits_logits_and_the_drafts_weights(make_model, make_corpus, kind):
    model = make_model(kind)
    corpus = make_corpus([12])
    view = first_layers(model, 1).eval()
    ids = torch.from_numpy(corpus.sample(0)[0].astype("int64"))[None]
    states, _ = ExitStates(model, [1, 2]).eval()(assemble(corpus, [[0]], 12))
    parts = find_parts(model)
    logits = view(ids).logits
    learned = logits[0, 5:11]
    torch.testing.assert_close(_shaped(parts, parts.head(states[0])), learned, rtol=0, atol=1e-10)
    assert view.config.num_hidden_layers == 1
    assert {id(weight) for weight in view.parameters()} <= {id(weight) for weight in model.parameters()}
    assert len(find_parts(model).layers) == 2


def _shaped(parts, logits):
    from draftsmith.infer.models.layers import shaped_logits

    return shaped_logits(logits, parts.scale, parts.softcap)


def test_layers_are_picked_first_or_evenly():
    assert pick_layers("first", 3, 8) == [0, 1, 2]
    assert pick_layers("even", 4, 10) == [0, 3, 6, 9]
    assert pick_layers("even", 1, 10) == [0]
    with pytest.raises(ValueError, match="1 to 8 layers"):
        pick_layers("first", 9, 8)
    with pytest.raises(ValueError, match="unknown initialisation 'last'"):
        pick_layers("last", 2, 8)


def test_evenly_spaced_layers_are_the_targets_own(make_model):
    target = make_model("llama", num_hidden_layers=4)
    draft = init_draft(target, num_layers=2, how="even", dtype=torch.float64)
    assert draft.model.layers[1].mlp.up_proj.weight.equal(target.model.layers[3].mlp.up_proj.weight)


def test_layer_kinds_follow_the_picked_layers(make_model):
    target = make_model("gemma2")
    draft = init_draft(target, num_layers=1, how="first", dtype=torch.float64)
    assert draft.config.layer_types == ["sliding_attention"]


def test_a_fresh_draft_keeps_embeddings_norm_and_head_where_they_fit(make_model):
    target = make_model("llama")
    same = init_draft(target, num_layers=3, how="fresh", dtype=torch.float64)
    assert same.lm_head.weight.equal(target.lm_head.weight)
    assert not same.model.layers[0].mlp.up_proj.weight.equal(target.model.layers[0].mlp.up_proj.weight)
    narrow = init_draft(target, num_layers=1, how="fresh", shape={"hidden_size": 16}, dtype=torch.float64)
    assert narrow.lm_head.weight.shape == (61, 16)
    assert narrow(torch.arange(5)[None]).logits.isfinite().all()


def test_a_model_that_does_more_after_its_last_layer_is_refused(make_model):
    model = make_model("llama")
    calls = iter([0.0, 1.0])  # the model's own pass, then ours: they differ
    model.model.norm.register_forward_hook(lambda module, given, output: output + next(calls) * output.roll(1, -1))
    with pytest.raises(ValueError, match="more than a norm and a head"):
        ExitStates(model, [2])


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
