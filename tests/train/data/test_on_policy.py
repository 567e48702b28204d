"""On-policy rows: the draft's own answers in the old places, the same for the same row, nothing else changed."""

import pytest
import torch

from draftsmith.train.data.batches import IGNORED, assemble
from draftsmith.train.data.on_policy import OnPolicy, answer_spans


@pytest.fixture(scope="module")
def batch(make_corpus):
    corpus = make_corpus([12, 20, 9])
    return {**assemble(corpus, [[0, 1], [2]], 40), "number": torch.tensor(3)}


def test_spans_are_the_first_learned_run_of_each_document(batch):
    assert answer_spans(batch) == [(0, 0, 5, 6), (0, 12, 21, 10), (1, 0, 3, 5)]


def test_answers_are_the_drafts_own_greedy_ones_where_the_targets_stood(make_model, batch):
    model = make_model("llama").train()
    rewritten = OnPolicy(1.0, 0.0, seed=0)(model, batch)
    assert model.training
    model.eval()
    for b, start, first, count in answer_spans(batch):
        prompt = batch["input_ids"][b, start : first + 1]
        assert rewritten["input_ids"][b, start : first + 1].equal(prompt)
        learned = rewritten["labels"][b, first : first + count]
        ids = prompt.clone()
        for token in learned[learned != IGNORED]:
            assert model(ids[None]).logits[0, -1].argmax() == token
            ids = torch.cat([ids, token[None]])
        assert rewritten["input_ids"][b, start : start + len(ids)].equal(ids)
        # An answer ends early only with an end token.
        assert (learned != IGNORED).all() or ids[-1] == model.config.eos_token_id
    assert rewritten["position_ids"].equal(batch["position_ids"])
    assert ((rewritten["labels"] != IGNORED) <= (batch["labels"] != IGNORED)).all()


def test_draws_depend_on_the_row_and_the_seed_alone(make_model, batch):
    """Not on what else is in the micro-batch."""
    model = make_model("llama")
    draw = lambda seed, rows: OnPolicy(1.0, 1.0, seed)(model, {**batch, "rows": torch.tensor(rows)})  # noqa: E731
    both = draw(0, [3, 4])["input_ids"]
    assert both.equal(draw(0, [3, 4])["input_ids"])
    assert not both.equal(draw(0, [4, 3])["input_ids"])
    assert not both.equal(draw(1, [3, 4])["input_ids"])
    second = {name: value[1:] if value.ndim else value for name, value in batch.items()}
    alone = OnPolicy(1.0, 1.0, 0)(model, {**second, "rows": torch.tensor([4]), "number": torch.tensor(9)})
    assert alone["input_ids"].equal(both[1:])


def test_about_the_share_of_rows_is_rewritten_and_none_without_a_number(make_model, batch):
    model = make_model("llama")
    half = OnPolicy(0.5, 0.0, seed=0)
    count = 0
    for row in range(0, 40, 2):
        done = half(model, {**batch, "rows": torch.tensor([row, row + 1])})
        other = [not done["input_ids"][b].equal(batch["input_ids"][b]) for b in range(2)]
        for b in range(2):
            assert other[b] or done["labels"][b].equal(batch["labels"][b])
        count += sum(other)
    assert 10 <= count <= 30
    held_out = {name: value for name, value in batch.items() if name != "number"}
    assert OnPolicy(1.0, 0.0, seed=0)(model, held_out) is held_out
