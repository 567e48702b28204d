"""Results against hand-computed values: runners with known seconds a step and tokens a step."""

import json

import pytest

from draftsmith.infer.measure.bench import bench
from draftsmith.infer.measure.figures import summarise
from draftsmith.infer.measure.runners import Question

KEYS = {
    "tokens_per_s",
    "end_to_end_tokens_per_s",
    "speedup",
    "speedup_interval",
    "accepted_length",
    "acceptance_rate",
    "hit_rate",
    "nodes_per_step",
    "overhead",
    "equal",
    "total",
}


@pytest.fixture
def measure(coders, questions, clock):
    def run(runners, asked=None, min_distinct=0.0, **options):
        measured = bench(runners, asked or questions, *coders, clock=clock, **options)
        return summarise(measured, min_distinct=min_distinct)

    return run


def test_every_runner_has_the_keys_that_stay_and_they_are_json(measure, fake):
    results = json.loads(json.dumps(measure([fake("plain"), fake("draft"), fake("peer", traced=False)])))
    assert set(results["drafters"]) == {"plain", "draft", "peer"}
    for row in results["drafters"].values():
        assert set(row) >= KEYS


def test_speed_by_hand(measure, fake):
    """Plain: 8 tokens, 8 steps of 1 s. Draft: 4 tokens a step of 1.25 s, 2 steps. Both: 0.5 s of prefill."""
    results = measure([fake("plain"), fake("draft", per_step=4, step_s=1.25)])
    plain, draft = results["drafters"]["plain"], results["drafters"]["draft"]
    assert plain["tokens_per_s"] == pytest.approx(1.0)
    assert plain["end_to_end_tokens_per_s"] == pytest.approx(8 / 8.5)
    assert plain["speedup"] == 1.0
    assert plain["speedup_interval"] is None, "six questions"
    assert plain["accepted_length"] == 1.0
    assert draft["tokens_per_s"] == pytest.approx(8 / 2.5)
    assert draft["speedup"] == pytest.approx(3.2)
    assert draft["speedup_interval"] is None, "six questions"
    assert draft["speedup_of"] == "decode"
    assert draft["end_to_end_speedup"] == pytest.approx(8.5 / 3.0)
    assert draft["accepted_length"] == 4.0
    assert draft["break_even"] == pytest.approx(1.25)
    assert draft["hit_rate"] == 1.0
    assert draft["nodes_per_step"] == 3.0
    assert draft["ttft_s"] == pytest.approx(1.75)
    assert draft["p95_step_s"] == 1.25
    assert (draft["equal"], draft["total"], draft["errors"]) == (6, 6, 0)


def test_a_batch_is_counted_by_its_wall_time(measure, fake):
    """Three rows share 8 steps of 1 s: 24 tokens in 8 s of decoding, 8.5 s in all."""
    plain = measure([fake("plain")], batch_size=3)["drafters"]["plain"]
    assert plain["tokens_per_s"] == pytest.approx(3.0)
    assert plain["end_to_end_tokens_per_s"] == pytest.approx(24 / 8.5)
    assert plain["p50_step_s"] == 1.0
    assert plain["accepted_length"] == 1.0


def test_a_peer_without_traces_is_compared_end_to_end_and_says_so(measure, fake):
    peer = measure([fake("plain"), fake("peer", step_s=0.5, traced=False)])["drafters"]["peer"]
    assert peer["speedup_of"] == "end_to_end"
    assert peer["speedup"] == pytest.approx(8.5 / 4.5)
    assert peer["speedup"] == peer["end_to_end_speedup"]
    for key in ("tokens_per_s", "accepted_length", "accepted_length_interval", "hit_rate", "break_even", "ttft_s"):
        assert peer[key] is None
    assert peer["by_depth"] == []


def test_failed_questions_leave_the_pairs_of_that_runner_only(measure, fake):
    """Question 0 takes plain ten times as long; where a runner fails it, plain's long one may not count against it."""
    plain = fake("plain", answer=lambda prompt: list(range(80 if prompt.key == "0/0" else 8)))
    same = fake("same", answer=plain.answer)
    broken = fake("broken", answer=plain.answer, step_s=0.5, fails_on=lambda prompt: prompt.key == "0/0")
    rows = measure([plain, same, broken])["drafters"]
    assert (rows["broken"]["errors"], rows["broken"]["pairs"], rows["broken"]["unpaired"]) == (1, 5, 1)
    assert (rows["broken"]["equal"], rows["broken"]["total"]) == (5, 6)
    assert rows["broken"]["tokens"] == 40
    assert rows["broken"]["speedup"] == pytest.approx(2.0)
    assert rows["broken"]["error_list"] == [{"question_id": 0, "error": "RuntimeError: cannot answer 0/0"}]
    assert rows["same"]["tokens"] == rows["plain"]["tokens"] == 120


def test_where_plain_fails_there_is_no_pair_and_no_equal_answer(measure, fake):
    rows = measure([fake("plain", fails_on=lambda prompt: prompt.key == "1/0"), fake("draft")])["drafters"]
    draft = rows["draft"]
    assert (draft["pairs"], draft["equal"], draft["total"], draft["errors"], draft["unpaired"]) == (5, 5, 6, 0, 1)
    assert rows["plain"]["errors"] == 1


def test_all_failed_gives_nothing_rather_than_a_number(measure, fake):
    row = measure([fake("plain"), fake("broken", fails_on=lambda prompt: True)])["drafters"]["broken"]
    assert (row["equal"], row["errors"], row["pairs"]) == (0, 6, 0)
    for key in ("tokens_per_s", "speedup", "speedup_interval", "accepted_length", "end_to_end_tokens_per_s"):
        assert row[key] is None


def test_the_first_difference_is_given_by_question_turn_and_token(measure, fake):
    def other(prompt):
        return [1, 2, 3, 4] if prompt.key != "b/1" else [1, 2, 9, 4]

    asked = [Question("a", "qa", ("1", "2")), Question("b", "qa", ("1", "2"))]
    rows = measure([fake("plain", answer=lambda prompt: [1, 2, 3, 4]), fake("draft", answer=other)], asked)["drafters"]
    assert (rows["draft"]["equal"], rows["draft"]["total"]) == (1, 2)
    assert rows["draft"]["differences"] == [
        {"question_id": "b", "repeat": 0, "turn": 1, "by": "token_ids", "index": 2, "base": 3, "other": 9}
    ]


def test_an_answer_that_ends_early_differs_where_it_ends(measure, fake):
    runners = [fake("plain", answer=lambda prompt: [1, 2, 3]), fake("draft", answer=lambda prompt: [1, 2])]
    difference = measure(runners)["drafters"]["draft"]["differences"][0]
    assert (difference["index"], difference["base"], difference["other"]) == (2, 3, None)


def test_a_plain_decoder_that_contradicts_itself_is_found_by_repeats(measure, fake):
    said = iter(range(100))
    rows = measure([fake("plain", answer=lambda prompt: [next(said)])], repeats=2, warmup=0)["drafters"]
    assert (rows["plain"]["equal"], rows["plain"]["total"]) == (0, 6)


def test_repeats_add_up(measure, fake):
    plain = measure([fake("plain")], repeats=3)["drafters"]["plain"]
    assert plain["tokens"] == 3 * 6 * 8
    assert plain["pairs"] == 6
    assert plain["tokens_per_s"] == pytest.approx(1.0)


def test_categories_of_mt_bench_are_reported_as_one(measure, fake):
    """Writing and math are MT-Bench; the draft is faster in qa only."""
    plain = fake("plain", answer=lambda prompt: list(range(8)))
    draft = fake("draft", answer=plain.answer, per_step=2)
    tasks = measure([plain, draft])["drafters"]["draft"]["by_category"]
    assert {task: row["pairs"] for task, row in tasks.items()} == {"mt_bench": 4, "qa": 2}
    assert tasks["mt_bench"]["speedup"] == pytest.approx(2.0)
    assert (tasks["qa"]["equal"], tasks["qa"]["total"]) == (2, 2)


class TestLoopingAnswers:
    """Questions 0 and 1 loop; the draft is 4 times as fast there, and no faster elsewhere."""

    @pytest.fixture
    def runners(self, fake, clock):
        def answer(prompt):
            return [1, 2] * 20 if prompt.key in ("0/0", "1/0") else list(range(40))

        plain, draft = fake("plain", answer=answer), fake("draft", answer=answer)
        run = draft.run

        def quick(prompts):
            draft.per_step = 4 if prompts[0].key in ("0/0", "1/0") else 1
            return run(prompts)

        draft.run = quick
        return [plain, draft]

    def test_they_are_left_out_of_the_figures_and_counted(self, measure, runners):
        results = measure(runners, min_distinct=0.5)
        draft = results["drafters"]["draft"]
        assert draft["speedup"] == pytest.approx(1.0)
        assert draft["pairs"] == 4
        assert draft["all_questions"]["speedup"] == pytest.approx(240 / 180)
        assert draft["all_questions"]["pairs"] == 6
        assert results["left_out"]["ids"] == [0, 1]
        assert results["left_out"]["share"] == pytest.approx(1 / 3)

    def test_they_still_count_for_equality(self, measure, runners):
        draft = measure(runners, min_distinct=0.5)["drafters"]["draft"]
        assert (draft["equal"], draft["total"]) == (6, 6)

    def test_without_the_threshold_nothing_is_left_out(self, measure, runners):
        results = measure(runners)
        assert results["left_out"]["questions"] == 0
        assert "all_questions" not in results["drafters"]["draft"]
