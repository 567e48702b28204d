"""The losses of Medusa's and Hydra's heads against a naive loop over documents, and that packing changes nothing."""

import pytest
import torch

from draftsmith.train.data.batches import assemble
from draftsmith.train.drafts.exits import TrainContext
from draftsmith.train.drafts.heads import future_rows
from draftsmith.train.drafts.hydra import HydraBuilder
from draftsmith.train.drafts.medusa import MedusaBuilder
from draftsmith.train.drafts.trainable import BuildContext
from draftsmith.train.objectives.future_tokens import FutureTokens

HEADS = 3
BUILDERS = {
    "medusa": MedusaBuilder(HEADS, num_layers=2),
    "hydra": HydraBuilder(HEADS, num_layers=2),
    "hydra++": HydraBuilder(HEADS, prefix=True),
}


def begun(builder, objective, target, corpus):
    """The draft with weights that are no longer those of the start, in float64."""
    draft = builder.build(BuildContext(target, corpus, torch.float64))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in draft.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator, dtype=torch.float64))
    objective.begin(TrainContext(target, draft.model, corpus, 64, "cpu"))
    return draft


def naive(draft, target, corpus, samples, decay, temperature=1.0):
    """[K] cross-entropy and [K] KL summed over documents, each read alone; the total of their sum."""
    model = draft.model
    text, law, total = torch.zeros(HEADS), torch.zeros(HEADS), 0.0
    for sample in samples:
        tokens, mask = (torch.from_numpy(each.astype("int64")) for each in corpus.sample(sample))
        with torch.no_grad():
            output = target(tokens[None], output_hidden_states=True)
        states = output.hidden_states[-1]
        if getattr(model, "prefix", None) is not None:
            states = model.prefix(inputs_embeds=states, position_ids=torch.arange(len(tokens))[None]).logits
        embedded = target.get_input_embeddings()(tokens).detach()
        theirs = torch.log_softmax(output.logits[0] / temperature, -1)
        for head in range(HEADS):
            for at in range(len(tokens) - 2 - head):
                if not mask[at + 1 : at + 3 + head].all():
                    continue
                if hasattr(model, "logits"):
                    path = [embedded[at + 1 + step][None] for step in range(head + 1)]
                    logits = model.logits(head, states[0, at][None], path)[0]
                else:
                    logits = model(states[0, at][None])[0, head]
                hard = torch.nn.functional.cross_entropy(logits, tokens[at + 2 + head])
                there = theirs[at + 1 + head]
                kl = (there.exp() * (there - torch.log_softmax(logits / temperature, -1))).sum()
                text[head] += hard.detach()
                law[head] += kl.detach()
                total = total + decay**head * (hard + kl)
    return text, law, total


@pytest.mark.parametrize("kind", BUILDERS)
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_losses_and_gradients_are_those_of_a_loop_over_the_documents(kind, family, make_model, make_corpus):
    corpus, target = make_corpus([12, 20, 9, 3]), make_model(family)
    objective = FutureTokens({"cross_entropy": 1.0, "forward_kl": 1.0}, decay=0.5, temperature=2.0)
    draft = begun(BUILDERS[kind], objective, target, corpus)
    sums = objective(draft, assemble(corpus, [[0, 1], [2, 3]], 40))
    text, law, total = naive(draft, target, corpus, range(4), 0.5, 2.0)
    assert text.min() > 1
    torch.testing.assert_close(sums.per_exit_E.float(), text + law)
    torch.testing.assert_close(sums.total, total)
    weights = list(draft.parameters())
    for ours, theirs in zip(torch.autograd.grad(sums.total, weights), torch.autograd.grad(total, weights)):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("kind", BUILDERS)
def test_documents_packed_into_a_row_have_the_losses_of_their_own_rows(kind, make_model, make_corpus):
    corpus, target = make_corpus([12, 20, 9]), make_model("llama")
    objective = FutureTokens()
    draft = begun(BUILDERS[kind], objective, target, corpus)
    packed = objective(draft, assemble(corpus, [[0, 1, 2]], 64)).per_exit_E
    alone = sum(objective(draft, assemble(corpus, [[i]], 64)).per_exit_E for i in range(3))
    torch.testing.assert_close(packed, alone)


def test_the_text_alone_needs_none_of_the_targets_logits(make_model, make_corpus, monkeypatch):
    corpus, target = make_corpus([12, 20]), make_model("llama")
    objective = FutureTokens({"cross_entropy": 1.0}, decay=1.0)
    draft = begun(BUILDERS["medusa"], objective, target, corpus)
    monkeypatch.setattr("draftsmith.train.teacher.live.LiveBatch.chunk", None)
    sums = objective(draft, assemble(corpus, [[0, 1]], 40))
    torch.testing.assert_close(sums.per_exit_E.float(), naive(draft, target, corpus, range(2), 1.0)[0])


def test_a_batch_without_anything_to_learn_gives_zero_gradients(make_model, make_corpus):
    corpus, target = make_corpus([3]), make_model("llama")
    objective = FutureTokens()
    draft = begun(BUILDERS["hydra"], objective, target, corpus)
    batch = assemble(corpus, [[]], 40)
    assert not len(future_rows(batch["labels"], HEADS).at_N)
    objective(draft, batch).total.backward()
    assert all(not weight.grad.any() for weight in draft.parameters())


def test_the_target_gets_no_gradient_and_is_no_part_of_the_draft(make_model, make_corpus):
    corpus, target = make_corpus([12, 20]), make_model("llama")
    for builder in BUILDERS.values():
        objective = FutureTokens()
        draft = begun(builder, objective, target, corpus)
        objective(draft, assemble(corpus, [[0, 1]], 40)).total.backward()
        assert all(weight.grad is None for weight in target.parameters())
        theirs = {id(weight) for weight in target.parameters()}
        assert theirs.isdisjoint(id(weight) for weight in draft.parameters())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"losses": {}}, "give at least one"),
        ({"losses": {"kl": 1.0}}, "unknown loss 'kl'"),
        ({"losses": {"jsd": 1.0}, "temperature": 0.0}, "jsd compares distributions, which temperature 0"),
        ({"decay": 0.0}, "--decay 0.0: it must be above 0 and at most 1"),
        ({"decay": 1.1}, "--decay 1.1: it must be above 0 and at most 1"),
    ],
)
def test_what_does_not_fit_together_is_refused_in_one_line(options, said):
    with pytest.raises(ValueError, match=said) as error:
        FutureTokens(**options)
    assert "\n" not in str(error.value)
