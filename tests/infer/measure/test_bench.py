"""The measuring loop: order, warm-up, turns, batches, and errors that stay where they belong."""

import random

import pytest

from draftsmith.infer.measure.bench import bench
from draftsmith.infer.measure.runners import Question


def test_all_runners_answer_a_group_before_the_next_group_begins(fake, coders, questions, clock):
    log: list[str] = []
    names = ["plain", "one", "two"]
    runners = [fake(name, log=log) for name in names]
    bench(runners, questions, *coders, seed=0, warmup=0, clock=clock)
    groups = [log[at : at + 3] for at in range(0, len(log), 3)]
    assert len(groups) == 6
    assert all(sorted(group) == sorted(names) for group in groups)
    assert len({tuple(group) for group in groups}) > 1, "the order has to change from group to group"


def test_the_seed_decides_the_order(fake, coders, questions, clock):
    def order(seed: int) -> list[str]:
        log: list[str] = []
        bench([fake(name, log=log) for name in ("plain", "a", "b")], questions, *coders, seed=seed, clock=clock)
        return log

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_no_runner_is_always_first(fake, coders, clock):
    log: list[str] = []
    many = [Question(i, "qa", (f"q{i}",)) for i in range(60)]
    bench([fake(name, log=log) for name in ("plain", "a")], many, *coders, warmup=0, seed=3, clock=clock)
    assert 15 <= log[::2].count("plain") <= 45


def test_the_global_random_state_is_left_alone(fake, coders, questions, clock):
    random.seed(5)
    expected = random.Random(5).random()
    bench([fake("plain")], questions, *coders, clock=clock)
    assert random.random() == expected


def test_warm_up_is_run_and_not_counted(fake, coders, questions, clock):
    runner = fake("plain")
    measured = bench([runner], questions, *coders, warmup=2, clock=clock)
    assert [call[0] for call in runner.calls] == ["0/0", "1/0", *(f"{i}/0" for i in range(6))]
    assert all(len(outcomes) == 1 for outcomes in measured.outcomes["plain"].values())


def test_a_warm_up_that_fails_warms_nothing(fake, coders, questions, clock):
    runner = fake("plain", fails_on=lambda prompt: prompt.key == "0/0")
    bench([runner], questions, *coders, warmup=1, clock=clock)
    assert [call[0] for call in runner.calls[:3]] == ["0/0", "1/0", "0/0"]


def test_wall_time_is_the_runs_own_and_shared_by_its_rows(fake, coders, questions, clock):
    """Prefill of 0.5 s and 4 steps of 2 s: 8.5 s for one question, and 8.5 / 3 for each of three in a batch."""
    runner = fake("plain", per_step=2, step_s=2.0)
    alone = bench([runner], questions, *coders, clock=clock)
    assert [outcomes[0].turns[0].wall_s for outcomes in alone.outcomes["plain"].values()] == [8.5] * 6
    batched = bench([runner], questions, *coders, batch_size=3, clock=clock)
    assert sum(o[0].turns[0].wall_s for o in batched.outcomes["plain"].values()) == pytest.approx(2 * 8.5)


def test_the_second_turn_is_asked_after_the_runners_own_answer(fake, coders, clock):
    """Each runner answers with its own letters; its second prompt holds them, and not the other's."""
    answers = {"plain": list(b"yes"), "other": list(b"no")}
    runners = [fake(name, answer=lambda prompt, ids=ids: ids) for name, ids in answers.items()]
    measured = bench(runners, [Question("x", "qa", ("first", "second"))], *coders, warmup=0, clock=clock)
    for runner, said in zip(runners, ("yes", "no")):
        assert [prompt.key for prompt in runner.prompts] == ["x/0", "x/1"]
        assert bytes(runner.prompts[1].token_ids).decode() == f"u:first;a:{said};u:second;"
        assert measured.outcomes[runner.name]["x"][0].token_ids == [answers[runner.name]] * 2


def test_questions_of_one_batch_may_have_unlike_numbers_of_turns(fake, coders, clock):
    runner = fake("plain")
    asked = [Question("a", "qa", ("1", "2", "3")), Question("b", "qa", ("1",)), Question("c", "qa", ("1", "2"))]
    measured = bench([runner], asked, *coders, batch_size=3, warmup=0, clock=clock)
    assert runner.calls == [["a/0", "b/0", "c/0"], ["a/1", "c/1"], ["a/2"]]
    assert [len(o[0].turns) for o in measured.outcomes["plain"].values()] == [3, 1, 2]


def test_an_error_is_that_questions_and_that_runners_alone(fake, coders, questions, clock):
    """Spec-Bench writes the figures of the question before in the place of one that failed; here there are none."""
    broken = fake("broken", fails_on=lambda prompt: prompt.key == "2/0")
    measured = bench([fake("plain"), broken], questions, *coders, clock=clock)
    failed = measured.outcomes["broken"][2][0]
    assert failed.error == "RuntimeError: cannot answer 2/0"
    assert failed.turns == []
    assert failed.traces == []
    assert [measured.error("broken", i) != "" for i in range(6)] == [False, False, True, False, False, False]
    assert not any(measured.error("plain", i) for i in range(6))


def test_an_error_in_the_second_turn_takes_the_whole_question(fake, coders, clock):
    runner = fake("plain", fails_on=lambda prompt: prompt.key == "a/1")
    asked = [Question("a", "qa", ("1", "2", "3")), Question("b", "qa", ("1", "2"))]
    measured = bench([runner], asked, *coders, warmup=0, clock=clock)
    assert measured.outcomes["plain"]["a"][0].turns == []
    assert "a/2" not in [key for call in runner.calls for key in call]
    assert len(measured.outcomes["plain"]["b"][0].turns) == 2


def test_one_bad_row_does_not_take_its_batch_along(fake, coders, questions, clock):
    """The others run again as one batch, and only that run is in their figures."""
    runner = fake("plain", fails_on=lambda prompt: prompt.key == "1/0")
    measured = bench([runner], questions[:3], *coders, batch_size=3, warmup=0, clock=clock)
    assert measured.error("plain", 1) == "RuntimeError: cannot answer 1/0"
    assert runner.calls[-1] == ["0/0", "2/0"]
    for question in (0, 2):
        outcome = measured.outcomes["plain"][question][0]
        assert {trace.batch for trace in outcome.traces} == {2}
        assert outcome.turns[0].wall_s == pytest.approx(8.5 / 2)


def test_a_batch_that_fails_only_as_a_whole_fails_for_all_its_rows(fake, coders, questions, clock):
    runner = fake("plain")
    run = runner.run

    def too_big(prompts):
        if len(prompts) > 2:
            raise MemoryError("too big")
        return run(prompts)

    runner.run = too_big
    measured = bench([runner], questions[:3], *coders, batch_size=3, warmup=0, clock=clock)
    assert [measured.error("plain", i) for i in range(3)] == ["MemoryError: too big"] * 3


def test_a_prompt_that_cannot_be_encoded_is_an_error_of_its_question(fake, coders, questions, clock):
    encode, decode = coders

    def strict(messages):
        if messages[0]["content"] == "question 3":
            raise ValueError("too long")
        return encode(messages)

    measured = bench([fake("plain")], questions, strict, decode, batch_size=2, clock=clock)
    assert [i for i in range(6) if measured.error("plain", i)] == [3]


def test_a_runner_that_loses_an_answer_is_caught(fake, coders, questions, clock):
    runner = fake("plain")
    run = runner.run
    runner.run = lambda prompts: run(prompts)[:-1]
    measured = bench([runner], questions[:1], *coders, warmup=0, clock=clock)
    assert "0 answers to 1 prompts" in measured.error("plain", 0)


def test_interruption_is_no_error_of_a_question(fake, coders, questions, clock):
    runner = fake("plain")

    def interrupted(prompts):
        raise KeyboardInterrupt

    runner.run = interrupted
    with pytest.raises(KeyboardInterrupt):
        bench([runner], questions, *coders, clock=clock)


def test_repeats_are_outcomes_of_their_own(fake, coders, questions, clock):
    measured = bench([fake("plain")], questions, *coders, repeats=3, clock=clock)
    assert [len(outcomes) for outcomes in measured.outcomes["plain"].values()] == [3] * 6


def test_progress_has_the_questions_done_the_rate_and_the_time_left(fake, coders, questions, clock):
    seen = []
    runners = [fake("plain"), fake("other", per_step=4)]
    bench(runners, questions, *coders, batch_size=4, repeats=2, warmup=0, progress=seen.append, clock=clock)
    assert [now.questions for now in seen] == [0, 4, 4, 6, 6, 10, 10, 12]
    assert {now.total for now in seen} == {12}
    assert [now.done for now in seen] == [False] * 7 + [True]
    rates = {now.runner: now.tokens_per_s for now in seen if now.questions == 12 or now.runner == "other"}
    assert rates["other"] == pytest.approx(8 * 2 / (0.5 + 2)), "the last group has two questions"
    assert seen[-1].seconds_left == 0
    assert seen[1].seconds_left == pytest.approx(3 * (8.5 + 2.5))
    assert "4/12 questions" in seen[1].line()
    assert seen[1].line().endswith("33 s left")


def test_visits_that_were_measured_before_are_kept_and_the_others_follow_in_the_seed_s_order(
    fake, coders, questions, clock
):
    def run(**options):
        runners = [fake("plain"), fake("a"), fake("b")]
        visits = []
        measured = bench(
            runners, questions, *coders, repeats=2, seed=5, warmup=0, clock=clock, on_visit=visits.append, **options
        )
        return measured, visits, [runner.calls for runner in runners]

    whole, visits, calls = run()
    assert len(visits) == 12
    for done in (0, 1, 7, 12):
        resumed, rest, later = run(done=visits[:done])
        assert [list(visit) for visit in rest] == [list(visit) for visit in visits[done:]], "the order of the seed"
        assert later == [own[done:] for own in calls]
        assert {
            name: {key: len(found) for key, found in by_id.items()} for name, by_id in resumed.outcomes.items()
        } == {name: dict.fromkeys(range(6), 2) for name in ("plain", "a", "b")}
        if done:
            assert resumed.outcomes["a"][0][0] is whole.outcomes["a"][0][0]


@pytest.mark.parametrize(
    ("names", "ids", "options", "message"),
    [
        (["one"], [1], {}, "no runner is called 'plain'"),
        (["plain", "plain"], [1], {}, "two runners are called 'plain'"),
        (["plain"], [1, 1], {}, "question 1 occurs twice"),
        (["plain"], [], {}, "no questions"),
        (["plain"], [1], {"batch_size": 0}, "batch_size is 0"),
        (["plain"], [1], {"repeats": 0}, "repeats is 0"),
    ],
)
def test_wrong_input_is_one_clear_line(fake, coders, clock, names, ids, options, message):
    asked = [Question(i, "qa", ("q",)) for i in ids]
    with pytest.raises(ValueError, match=message):
        bench([fake(name) for name in names], asked, *coders, clock=clock, **options)
