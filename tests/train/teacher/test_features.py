"""The target's states of packed rows: those of each document alone, and nothing kept but what was asked for."""

import gc

import pytest
import torch

from draftsmith.train.data.batches import assemble
from draftsmith.train.teacher.features import LiveFeatures

NAMES = ("layer:0", "layer:1", "layer:2", "last")


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma2", "gemma3", "gpt_neox", "gpt2", "opt", "phi3"])
def test_states_and_distributions_are_those_of_each_document_alone(family, make_model, make_corpus):
    target, corpus = make_model(family), make_corpus([12, 20, 9, 24])
    features = LiveFeatures(target, NAMES)
    packs = [[0, 1], [2, 3]]
    found = features(assemble(corpus, packs, 40))
    for row, samples in enumerate(packs):
        begin = 0
        for sample in samples:
            tokens = torch.from_numpy(corpus.sample(sample)[0].astype("int64"))[None]
            with torch.no_grad():
                alone = target(tokens, output_hidden_states=True)
            end = begin + tokens.shape[1]
            for name, states in zip(NAMES, [*alone.hidden_states[:2], None, alone.hidden_states[-1]]):
                if states is not None:
                    torch.testing.assert_close(found[name][row, begin:end], states[0])
            at = torch.arange(row * 40 + begin, row * 40 + end)
            law = found.distributions(at).chunk(slice(None)).log_probs(1.0, torch.empty(0))
            torch.testing.assert_close(law, torch.log_softmax(alone.logits[0], -1))
            begin = end


def live_bytes():
    gc.collect()
    found = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
             for each in gc.get_objects() if issubclass(type(each), torch.Tensor)}  # fmt: skip
    return sum(found.values())


@pytest.mark.parametrize("names", [("last",), ("layer:1", "layer:3", "layer:5"), ("layer:0", "last")])
def test_a_packed_row_costs_the_named_states_and_no_more(names, make_model, make_corpus):
    """Counted over all tensors that are alive, of a target of eight layers."""
    target, corpus = make_model("llama", dtype=torch.float32, num_hidden_layers=8), make_corpus([400, 600])
    features, batch = LiveFeatures(target, names), assemble(corpus, [[0, 1]], 1000)
    before = live_bytes()
    found = features(batch)
    states = 1000 * 32 * 4
    assert live_bytes() - before == states * len({*names, "last"})
    assert all(not found[name].requires_grad for name in names)


def test_states_can_be_given_to_what_is_trained(make_model, make_corpus):
    found = LiveFeatures(make_model("llama"), ["last"])(assemble(make_corpus([12]), [[0]], 16))
    weight = torch.ones(32, 1, dtype=torch.float64, requires_grad=True)
    (found["last"] @ weight).sum().backward()
    assert weight.grad.any()


def test_a_state_that_the_target_does_not_have_is_refused(make_model):
    with pytest.raises(ValueError, match="unknown feature 'layer:3': use 'last', or 'layer:k'"):
        LiveFeatures(make_model("llama"), ["layer:3"])
