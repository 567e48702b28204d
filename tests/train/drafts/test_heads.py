"""Heads in training: where each learns, how they begin, and what is refused."""

import pytest
import torch

from draftsmith.train.data.batches import IGNORED, assemble
from draftsmith.train.drafts.heads import future_rows
from draftsmith.train.drafts.hydra import HydraBuilder
from draftsmith.train.drafts.medusa import MedusaBuilder
from draftsmith.train.drafts.trainable import BuildContext


def test_a_head_learns_where_all_tokens_after_its_state_are_learned_ones_of_one_document(make_corpus):
    """Against a loop that looks at every document by itself."""
    corpus, heads = make_corpus([12, 20, 9, 3, 2]), 4
    corpus.masks[20:22] = 0  # a user's turn inside an answer
    packs, length = [[0, 2], [1, 3, 4]], 32
    rows = future_rows(assemble(corpus, packs, length)["labels"], heads)
    found = {(head, int(at)): int(label) for head in range(heads)
             for at, label, kept in zip(rows.at_N, rows.labels_N, rows.kept_KN[head]) if kept}  # fmt: skip
    expected = {}
    for row, samples in enumerate(packs):
        begin = row * length
        for sample in samples:
            tokens, mask = corpus.sample(sample)
            for head in range(heads):
                for at in range(len(tokens) - 2 - head):
                    if mask[at + 1 : at + 3 + head].all():
                        expected[head, begin + at + 1 + head] = int(tokens[at + 2 + head])
            begin += len(tokens)
    assert found == expected
    assert len({head for head, _ in found}) == heads


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gemma3"])
def test_heads_begin_as_the_targets_own_output(kind, make_model, make_corpus):
    target, corpus = make_model(kind), make_corpus([12])
    ids = torch.arange(3, 11)[None]
    output = target(ids, output_hidden_states=True)
    states = output.hidden_states[-1][0]
    path = [torch.randn(8, 32, dtype=torch.float64) for _ in range(3)]
    medusa = MedusaBuilder(3, num_layers=2).build(BuildContext(target, corpus, torch.float64)).model
    hydra = HydraBuilder(3, num_layers=2).build(BuildContext(target, corpus, torch.float64)).model
    for head in range(3):
        torch.testing.assert_close(medusa(states)[:, head], output.logits[0])
        torch.testing.assert_close(hydra.logits(head, states, path[: head + 1]), output.logits[0])


def test_the_same_seed_gives_the_same_start_and_another_dtype_only_rounds(make_model, make_corpus):
    target, corpus = make_model("llama"), make_corpus([12])
    one, two, narrow = (
        HydraBuilder(2, prefix=True).build(BuildContext(target, corpus, dtype, seed=3)).state_dict()
        for dtype in (torch.float32, torch.float32, torch.bfloat16)
    )
    assert all(one[name].equal(two[name]) and narrow[name].equal(one[name].bfloat16()) for name in one)


def test_dropout_acts_in_training_alone(make_model, make_corpus):
    target, corpus = make_model("llama"), make_corpus([12, 20])
    draft = HydraBuilder(2, dropout=0.5).build(BuildContext(target, corpus, torch.float64))
    batch = assemble(corpus, [[0, 1]], 40)
    last = torch.randn(1, 40, 32, dtype=torch.float64)
    calm = [draft.eval()(batch, last)[0][1] for _ in range(2)]
    wild, again, later = (draft.train()({**batch, "rows": torch.tensor([row])}, last)[0][1] for row in (3, 3, 4))
    assert calm[0].equal(calm[1])
    assert not wild.equal(calm[0])
    assert wild.equal(again)
    assert not wild.equal(later)
    assert (batch["labels"] != IGNORED).any()


def test_a_row_drops_the_same_whatever_micro_batch_it_falls_to(make_model, make_corpus):
    target, corpus = make_model("llama"), make_corpus([12, 20, 16])
    draft = HydraBuilder(2, dropout=0.5).build(BuildContext(target, corpus, torch.float64)).train()
    last = torch.randn(2, 40, 32, dtype=torch.float64)
    both, _ = draft(assemble(corpus, [[0, 1], [2]], 40, first=6), last)
    apart = [draft(assemble(corpus, [row], 40, 6 + b), last[b : b + 1])[0] for b, row in enumerate([[0, 1], [2]])]
    for head, states in enumerate(both):
        torch.testing.assert_close(torch.cat([found[head] for found in apart]), states)


@pytest.mark.parametrize(
    ("builder", "strategy", "checkpointing", "said"),
    [
        (MedusaBuilder(0), "auto", False, "--num_heads 0: it must be at least 1"),
        (HydraBuilder(2, num_layers=0), "auto", False, "--num_layers 0: it must be at least 1"),
        (HydraBuilder(2, dropout=1.0), "auto", False, "--dropout 1.0: it must be at least 0 and below 1"),
        (HydraBuilder(2), "deepspeed_stage_2_offload", False, "heads train under ddp or fsdp"),
        (MedusaBuilder(2), "auto", True, "gradient checkpointing is for drafts of many layers"),
    ],
)
def test_options_that_do_not_fit_are_refused(builder, strategy, checkpointing, said):
    with pytest.raises(ValueError, match=said):
        builder.check(strategy, checkpointing)
