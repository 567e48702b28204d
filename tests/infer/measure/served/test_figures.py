"""The figures of a load, from answers whose times are known."""

from __future__ import annotations

import pytest

from draftsmith.infer.answers.server_client import StreamedAnswer
from draftsmith.infer.measure.runners import Question
from draftsmith.infer.measure.served.figures import summarise_load
from draftsmith.infer.measure.served.load import ServedAnswer, ServedLevel, ServedLoad
from draftsmith.infer.measure.served.tables import notes, sentence


def turn(tokens: int, last_s: float, first_s: float = 0.5, text: str = "a") -> StreamedAnswer:
    return StreamedAnswer(text, "stop", first_s, last_s, tokens, 7, None)


def load(count: int = 10, **levels: ServedLevel) -> ServedLoad:
    questions = [Question(number, "qa", ("?",)) for number in range(count)]
    return ServedLoad(questions, 1, 0, {name: [level] for name, level in levels.items()})


def level(wall_s: float, tokens: int = 21, last_s: float = 2.5, count: int = 10, text: str = "a") -> ServedLevel:
    answers = {number: [ServedAnswer([turn(tokens, last_s, text=text)])] for number in range(count)}
    return ServedLevel(4, answers, wall_s)


FACTS = {"url": "http://u", "model": "m"}


def test_speed_is_tokens_over_wall_time_and_waits_are_per_turn():
    own = level(5.0)
    own.answers[3] = [ServedAnswer([turn(11, 1.0, 0.25), turn(31, 4.0, 1.0)])]
    results = summarise_load(load(server=own), {"server": FACTS})
    found = results["levels"][0]["servers"]["server"]
    assert found["tokens_per_s"] == (9 * 21 + 42) / 5.0
    assert found["in_flight"] == pytest.approx((9 * 2.5 + 5.0) / 5.0)
    assert (found["requests"], found["tokens"], found["prompt_tokens"], found["errors"]) == (11, 231, 77, 0)
    assert (found["ttft_p50_s"], found["ttft_p95_s"]) == (0.5, 1.0)
    assert found["tpot_p50_s"] == pytest.approx(0.1)
    assert (found["answer_p50_s"], found["answer_p95_s"]) == (2.5, 4.0)
    low, high = found["tokens_per_s_interval"]
    assert low <= found["tokens_per_s"] <= high
    assert high - low < 0.2 * found["tokens_per_s"]
    assert sentence(results).startswith("m (unknown server): tokens/s 46.2 with 4 requests at a time")


def test_a_failed_question_is_counted_and_has_no_part_in_the_figures():
    own = level(5.0)
    own.answers[3] = [ServedAnswer(error="refused with 429: busy")]
    results = summarise_load(load(server=own), {"server": FACTS})
    found = results["levels"][0]["servers"]["server"]
    assert (found["errors"], found["requests"], found["tokens"]) == (1, 9, 9 * 21)
    assert found["error_list"] == [{"question_id": 3, "error": "refused with 429: busy"}]
    assert "server, 4 at a time, question 3: refused with 429: busy" in notes(results, {})


def test_speedup_is_the_ratio_of_the_two_servers_over_the_questions_that_both_answered():
    own, plain = level(5.0), level(10.0, last_s=5.0, text="b")
    plain.answers[3] = [ServedAnswer(error="x")]
    plain.answers[4] = [ServedAnswer([turn(21, 5.0)])]
    results = summarise_load(load(server=own, plain=plain), {"server": FACTS, "plain": FACTS}, "plain")
    found = results["levels"][0]["servers"]
    # 10 answers in 5 s, against 9 in 10 s: a failed request is time that was lost.
    assert found["server"]["speedup"] == pytest.approx((10 / 5.0) / (9 / 10.0))
    assert found["plain"]["speedup"] == pytest.approx(1.0)
    assert (found["server"]["equal"], found["server"]["total"]) == (1, 9)
    assert found["server"]["speedup_interval"][0] > 1
    assert sentence(results) == "m (unknown server): drafts pay with 4 requests (2.22x [2.22, 2.22]) at a time."
    assert "server: answers with the very text of plain: 1/9" in notes(results, {"temperature": 0.0})
    assert not any("very text" in note for note in notes(results, {"temperature": 0.7}))


def test_few_questions_have_no_interval_and_no_verdict():
    results = summarise_load(
        load(7, server=level(5.0, count=7), plain=level(10.0, count=7)), {"server": FACTS, "plain": FACTS}, "plain"
    )
    found = results["levels"][0]["servers"]["server"]
    assert found["speedup"] == pytest.approx(2.0)
    assert [key for key, value in found.items() if key.endswith("_interval") and value is not None] == []
    assert "it is not known with 4 requests (2.00x) at a time, since fewer than 8 questions" in sentence(results)


def test_prompts_from_the_cache_are_pointed_out():
    own = level(5.0)
    own.answers[3] = [ServedAnswer([StreamedAnswer("a", "stop", 0.5, 2.5, 21, 7, 7)])]
    results = summarise_load(load(server=own), {"server": FACTS})
    assert results["levels"][0]["servers"]["server"]["cached_share"] is None, "nine answers do not say it"
    for number in own.answers:
        own.answers[number] = [ServedAnswer([StreamedAnswer("a", "stop", 0.5, 2.5, 21, 7, 6 if number else 0)])]
    results = summarise_load(load(server=own), {"server": FACTS})
    assert results["levels"][0]["servers"]["server"]["cached_share"] == pytest.approx(54 / 70)
    assert any("77.1% were in its cache" in note for note in notes(results, {}))


def test_answers_of_one_token_have_no_time_per_token():
    results = summarise_load(load(server=level(5.0, tokens=1)), {"server": FACTS})
    found = results["levels"][0]["servers"]["server"]
    assert (found["tpot_p50_s"], found["tpot_p50_s_interval"]) == (None, None)
