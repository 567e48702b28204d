"""The thread that owns the engine: failures, long waits and cancelled rows reach their clients, and leave nothing."""

from __future__ import annotations

import queue
import threading

import pytest
from running_server import models, until

from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.drafters.controls import Empty
from draftsmith.infer.engine.engine import Engine
from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.infer.serving.engine_thread import EngineThread, Ticket
from draftsmith.infer.serving.errors import ApiError
from draftsmith.infer.serving.metrics import ServerMetrics
from draftsmith.infer.serving.noted_logprobs import LogprobsRule

PROMPT = [5, 9, 40, 77]


class Desk:
    """An engine thread, and the news of each ticket."""

    def __init__(self, batch_size=2, **limits):
        model, _, tokenizer = models()
        target = HFTarget(model, tokenizer)
        drafter = Empty()
        drafter.bind(target)
        rule = LogprobsRule()
        self.engine = Engine(target, drafter, batch_size=batch_size, rule=rule)
        self.thread = EngineThread(self.engine, rule, ServerMetrics(), **limits)

    def ticket(self, most=5, ids=PROMPT, **fields):
        news = queue.SimpleQueue()
        made = Ticket(Row("0", list(ids), stops=Stops(most)), news.put, **fields)
        return made, news

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *problem):
        self.thread.finish()
        assert self.thread.join(20)
        assert len(self.engine) == 0


def tokens(news):
    found, one = [], None
    while one is None or not one.last:
        one = news.get(timeout=20)
        if one.error is not None:
            raise one.error
        found += one.tokens
    return found


def test_rows_join_at_any_time_and_one_that_waits_gets_the_next_seat():
    with Desk(batch_size=2) as desk:
        tickets = [desk.ticket(most) for most in (9, 3, 5, 4)]
        desk.thread.submit([ticket for ticket, _ in tickets])
        found = [tokens(news) for _, news in tickets]
        assert [len(one) for one in found] == [9, 3, 5, 4]
        assert all(one == found[0][: len(one)] for one in found)


def test_a_failed_step_is_repeated_and_changes_nothing():
    with Desk() as desk:
        ticket, news = desk.ticket(8)
        inner, calls = desk.engine.target.score, []

        def score(rows, drafts):
            calls.append(len(rows))
            if len(calls) == 3:
                raise MemoryError("no room")
            return inner(rows, drafts)

        desk.engine.target.score = score
        desk.thread.submit([ticket])
        found = tokens(news)
        desk.engine.target.score = inner
        again, more = desk.ticket(8)
        desk.thread.submit([again])
        assert found == tokens(more)
        assert len(calls) == 9


def test_a_step_that_fails_twice_is_its_rows_error_and_the_next_row_decodes():
    with Desk() as desk:
        ticket, news = desk.ticket(8)
        inner = desk.engine.target.score

        def score(rows, drafts):
            raise RuntimeError("broken")

        desk.engine.target.score = score
        desk.thread.submit([ticket])
        with pytest.raises(ApiError, match="RuntimeError") as problem:
            tokens(news)
        assert problem.value.status == 500
        desk.engine.target.score = inner
        again, more = desk.ticket(8)
        desk.thread.submit([again])
        assert len(tokens(more)) == 8


def test_a_row_with_an_error_of_its_own_ends_alone():
    with Desk() as desk:
        bad, bad_news = desk.ticket(8)
        good, good_news = desk.ticket(8, [6, 7])
        inner = desk.engine.rule.rule

        def rule(draft, distribution, rng):
            if distribution.row is bad.row:
                raise ValueError("the target's logits are NaN")
            return inner(draft, distribution, rng)

        desk.engine.rule.rule = rule
        desk.thread.submit([bad, good])
        with pytest.raises(ApiError, match="NaN"):
            tokens(bad_news)
        assert len(tokens(good_news)) == 8


def held(desk):
    """Hold the engine at its next step; the event lets it go on."""
    go_on, inner = threading.Event(), desk.engine.target.score

    def score(rows, drafts):
        assert go_on.wait(20)
        return inner(rows, drafts)

    desk.engine.target.score = score
    return go_on


def test_a_full_queue_refuses_and_a_row_that_waits_too_long_gets_an_error():
    with Desk(batch_size=1, queue=1, queue_s=0.2) as desk:
        go_on = held(desk)
        first, first_news = desk.ticket(4)
        late, late_news = desk.ticket(4)
        desk.thread.submit([first])
        until(lambda: desk.thread.state()["rows"] == 1)
        desk.thread.submit([late])
        with pytest.raises(ApiError) as full:
            desk.thread.submit([desk.ticket()[0]])
        assert full.value.status == 429
        assert full.value.retry_after_s >= 1
        with pytest.raises(ApiError, match="takes 2") as never:
            desk.thread.submit([desk.ticket()[0] for _ in range(3)])
        assert never.value.status == 400
        threading.Event().wait(0.25)
        go_on.set()
        with pytest.raises(ApiError, match="no seat was free") as problem:
            tokens(late_news)
        assert problem.value.status == 503
        assert len(tokens(first_news)) == 4


def test_cancelled_rows_leave_whether_they_wait_or_decode():
    with Desk(batch_size=1) as desk:
        go_on = held(desk)
        tickets = [desk.ticket(400) for _ in range(3)]
        desk.thread.submit([ticket for ticket, _ in tickets])
        until(lambda: desk.thread.state()["rows"] == 1)
        desk.thread.cancel([ticket for ticket, _ in tickets[:2]])
        go_on.set()
        until(lambda: desk.thread.state() == {"rows": 1, "waiting": 0, "kept": 0})
        assert next(iter(desk.thread._active)) is tickets[2][0].row
        desk.thread.cancel([tickets[2][0]])
        until(lambda: len(desk.engine) == 0 and not desk.engine.busy)


def test_finish_lets_rows_end_and_abort_does_not():
    with Desk(batch_size=1) as desk:
        go_on = held(desk)
        tickets = [desk.ticket(5) for _ in range(2)]
        desk.thread.submit([ticket for ticket, _ in tickets])
        desk.thread.finish()
        with pytest.raises(ApiError, match="shutting down"):
            desk.thread.submit([desk.ticket()[0]])
        go_on.set()
        assert [len(tokens(news)) for _, news in tickets] == [5, 5]
    with Desk(batch_size=1) as desk:
        go_on = held(desk)
        tickets = [desk.ticket(5) for _ in range(2)]
        desk.thread.submit([ticket for ticket, _ in tickets])
        until(lambda: desk.thread.state()["rows"] == 1)
        desk.thread.abort()
        go_on.set()
        for _, news in tickets:
            with pytest.raises(ApiError, match="shutting down") as problem:
                tokens(news)
            assert problem.value.status == 503


def test_when_the_thread_dies_every_client_hears_of_it():
    desk = Desk()

    def step():
        raise SystemExit

    desk.engine.step = step
    tickets = [desk.ticket() for _ in range(3)]
    desk.thread.start()
    desk.thread.submit([ticket for ticket, _ in tickets])
    for _, news in tickets:
        with pytest.raises(ApiError, match="the engine has stopped"):
            tokens(news)
    assert desk.thread.join(20)
    with pytest.raises(ApiError):
        desk.thread.submit([desk.ticket()[0]])
    assert len(desk.engine) == 0
