"""Drafts cut from a target of any family: their exits are plain models, and nothing is cut that cannot be."""

import pytest
import torch

from draftsmith.infer.models.layers import find_parts, first_layers
from draftsmith.train.data.batches import assemble
from draftsmith.train.drafts.exits import ExitStates
from draftsmith.train.drafts.init import init_draft, pick_layers

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
