"""All arms learn the same tokens, and rates are medians of ratios within a round."""

import numpy as np
import pytest

from draftsmith.infer.models.load import load_model
from draftsmith.infer.text.templates import find_template
from draftsmith.recipes.studies import throughput as timing
from draftsmith.recipes.studies.throughput import compared, measure
from draftsmith.train.data.corpus import load_corpus
from draftsmith.train.run.data_module import Batches


def test_every_arm_learns_all_tokens_once_in_each_round(target_folder, chats, tmp_path, monkeypatch, capsys):
    model, tokenizer = load_model(str(target_folder), dtype="float32", device="cpu")
    template = find_template("chat", tokenizer)
    corpus = load_corpus([str(chats)], template, max_length=128, cache=tmp_path / "cache", limit=8)
    every = np.arange(len(corpus))
    batches = Batches(corpus, every, every[:0], max_length=128, batch_size=2, micro_batch_size=2)
    learned = []
    rates = timing._rates
    monkeypatch.setattr(timing, "_rates", lambda marks: learned.append(sum(mark[0] for mark in marks)) or rates(marks))
    found = measure(model, batches, 1, tmp_path)
    assert learned == [int(corpus.loss_counts.sum())] * 8
    assert found["ours_over_cpu"]["ours"] == 1
    assert all(rate > 0 for rounds in found["rounds"].values() for pair in rounds for rate in pair)
    assert "round 1: bare loop" in capsys.readouterr().err


def test_a_ratio_is_taken_within_its_round():
    rates = {"ours": [[10.0, 5.0], [100.0, 5.0], [30.0, 5.0]], "other": [[10.0, 1.0], [50.0, 5.0], [10.0, 10.0]]}
    found = compared(rates)
    assert found["learned_tokens_per_s_wall"] == {"ours": 30, "other": 10}
    assert found["ours_over_wall"]["other"] == pytest.approx(2)
    assert found["ours_over_cpu"]["other"] == pytest.approx(1)
