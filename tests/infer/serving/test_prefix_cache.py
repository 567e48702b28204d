"""What was read once is not read again: turns of a conversation, and questions behind one system message."""

from __future__ import annotations

import openai
import pytest
from running_server import IDS, MODEL, RunningServer, alone, models, row_of, until

from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.drafters import SmallLM
from draftsmith.infer.drafters.controls import Empty
from draftsmith.infer.engine.engine import Engine
from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.infer.serving.engine_thread import shares_prefixes
from draftsmith.infer.serving.prefix_cache import PrefixCache

SYSTEM = {"role": "system", "content": "you answer in the words of a fox " * 9}


def ask(client, *messages, **fields):
    fields.setdefault("max_tokens", 20)
    return client.chat.completions.create(model=MODEL, messages=[*messages], extra_body=IDS, **fields)


def question(text):
    return {"role": "user", "content": text}


def test_a_later_turn_and_another_question_share_what_was_read_and_say_what_they_say_alone(tiny):
    model, draft, tokenizer = tiny
    with (
        RunningServer(model, tokenizer, SmallLM(draft, min_confidence=0.0), prefix_cache=1500) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        first = ask(client, SYSTEM, question("one?"))
        said = {"role": "assistant", "content": "fox!"}
        answers = [
            first,
            ask(client, SYSTEM, question("one?"), said, question("and two?")),
            ask(client, SYSTEM, question("three?")),
            ask(client, question("you answer")),
        ]
        shared = [answer.usage.prompt_tokens_details.cached_tokens for answer in answers]
        system = len(tokenizer.apply_chat_template([SYSTEM])["input_ids"])
        assert shared[0] == shared[3] == 0
        assert shared[1] >= shared[2] >= system - system % 64 > 100
        for answer in answers:
            row = row_of(server, answer.prompt_token_ids, 20)
            assert alone(server, row).token_ids == answer.choices[0].token_ids
        counted = server.thread.metrics.registry.get_sample_value("draftsmith_cached_tokens_total")
        assert counted == sum(shared)
        # What the target was given to read is what was not shared.
        until(server.idle)
        assert server.thread.cache.tokens <= 1500
    assert len(server.engine) == 0
    assert not server.target._features


def test_the_cache_holds_no_more_than_its_bound_and_forgets_what_was_used_least_recently(tiny):
    model, _, tokenizer = tiny
    with (
        RunningServer(model, tokenizer, prefix_cache=400) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        texts = ["a b c d e f g h " * 8, "i j k l m n o p " * 8, "q r s t u v w x " * 8]
        cached = {}
        for text in (texts[0], texts[1], texts[0], texts[2], texts[0], texts[1]):
            answer = ask(client, question(text), max_tokens=2)
            cached.setdefault(text, []).append(answer.usage.prompt_tokens_details.cached_tokens > 0)
            until(server.idle)
            assert server.thread.cache.tokens <= 400
        assert cached == {texts[0]: [False, True, True], texts[1]: [False, False], texts[2]: [False]}


@pytest.fixture
def engine():
    model, _, tokenizer = models()
    return Engine(HFTarget(model, tokenizer), Empty(), batch_size=4)


def decoded(engine, ids):
    row = engine.add(Row("0", ids, stops=Stops(2)), keep=True)
    while not row.stop:
        engine.step()
    return row


def test_a_row_takes_the_place_of_those_that_it_continues_and_short_ones_are_not_kept(engine):
    engine.drafter.bind(engine.target)
    cache = PrefixCache(engine, 1000)
    long = [5 + i % 90 for i in range(200)]
    for ids in (long[:130], long, [7] * 130, long[:40]):
        cache.add(decoded(engine, ids))
    assert len(cache) == len(engine) == 2
    assert cache.tokens == 202 + 132
    joining = Row("0", long[:150])
    assert cache.shared_by(joining) == 128
    assert cache.shared_by(Row("0", [9] * 100), [Row("1", [9] * 100)]) == 64
    cache.clear()
    assert len(engine) == 0


def test_with_a_drafter_that_reads_states_nothing_is_kept(tiny):
    model, _, tokenizer = tiny

    class ReadsStates(Empty):
        features = ("layer:1",)

    drafter = ReadsStates()
    engine = Engine(HFTarget(model, tokenizer), drafter)
    assert not shares_prefixes(engine)
    with RunningServer(model, tokenizer, drafter, prefix_cache=400) as server:
        assert server.thread.cache is None
