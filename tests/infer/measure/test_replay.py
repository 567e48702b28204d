"""Replay: a recorded answer is a target, and what drafters would have drafted of it can be counted by hand."""

from __future__ import annotations

import pytest
from tiny_folders import tiny_llama

from draftsmith.infer.contract import Budget
from draftsmith.infer.drafters import SmallLM
from draftsmith.infer.drafters.controls import Empty
from draftsmith.infer.generate import generate
from draftsmith.infer.hf_target import HFTarget
from draftsmith.infer.measure.replay import Recording, recordings, replay
from draftsmith.infer.record import Message, Record
from draftsmith.infer.row import Row, Stops
from draftsmith.infer.settings import Settings
from draftsmith.infer.templates import find_template
from draftsmith.retrieval import PromptLookup

VOCAB = 40
# After the first token (2), the text repeats the prompt: 3 4 5 6 are drafted from it in one step with 4 nodes, and 7
# comes from the target. From 7 on nothing was met before.
PROMPT = [1, 2, 3, 4, 5, 6, 9]
ANSWER = [2, 3, 4, 5, 6, 7, 8, 10]
SINGLE = PromptLookup(num_draft_tokens=4, max_ngram=2, matches=1)


def figures(drafter, *streams, **options):
    return replay({"it": drafter}, streams, VOCAB, **options)["drafters"]["it"]


def test_the_figures_of_a_small_recording_are_those_counted_by_hand():
    """Steps: [2] nothing known after 9; [3 4 5 6 | 7] drafted 3 4 5 6; [8]; [10]: 8 tokens in 4 steps."""
    found = figures(SINGLE, Recording("a", "qa", PROMPT, ANSWER))
    assert found["steps"] == 4
    assert found["accepted_length"] == 8 / 4
    assert found["hit_rate"] == 1 / 4
    assert found["nodes_per_step"] == 4 / 4
    assert found["acceptance_rate"] == 1.0
    assert [(row["depth"], row["reached"], row["accepted"]) for row in found["by_depth"]] == [
        (1, 1, 1), (2, 1, 1), (3, 1, 1), (4, 1, 1)
    ]  # fmt: skip


def test_a_draft_that_goes_wrong_is_counted_to_where_it_did():
    """After 2 the prompt says 3 4 5 6 and the answer 3 4 11: [2], [3 4 | 11], [1], then 2 3 4 is proposed for 1."""
    found = figures(SINGLE, Recording("a", "qa", PROMPT, [2, 3, 4, 11, 1, 12]))
    assert found["steps"] == 4  # the last token is alone: with nothing left below it, nothing is drafted
    assert found["accepted_length"] == 6 / 4
    assert (found["acceptance_rate"], found["nodes_per_step"]) == (2 / 4, 4 / 4)


def test_the_budget_bounds_nodes_and_depth():
    stream = Recording("a", "qa", PROMPT, ANSWER)
    assert figures(SINGLE, stream, budget=Budget(64, 2))["steps"] == 5  # [2] [3 4 5] [6 7] [8] [10]
    assert figures(SINGLE, stream, budget=Budget(0, 0))["accepted_length"] == 1.0


def test_a_drafter_s_figures_are_those_of_decoding_where_the_recording_is_greedy(shake):
    model = tiny_llama()
    prompts = [[5, 6, 7, 8, 9], [20, 21, 20, 21, 20], list(range(30, 60))]

    def rows():
        return [Row(str(i), list(prompt), Settings(), Stops(40)) for i, prompt in enumerate(prompts)]

    target, empty = HFTarget(model), Empty()
    empty.bind(target)
    recorded = generate(target, empty, rows())
    streams = [Recording(g.row, "", prompts[int(g.row)], g.token_ids) for g in recorded]
    for drafter in (SmallLM(shake(model, 0.06)), SmallLM(shake(model, 0.1), top_k=3, nodes=12), PromptLookup()):
        drafter.bind(target)
        done = generate(target, drafter, rows())
        assert [g.token_ids for g in done] == [g.token_ids for g in recorded]
        steps = sum(len(g.traces) for g in done)
        found = replay({"it": drafter}, streams, target.vocab_size)["drafters"]["it"]
        assert found["accepted_length"] == sum(len(g.token_ids) for g in done) / steps > 1.3
        assert found["nodes_per_step"] == sum(trace.nodes for g in done for trace in g.traces) / steps


def test_sampled_drafts_are_taken_at_temperature_0_only():
    drafter = SmallLM(tiny_llama(VOCAB), sample=True)
    stream = Recording("a", "qa", PROMPT, ANSWER)
    assert figures(drafter, stream)["steps"] <= len(ANSWER)
    with pytest.raises(ValueError, match="outright drafts only"):
        figures(drafter, stream, temperature=0.7)
    outright = figures(SINGLE, stream, temperature=0.7)
    assert outright["accepted_length"] == 2.0


def test_a_token_id_that_the_tokenizer_does_not_have_is_named():
    with pytest.raises(ValueError, match=r"a holds token id 40, and the tokenizer ends at 40"):
        figures(SINGLE, Recording("a", "qa", PROMPT, [1, 40]))


def test_token_ids_of_a_record_are_used_as_they_are(folders):
    template = find_template("chat", folders.tokenizer)
    messages = [Message("user", "one"), Message("assistant", "other text than the ids")]
    record = Record("r", messages=messages, token_ids=[9, 9, 3], prompt_token_ids=[7, 8])
    (found,) = recordings([record], template)
    assert (found.prompt, found.answer) == ([7, 8], [9, 9, 3])
    (found,) = recordings([Record("r", messages=messages, token_ids=[9, 9, 3])], template)
    assert (found.prompt, found.answer) == (template.prompt_ids(messages[:1]), [9, 9, 3])


def test_every_answered_turn_is_a_recording_of_its_own(folders):
    template = find_template("chat", folders.tokenizer)
    said = [Message("user", "one"), Message("assistant", "two"), Message("user", "three"), Message("assistant", "four")]
    found = recordings([Record("r", "qa", messages=said, source="f", row=3)], template)
    assert [one.prompt for one in found] == [template.prompt_ids(said[:1]), template.prompt_ids(said[:3])]
    assert [folders.tokenizer.decode(one.answer) for one in found] == ["two<|end|>", "four<|end|>"]
    assert [one.key for one in found] == ["f:3/0", "f:3/1"]


def test_nothing_to_replay_is_said(folders):
    with pytest.raises(ValueError, match="no record holds an answer"):
        recordings([], find_template("chat", folders.tokenizer))
