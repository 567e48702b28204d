"""The unrolled pass of an EAGLE head gives what drafting step by step with a cache gives, documents kept apart."""

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
from draftsmith.train.drafts.unrolled_attention import LayerMemory

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


# One norm over all states, or one for each: not both.
@pytest.mark.parametrize("switches", [some for some in itertools.product([False, True], repeat=4) if not all(some[2:])])
def test_unrolled_logits_are_those_of_drafting_step_by_step(make_corpus, switches):
    corpus = make_corpus([9, 12, 7])
    head = make_head(**dict(zip(SWITCHES, switches)))
    worst, counted = compare_with_steps(head, corpus, [[0, 2], [1]], 20, unrolls=3)
    assert worst < 1e-10
    assert counted == [12, 9, 6]


@pytest.mark.parametrize("how", [{"layers": 2, "norm_output": True}, {"layers": 3}, {"version": 1, "layers": 2}])
def test_of_several_layers_and_of_version_1_too(make_corpus, how):
    worst, counted = compare_with_steps(make_head(**how), make_corpus([9, 12, 7]), [[0, 2], [1]], 20, unrolls=3)
    assert worst < 1e-10
    assert counted == [12, 9, 6]


def test_recomputed_and_deep_unrolls_too(make_corpus):
    head = make_head(norm_before_fc=True)
    assert (
        compare_with_steps(head, make_corpus([9, 12, 7]), [[0, 2], [1]], 20, unrolls=7, checkpointing=True)[0] < 1e-10
    )
    worst, counted = compare_with_steps(head, make_corpus([9, 12, 7]), [[0, 2], [1]], 20, unrolls=1)
    assert worst < 1e-10
    assert counted == [12]


def test_what_is_learned_lies_in_one_answer():
    # Token 3 of the first document is not learned; the second is learned from its token 1 on.
    labels = torch.tensor([[IGNORED, 1, IGNORED, 1, IGNORED, 1, 1, 1, IGNORED]])
    found = learned_pairs(labels, 3)[:, 0].int().tolist()
    assert found == [[0, 0, 0, 0, 0, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1, 0, 0, 0], [0] * 9]
    positions = torch.tensor([[0, 1, 2, 3, 0, 1]])
    assert ahead(positions, 2, -1).tolist() == [[2, 3, 0, 1, -1, -1]]
    assert ahead(positions, -1, -1).tolist() == [[-1, 0, 1, 2, 3, 0]]


def test_low_precision_stays_close(make_corpus):
    """A score of the own keys in bfloat16 alone would be off by more."""
    torch.manual_seed(0)
    query, keys, values = (torch.randn(1, 2, 12, 16) * scale for scale in (6, 1, 1))
    memory = [LayerMemory.of(keys.to(dtype), values.to(dtype)) for dtype in (torch.float64, torch.bfloat16)]
    own = [(torch.randn(1, 2, 12, 16), torch.randn(1, 2, 12, 16)) for _ in range(3)]
    mask = torch.zeros(12, 12).masked_fill(torch.ones(12, 12, dtype=torch.bool).triu(1), -1e9)
    mask = torch.nn.functional.pad(mask, (0, 1))[None, None]
    found = []
    for held, dtype in zip(memory, (torch.float64, torch.bfloat16)):
        pairs = tuple((key.to(torch.bfloat16).to(dtype), value.to(torch.bfloat16).to(dtype)) for key, value in own)
        now = LayerMemory(held.keys, held.values, pairs)
        found.append(now.attend(query.to(torch.bfloat16).to(dtype), mask.to(dtype)).double())
    assert (found[0] - found[1]).abs().max() < 0.06
