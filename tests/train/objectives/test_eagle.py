"""EAGLE's objective: what it computes is the loss of each document on its own, and nothing leaks between documents."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from draftsmith.infer.models.load import load_model
from draftsmith.train.data.batches import assemble
from draftsmith.train.data.channel_scale import folded
from draftsmith.train.drafts.eagle import EagleBuilder
from draftsmith.train.drafts.exits import TrainContext
from draftsmith.train.drafts.trainable import BuildContext
from draftsmith.train.objectives.eagle import EagleObjective

LENGTHS = [14, 9, 20, 11]
EXACT = {"rtol": 1e-11, "atol": 1e-11}  # of float64, and of float64 alone


@pytest.fixture(scope="module")
def target(target_folder):
    return load_model(str(target_folder), dtype="float64", device="cpu")[0]


@pytest.fixture(autouse=True)
def exact_norms(monkeypatch):
    """Transformers' norm computes in float32 whatever it is given, as its eager softmax does: see begun."""

    def forward(norm, states):
        return norm.weight * states * torch.rsqrt(states.square().mean(-1, keepdim=True) + norm.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


def begun(target, corpus, objective=None, **options):
    """(objective, draft) in float64 with a random final norm and feature matrix."""
    builder = EagleBuilder(**{"unrolls": 3, "draft_vocab": 40, **options})
    draft = builder.build(BuildContext(target, corpus, torch.float64))
    draft.model.config._attn_implementation = "sdpa"
    folded(draft.model.fc)
    torch.nn.init.normal_(draft.model.fc.weight, std=0.3)
    objective = objective or EagleObjective(decay=0.5)
    objective.begin(TrainContext(target, draft.model, corpus, 64, "cpu"))
    return objective, draft


def total(objective, draft, batch):
    return objective(draft, batch).total.item()


def gradients(draft, total):
    draft.zero_grad()
    total.backward()
    return {name: weight.grad.clone() for name, weight in draft.named_parameters() if weight.grad is not None}


def plain(target, draft, corpus, sample, unrolls):
    """The KL of each unroll summed over a document's learned tokens, by loops over its positions, without a cache."""
    head = draft.model
    tokens, mask = (torch.from_numpy(part.astype("int64")) for part in corpus.sample(sample))
    with torch.no_grad():
        output = target(tokens[None], output_hidden_states=True)
    features = {name: output.hidden_states[int(name.partition(":")[2])][0] for name in head.features}
    joined = head.joined(features)
    law = output.logits[0]
    law = torch.log_softmax(law if head.ids_V is None else law[:, head.ids_V], -1)
    sums = [law.new_zeros(()) for _ in range(unrolls)]
    for i in range(len(tokens) - 1):
        # Pairs 0 to i, then what is drafted below pair i, each step run as a whole.
        states, entries = [joined[j] for j in range(i + 1)], list(tokens[1 : i + 2])
        for t in range(unrolls):
            if i + 2 + t >= len(tokens) or not mask[i + 1 : i + 3 + t].all():
                break
            pairs = head.pairs(torch.stack(entries), torch.stack(states))
            count = len(entries)
            causal = torch.full((count, count), float("-inf"), dtype=pairs.dtype).triu(1)[None, None]
            kept = []
            hook = head.model.layers[-1].register_forward_hook(lambda *given, kept=kept: kept.append(given[2]))
            logits = head(inputs_embeds=pairs[None], position_ids=torch.arange(count)[None], attention_mask=causal)
            hook.remove()
            ours = torch.log_softmax(logits.logits[0, -1], -1)
            theirs = law[i + 1 + t]
            sums[t] = sums[t] + (theirs.exp() * (theirs - ours)).sum()
            state = kept[0][0, -1]
            states.append(head.model.norm(state) if head.recurrent == "last" else state)
            if i + 2 + t < len(tokens):
                entries.append(tokens[i + 2 + t])
    return torch.stack(sums)


@pytest.mark.parametrize("options", [{}, {"norm_output": True, "num_layers": 2, "draft_vocab": 0}])
def test_the_loss_and_its_gradient_are_those_of_a_plain_loop(target, make_corpus, options):
    corpus = make_corpus(LENGTHS)
    objective, draft = begun(target, corpus, **options)
    batch = assemble(corpus, [[0, 1], [2, 3]], 40)
    sums = objective(draft, batch)
    expected = sum(plain(target, draft, corpus, i, 3) for i in range(4))
    weighted = expected @ torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64)
    torch.testing.assert_close(sums.total.detach(), weighted.detach(), **EXACT)
    ours, theirs = gradients(draft, sums.total), gradients(draft, weighted)
    assert ours.keys() == theirs.keys()
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], **EXACT, msg=lambda found, name=name: f"{name}: {found}")
    counts = [sum(max(length - length // 2 - 1 - t, 0) for length in LENGTHS) for t in range(3)]
    assert sums.counts_E.tolist() == counts
    torch.testing.assert_close(sums.per_exit_E.double(), expected.detach(), **EXACT)


@pytest.mark.parametrize("unrolls", [1, 3])
def test_two_packed_documents_have_the_sum_of_their_losses_and_gradients(target, make_corpus, unrolls):
    corpus = make_corpus([14, 17])
    corpus.masks[:] = 1  # the first tokens of a document are learned, too, so that any leak would show
    objective, draft = begun(target, corpus, unrolls=unrolls)
    apart = [objective(draft, assemble(corpus, [[i]], 17)) for i in range(2)]
    together = objective(draft, assemble(corpus, [[0, 1]], 40))
    torch.testing.assert_close(together.total, apart[0].total + apart[1].total)
    ours, theirs = gradients(draft, together.total), gradients(draft, apart[0].total + apart[1].total)
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name])


def test_no_gradient_reaches_another_document(target, make_corpus):
    """Nor one's own later tokens: only the states up to the pair, and the tokens up to the prediction."""
    corpus = make_corpus([14, 17])
    corpus.masks[:] = 1
    objective, draft = begun(target, corpus)
    batch = assemble(corpus, [[0, 1]], 31)
    features = {name: objective.read(batch)[name].requires_grad_() for name in draft.model.features}
    found = draft(batch, features)
    for t in range(3):
        for place in (16, 20):  # both in the second document, which begins at 14
            at = found.places_N.tolist().index(place)
            if not found.learned_KN[t, at]:
                assert (t, place) == (2, 16)
                continue
            grads = torch.autograd.grad(found.states_KND[t][at].sum(), list(features.values()), retain_graph=True)
            touched = torch.stack([grad[0].abs().sum(-1) for grad in grads]).sum(0).nonzero().flatten().tolist()
            assert touched == list(range(14, place - t))


def test_dropped_positions_are_those_whose_likeliest_token_cannot_be_drafted(target, make_corpus):
    corpus = make_corpus(LENGTHS)
    batch = assemble(corpus, [[0, 1], [2, 3]], 40)
    kept, draft = begun(target, corpus)
    dropped, _ = begun(target, corpus, EagleObjective(decay=0.5, outside="drop"))
    features = kept.read(batch)
    places = draft(batch, features).places_N
    likeliest = features.distributions(places).chunk(slice(None)).choice()
    known = torch.isin(likeliest, draft.model.ids_V)
    assert 0 < known.sum() < len(known)
    assert dropped.rows.have_choice(features, places).equal(known)
    assert 0 < total(dropped, draft, batch) < total(kept, draft, batch)


def test_noise_is_added_in_training_only(target, make_corpus):
    corpus = make_corpus(LENGTHS)
    batch = assemble(corpus, [[0, 1], [2, 3]], 40)
    plain_objective, draft = begun(target, corpus)
    for kind in ("normal", "uniform"):
        noisy, _ = begun(target, corpus, EagleObjective(decay=0.5, noise=0.2, noise_kind=kind))
        assert total(noisy, draft.train(), batch) != total(plain_objective, draft, batch)
        assert total(noisy, draft.eval(), batch) == total(plain_objective, draft, batch)
        draft.train()


@pytest.mark.parametrize("kind", ["normal", "uniform"])
def test_a_rows_noise_is_its_own_whatever_micro_batch_it_falls_to(target, make_corpus, kind):
    corpus = make_corpus(LENGTHS)
    objective, draft = begun(target, corpus, EagleObjective(decay=0.5, noise=0.2, noise_kind=kind))
    draft.train()
    both = total(objective, draft, assemble(corpus, [[0, 1], [2, 3]], 40, first=6))
    apart = [total(objective, draft, assemble(corpus, [row], 40, first)) for first, row in [(6, [0, 1]), (7, [2, 3])]]
    assert sum(apart) == pytest.approx(both, rel=1e-9)
    assert total(objective, draft, assemble(corpus, [[2, 3]], 40, first=8)) != apart[1]


def test_a_batch_without_anything_to_learn_has_loss_zero_and_gradients(target, make_corpus):
    corpus = make_corpus(LENGTHS)
    objective, draft = begun(target, corpus)
    sums = objective(draft, assemble(corpus, [[]], 16))
    assert sums.total.item() == 0
    found = gradients(draft, sums.total)
    assert len(found) == len(list(draft.parameters()))
    assert not any(gradient.any() for gradient in found.values())


def test_recomputed_unrolls_have_the_same_gradients(target, make_corpus):
    corpus = make_corpus(LENGTHS)
    batch = assemble(corpus, [[0, 1], [2, 3]], 40)
    objective, draft = begun(target, corpus, num_layers=2)
    kept = gradients(draft, objective(draft, batch).total)
    draft.checkpointing = True
    again = gradients(draft, objective(draft, batch).total)
    for name, gradient in kept.items():
        torch.testing.assert_close(again[name], gradient)


def test_wrong_options_are_one_clear_line(target, make_corpus):
    for options, message in [({"decay": 0}, "--decay 0"), ({"noise": -1}, "--noise -1"), ({"losses": {}}, "losses")]:
        with pytest.raises(ValueError, match=message):
            EagleObjective(**options)
    with pytest.raises(ValueError, match="cross_entropy learns the text's tokens"):
        begun(target, make_corpus(LENGTHS), EagleObjective({"cross_entropy": 1.0}))
    begun(target, make_corpus(LENGTHS), EagleObjective({"cross_entropy": 1.0}), draft_vocab=0)
