"""EAGLE-3 heads to train: how they start, what they can draft, what is refused; and they learn a planted target."""

import pytest
import torch
from tiny_eagle import cyclic, cyclic_target

from draftsmith.infer.heads.folders import TrainedFor, load_eagle
from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.train.data.batches import assemble
from draftsmith.train.data.corpus import Corpus
from draftsmith.train.drafts.draft_vocabulary import draft_vocabulary
from draftsmith.train.drafts.eagle import EagleBuilder
from draftsmith.train.drafts.eagle_draft import norm_weight
from draftsmith.train.drafts.exits import TrainContext
from draftsmith.train.drafts.trainable import BuildContext
from draftsmith.train.objectives.eagle import EagleObjective
from draftsmith.train.run.validation import accepted_lengths


def build(target, corpus, special=(), dtype=torch.float64, **options):
    trained_for = TrainedFor("target", "weights", "tokens", target.config.num_hidden_layers)
    return EagleBuilder(**options).build(
        BuildContext(target, corpus, dtype, 3, trained_for=trained_for, special_ids=special)
    )


def test_the_draft_vocabulary_is_what_the_answers_use_most(make_corpus):
    corpus = make_corpus([40, 40])
    learned = corpus.tokens[corpus.masks != 0]
    corpus.tokens[corpus.masks == 0] = 7  # prompts do not count
    learned[:30] = 50
    corpus.tokens[corpus.masks != 0] = learned
    found = draft_vocabulary(corpus, 61, 12, always=(0, 2, 2, 99))
    counts = {token: int((learned == token).sum()) for token in range(61)}
    assert len(found) == 12
    assert found == sorted(found)
    assert {0, 2, 50} <= set(found)
    assert 7 not in found or counts[7]
    others = set(found) - {0, 2}
    assert min(counts[token] for token in others) >= max(counts[token] for token in range(61) if token not in found)
    with pytest.raises(ValueError, match="--draft_vocab 2: the target has 2 special and stop tokens"):
        draft_vocabulary(corpus, 61, 2, always=(0, 2))


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt_neox", "gpt2"])
def test_output_head_and_final_norm_start_as_the_targets(kind, make_model, make_corpus):
    """Whatever a family's norm adds to its weight or its output, and whatever scales its logits."""
    target = make_model(kind)
    draft = build(target, make_corpus([40, 30]), special=(0, 1), draft_vocab=20, layers=[1, 2])
    head = draft.model
    states = target(torch.arange(3, 11)[None], output_hidden_states=True)
    ids = head.ids_V
    assert {0, 1} <= set(ids.tolist())
    torch.testing.assert_close(head.lm_head(states.hidden_states[-1]), states.logits[..., ids])
    assert head.features == ("layer:1", "layer:2")
    assert draft.edges()[0] is head.lm_head.weight
    assert not any(weight is target.get_input_embeddings().weight for weight in draft.parameters())


def test_the_final_norms_weight_is_found_by_what_it_does():
    for norm in (torch.nn.RMSNorm(8, eps=0.0), torch.nn.LayerNorm(8, eps=0.0)):
        torch.nn.init.normal_(norm.weight)
        if getattr(norm, "bias", None) is not None:
            torch.nn.init.normal_(norm.bias)
        torch.testing.assert_close(norm_weight(norm, 8), norm.weight.detach())
    assert norm_weight(torch.nn.Identity(), 8).equal(torch.ones(8))


def test_what_was_trained_is_what_is_loaded(make_model, make_corpus, tmp_path):
    target, corpus = make_model("llama"), make_corpus([40, 30])
    options = {"draft_vocab": 20, "layers": [1, 2], "num_layers": 2, "norm_output": True, "norm_before_fc": True,
               "norm_before_residual": True, "fc_norm": False, "shape": {"intermediate_size": 20}}  # fmt: skip
    draft = build(target, corpus, **options)
    draft.save(tmp_path / "head", None, "")
    again = load_eagle(tmp_path / "head", target.config)
    again.lend(target.get_input_embeddings(), None)
    assert again.design == draft.model.design
    assert again.ids_V.equal(draft.model.ids_V)
    pairs = torch.randn(1, 5, 64, dtype=torch.float64)
    at = torch.arange(5)[None]
    torch.testing.assert_close(
        again.double()(inputs_embeds=pairs, position_ids=at).logits,
        draft.model(inputs_embeds=pairs, position_ids=at).logits,
    )
    gone_on = build(target, corpus, init=str(tmp_path / "head"))
    assert gone_on.model.fc.weight.equal(draft.model.fc.weight)
    assert all(weight.requires_grad for weight in gone_on.parameters())
    with pytest.raises(ValueError, match="keeps its shape: leave out --norm_output"):
        build(target, corpus, init=str(tmp_path / "head"), norm_output=True)


def test_the_same_seed_gives_the_same_start_and_the_output_head_can_stay(make_model, make_corpus):
    target, corpus = make_model("llama"), make_corpus([40, 30])
    one, two = (build(target, corpus, layers=[1, 2], freeze_head=True).state_dict() for _ in range(2))
    assert all(one[name].equal(two[name]) for name in one)
    draft = build(target, corpus, layers=[1, 2], freeze_head=True)
    assert [name for name, weight in draft.named_parameters() if not weight.requires_grad] == ["model.lm_head.weight"]


def test_options_that_do_not_fit_are_refused(make_model, make_corpus):
    for options, said in [
        ({"unrolls": 0}, "--unrolls 0: it must be at least 1"),
        ({"num_layers": 0}, "--num_layers 0: it must be at least 1"),
        ({"draft_vocab": -1}, "--draft_vocab -1: it must not be negative"),
        ({"layers": []}, "--layers"),
        ({"shape": {"hidden_size": 8}}, "--shape hidden_size 8: a head has sizes intermediate_size"),
        ({"init": "nowhere"}, "--init nowhere: neither fresh nor the folder of a head"),
        ({"fc_norm": True, "num_layers": 3}, "--fc_norm with 3 layers"),
    ]:
        with pytest.raises(ValueError, match=said):
            EagleBuilder(**options).check("auto", False)
    with pytest.raises(ValueError, match="deepspeed_stage_3 is for language models: heads train under ddp or fsdp"):
        EagleBuilder().check("deepspeed_stage_3", False)
    EagleBuilder().check("ddp", True)
    target = make_model("llama")
    for options, said in [
        ({"layers": [1, 9]}, "the target's last state is before layer"),
        ({"layers": [1], "shape": {"num_attention_heads": 3, "num_key_value_heads": 2}}, "a head of 3 attention heads"),
    ]:
        with pytest.raises(ValueError, match=said):
            build(target, make_corpus([40, 30]), **options)


def planted_corpus(count=12, length=24):
    """What a target says whose every token is a function of the one before, from random starts."""
    tokens = torch.tensor([[start, *cyclic(start, length - 1)] for start in range(count)]).int().numpy().ravel()
    masks = torch.ones(count, length).bool().numpy().ravel().astype("uint8")
    offsets = torch.arange(count + 1).numpy() * length
    return Corpus(
        tokens, masks, offsets, offsets[:-1].astype("uint64"), offsets[:-1] * 1.0, offsets[1:] * 0 + length - 1, {}
    )


def learned(target, corpus, steps=40, **options):
    """accepted_length of drafts 4 tokens deep, before and after training."""
    draft = build(target, corpus, dtype=torch.float32, layers=[1, 2, 1], **options)
    objective = EagleObjective()
    objective.begin(TrainContext(target, draft.model, corpus, 64, "cpu"))
    batch = assemble(corpus, [[i, i + 1] for i in range(0, len(corpus), 2)], 48)
    optimiser = torch.optim.Adam([weight for weight in draft.parameters() if weight.requires_grad], lr=1e-2)
    engine_target = HFTarget(target, None)
    prompts = [[start, *cyclic(start, 5)] for start in (13, 16, 22)]
    found = []
    for step in range(steps + 1):
        if step in (0, steps):
            draft.eval()
            found.append(accepted_lengths(engine_target, draft.drafters(4), prompts, 11)["accepted_length"])
            draft.train()
        optimiser.zero_grad()
        objective(draft, batch).total.div(500).backward()
        optimiser.step()
    return found


def test_a_head_learns_a_planted_target_to_its_whole_depth():
    target = cyclic_target().float()
    before, after = learned(target, planted_corpus(), draft_vocab=0, unrolls=4)  # as deep as it will draft
    assert before < 2
    # The first token is the target's own; then two steps of four drafted tokens and one of the target's.
    assert after == pytest.approx(11 / 3)
