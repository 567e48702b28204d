"""The unrolled pass of an EAGLE head gives what drafting gives, step by step with a cache, and no document another's."""

import itertools

import pytest
import torch
from transformers import LlamaConfig

from draftsmith.infer.heads.eagle import EagleDesign, EagleHead
from draftsmith.infer.models.runner.entries import Entries
from draftsmith.infer.models.runner.masks import MaskPlan
from draftsmith.infer.models.runner.model_runner import ModelRunner
from draftsmith.train.data.batches import IGNORED, assemble
from draftsmith.train.drafts.unrolled import UnrolledHead, ahead, learned_pairs

WIDTH, WIDE, VOCAB = 16, 12, 61
SWITCHES = ("norm_before_residual", "norm_output", "norm_before_fc", "fc_norm")


def make_head(layers=1, version=3, seed=0, **switches):
    """A random head in float64 whose norms have random weights, too."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=False,
    )  # fmt: skip
    features = ("layer:1", "layer:2", "layer:3") if version == 3 else ("last",)
    wide = WIDE if version == 3 else WIDTH
    head = EagleHead(config, EagleDesign(version, features, wide, **switches), own_embedding=True).double()
    for name, weight in head.named_parameters():
        torch.nn.init.uniform_(weight, 0.5, 1.5) if "norm" in name else torch.nn.init.normal_(weight, std=0.4)
    return head


def features_of(head, batch, seed=1):
    """Random states of a target, of which token i's depends on the token itself alone."""
    table = torch.randn(
        (VOCAB, head.design.feature_width * len(head.features)), dtype=torch.float64,
        generator=torch.Generator().manual_seed(seed),
    )  # fmt: skip
    chunks = table[batch["input_ids"]].chunk(len(head.features), -1)
    return dict(zip(head.features, chunks))


def stepwise(head, features, tokens, unrolls):
    """[K, n] rows of logits: of pair i with the true pairs before it in a cache, then down the text, its own states fed
    back."""
    runner = ModelRunner(head, MaskPlan())
    count = len(tokens)
    joined = head.joined(features)
    found = {}
    for i in range(count - 1):
        runner.open("row")
        pairs = head.pairs(torch.tensor(tokens[1 : i + 1], dtype=torch.long), joined[:i])
        if i:
            runner.forward(["row"], [Entries(tokens[1 : i + 1], list(range(-1, i - 1)), pairs)])
            runner.commit(["row"], [range(i)])
        state = joined[i : i + 1]
        for t in range(min(unrolls, count - 1 - i)):
            pair = head.pairs(torch.tensor([tokens[i + 1 + t]]), state)
            output = runner.forward(["row"], [Entries([tokens[i + 1 + t]], [t - 1], pair)], [head.recurrent])
            state = output.taps[head.recurrent]
            found[t, i] = output.logits_NV[0]
        runner.close("row")
    return found


@torch.no_grad()
def compare_with_steps(head, corpus, packs, length, unrolls, checkpointing=False):
    """The greatest difference between both ways over all predictions of `packs`, and how many there are by unroll."""
    batch = assemble(corpus, packs, length)
    features = features_of(head, batch)
    found = UnrolledHead(head, unrolls, checkpointing)(batch, features)
    starts = {}
    worst, counted = 0.0, [0] * unrolls
    for b, pack in enumerate(packs):
        at = 0
        for sample in pack:
            tokens = [int(token) for token in corpus.sample(sample)[0]]
            own = {name: states[b, at : at + len(tokens)] for name, states in features.items()}
            for (t, i), logits in stepwise(head, own, tokens, unrolls).items():
                starts[t, b * length + at + i] = logits
            at += len(tokens)
    for t in range(unrolls):
        ours = head.logits(found.states_KND[t])
        for n, place in enumerate(found.places_N.tolist()):
            if found.learned_KN[t, n]:
                worst = max(worst, float((ours[n] - starts[t, place - 1 - t]).abs().max()))
                counted[t] += 1
    return worst, counted


@pytest.mark.parametrize("switches", list(itertools.product([False, True], repeat=4)))
def test_unrolled_logits_are_those_of_drafting_step_by_step(make_corpus, switches):
    corpus = make_corpus([9, 12, 7])
    head = make_head(**dict(zip(SWITCHES, switches)))
    worst, counted = compare_with_steps(head, corpus, [[0, 2], [1]], 20, unrolls=3)
    assert worst < 1e-10
    assert counted == [15, 12, 9]
