"""The server as OpenAI's own client meets it, unchanged."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request

import openai
import pytest
import torch
from running_server import IDS, MODEL, RunningServer, alone, row_of, until

from draftsmith.infer.drafters import SmallLM
from draftsmith.infer.serving.requests import CompletionRequest

HELLO = [{"role": "user", "content": "what does the fox say?"}]


def chat(client, messages=HELLO, **fields):
    fields.setdefault("max_tokens", 24)
    return client.chat.completions.create(model=MODEL, messages=messages, **fields)


def test_a_chat_is_rendered_by_the_targets_template_and_gets_plain_decodings_tokens(server, client):
    answer = chat(client, extra_body=IDS)
    tokenizer = server.target.tokenizer
    prompt = tokenizer.apply_chat_template(HELLO, add_generation_prompt=True)["input_ids"]
    assert answer.prompt_token_ids == prompt
    done = alone(server, row_of(server, prompt))
    (choice,) = answer.choices
    assert choice.token_ids == done.token_ids
    assert choice.message.content == done.text
    assert choice.message.role == "assistant"
    assert choice.finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(prompt), len(done.token_ids))
    assert answer.usage.total_tokens == len(prompt) + len(done.token_ids)
    assert len({*done.token_ids}) > 3
    steps = server.thread.metrics.registry.get_sample_value("draftsmith_accepted_length", {"drafter": "small"})
    assert steps > 1.2  # drafts were accepted, or nothing was shown


def test_a_streamed_chat_is_the_same_text_in_many_chunks_and_ends_with_usage(client):
    whole = chat(client, temperature=0.8, seed=5)
    chunks = list(chat(client, temperature=0.8, seed=5, stream=True, stream_options={"include_usage": True}))
    *own, last = chunks
    assert own[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in own) == whole.choices[0].message.content
    assert own[-1].choices[0].finish_reason == "length"
    assert [chunk.usage for chunk in own] == [None] * len(own)
    assert last.choices == []
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert len(chunks) > 6
    assert len({chunk.id for chunk in chunks}) == 1


def test_n_answers_have_streams_of_their_own_and_a_seed_repeats_them(server, client):
    first = chat(client, n=3, temperature=1.0, seed=7, extra_body=IDS)
    again = chat(client, n=3, temperature=1.0, seed=7, extra_body=IDS)
    other = chat(client, n=3, temperature=1.0, seed=8, extra_body=IDS)
    texts = [choice.token_ids for choice in first.choices]
    assert [choice.index for choice in first.choices] == [0, 1, 2]
    assert len({tuple(ids) for ids in texts}) == 3
    assert texts == [choice.token_ids for choice in again.choices]
    assert texts != [choice.token_ids for choice in other.choices]
    for number, ids in enumerate(texts):
        row = row_of(server, first.prompt_token_ids, key=str(number), temperature=1.0, seed=7)
        draft = SmallLM(server.drafter.model, min_confidence=0.0)
        assert alone(server, row, draft).token_ids == ids
    assert first.usage.completion_tokens == sum(map(len, texts))
    assert first.usage.prompt_tokens == len(first.prompt_token_ids)


def test_without_a_seed_each_request_draws_anew(client):
    assert len({chat(client, temperature=1.0).choices[0].message.content for _ in range(4)}) > 1


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_before_itself(client, stream):
    whole = chat(client, temperature=0.9, seed=3, max_tokens=60).choices[0].message.content
    stop = whole[len(whole) // 2 :][:3]
    before = whole[: whole.index(stop)]
    found = chat(client, temperature=0.9, seed=3, max_tokens=60, stop=["never this", stop], stream=stream)
    if stream:
        chunks = list(found)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        finish = chunks[-1].choices[0].finish_reason
    else:
        text, finish = found.choices[0].message.content, found.choices[0].finish_reason
    assert text == before
    assert finish == "stop"


def test_logprobs_are_the_models_own_at_any_temperature(server, client):
    answer = chat(client, logprobs=True, top_logprobs=3, temperature=0.7, top_p=0.9, seed=2, extra_body=IDS)
    (choice,) = answer.choices
    ids = torch.tensor([answer.prompt_token_ids + choice.token_ids])
    with torch.inference_mode():
        wanted = torch.log_softmax(server.target.model(ids).logits[0].double(), -1)
    start = len(answer.prompt_token_ids) - 1
    tokenizer = server.target.tokenizer
    assert len(choice.logprobs.content) == len(choice.token_ids)
    for i, (token, entry) in enumerate(zip(choice.token_ids, choice.logprobs.content)):
        assert entry.logprob == pytest.approx(float(wanted[start + i, token]))
        best = torch.topk(wanted[start + i], 3)
        assert [one.logprob for one in entry.top_logprobs] == pytest.approx(best.values.tolist())
        assert [one.token for one in entry.top_logprobs] == [tokenizer.decode([t]) for t in best.indices.tolist()]
        assert entry.token == tokenizer.decode([token])
    streamed = []
    for chunk in chat(client, logprobs=True, top_logprobs=3, temperature=0.7, top_p=0.9, seed=2, stream=True):
        if chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.content
    assert streamed == choice.logprobs.content


def test_two_requests_with_one_seed_at_once_keep_their_logprobs_apart(server, client):
    prompts = [[{"role": "user", "content": text}] for text in ("one", "two", "three")]
    asked = {"temperature": 1.0, "seed": 1, "logprobs": True}
    alone_ones = [chat(client, messages, **asked).choices[0].logprobs for messages in prompts]
    found = [None] * 3

    def ask(index):
        found[index] = chat(client, prompts[index], **asked).choices[0].logprobs

    threads = [threading.Thread(target=ask, args=[i]) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for own, beside in zip(alone_ones, found, strict=True):
        assert [one.token for one in own.content] == [one.token for one in beside.content]
        assert [one.logprob for one in own.content] == pytest.approx([one.logprob for one in beside.content])


def test_completions_take_texts_and_ids_alone_and_in_lists(server, client):
    tokenizer = server.target.tokenizer
    text = "the quick brown"
    ids = tokenizer(text)["input_ids"]
    made = client.completions.create(model=MODEL, prompt=[text, "fox jumps"], max_tokens=9, n=2, temperature=1, seed=4)
    by_ids = client.completions.create(model=MODEL, prompt=ids, max_tokens=9, n=2, temperature=1, seed=4, logprobs=1)
    assert [choice.index for choice in made.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in made.choices[:2]] == [choice.text for choice in by_ids.choices]
    assert len({choice.text for choice in made.choices}) == 4
    logprobs = by_ids.choices[0].logprobs
    assert len(logprobs.tokens) == len(logprobs.token_logprobs) == len(logprobs.text_offset) == 9
    chunks = client.completions.create(model=MODEL, prompt=ids, max_tokens=9, temperature=1, seed=4, stream=True)
    assert "".join(chunk.choices[0].text for chunk in chunks) == by_ids.choices[0].text


def test_tools_and_tool_calls_reach_the_template(server, client):
    tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
    call = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "user", "content": [{"type": "text", "text": "warm?"}, {"type": "text", "text": "today"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "31"},
    ]
    answer = chat(client, messages, tools=[tool], extra_body=IDS, max_tokens=1)
    text = server.target.tokenizer.decode(answer.prompt_token_ids)
    assert text == (
        "<|start|>tools\nweather <|end|>\n<|start|>system\nbe brief<|end|>\n<|start|>user\nwarm?\ntoday<|end|>\n"
        "<|start|>assistant\nweather:Rome<|end|>\n<|start|>tool\n31<|end|>\n<|start|>assistant\n"
    )
    without = chat(client, messages, tools=[tool], tool_choice="none", extra_body=IDS, max_tokens=1)
    assert not server.target.tokenizer.decode(without.prompt_token_ids).startswith("<|start|>tools")


def test_closing_a_stream_ends_its_rows(server, client):
    stopped = server.thread.metrics.registry.get_sample_value("draftsmith_aborted_rows_total")
    stream = chat(client, n=2, temperature=1.0, max_tokens=64, stream=True)
    next(stream)
    stream.close()
    until(server.idle)
    assert server.thread.metrics.registry.get_sample_value("draftsmith_aborted_rows_total") == stopped + 2


def test_the_model_list(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


@pytest.mark.parametrize(
    ("fields", "kind", "param", "says"),
    [
        ({"model": "other"}, openai.NotFoundError, "model", "there is no model 'other' here, only 'tiny'"),
        ({"frequency_penalty": 0.5}, openai.BadRequestError, "frequency_penalty", "not supported"),
        ({"response_format": {"type": "json_object"}}, openai.BadRequestError, "response_format", "not supported"),
        ({"tool_choice": "required"}, openai.BadRequestError, "tool_choice", "not supported"),
        ({"extra_body": {"beam_width": 4}}, openai.BadRequestError, "beam_width", "unknown field beam_width"),
        ({"temperature": 3}, openai.BadRequestError, "temperature", "less than or equal to 2"),
        ({"temperature": "hot"}, openai.BadRequestError, "temperature", "valid number"),
        ({"messages": []}, openai.BadRequestError, "messages", "at least 1 item"),
        ({"messages": [{"role": "cook"}]}, openai.BadRequestError, "messages[0].role", "'system'"),
        ({"max_tokens": 65}, openai.BadRequestError, "max_tokens", "more than the 64"),
        ({"n": 100}, openai.BadRequestError, "n", "at most 68"),
        ({"top_logprobs": 2}, openai.BadRequestError, "top_logprobs", "needs logprobs"),
        ({"stop": ["ok", ""]}, openai.BadRequestError, "stop[1]", "at least 1 character"),
        (
            {"messages": [{"role": "user", "content": "a b " * 500}]},
            openai.BadRequestError,
            "messages",
            "context of 512",
        ),
    ],
)
def test_errors_have_openais_classes_and_name_the_field(client, fields, kind, param, says):
    with pytest.raises(kind) as problem:
        client.chat.completions.create(**{"model": MODEL, "messages": HELLO, **fields})
    assert problem.value.param == param
    assert says in problem.value.body["message"]
    assert problem.value.type == "invalid_request_error"


def test_fields_with_the_values_that_change_nothing_are_accepted(client):
    chat(
        client, frequency_penalty=0, presence_penalty=0.0, logit_bias={}, response_format={"type": "text"},
        tool_choice="auto", user="me", store=False, max_tokens=2,
    )  # fmt: skip


def post(url, body=b"{}", headers=None):
    asked = urllib.request.Request(url, body, {"Content-Type": "application/json", **(headers or {})})
    try:
        with urllib.request.urlopen(asked, timeout=20) as response:
            return response.status, response.read()
    except urllib.error.HTTPError as problem:
        with problem:
            return problem.code, problem.read()


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model": NaN}', b'{"a":' * 5000, b'{"model": "\\ud800"}', b"7"]
)
def test_bodies_that_are_no_request_get_400(server, body):
    for path in ("/v1/chat/completions", "/v1/completions"):
        status, found = post(server.url + path, body)
        assert status == 400
        assert json.loads(found)["error"]["type"] == "invalid_request_error"


def test_what_is_not_served_gets_404_or_405(server):
    assert post(f"{server.url}/v1/embeddings")[0] == 404
    assert post(f"{server.url}/v1/models")[0] == 405
    assert json.loads(post(f"{server.url}/%ff%fe")[1])["error"]["code"] == "not_found"


def test_health_and_metrics_say_what_goes_on(server, client):
    chat(client)
    until(server.idle)
    with urllib.request.urlopen(f"{server.url}/health") as response:
        found = json.load(response)
    assert found["status"] == "ok"
    assert found["rows"] == found["waiting"] == 0
    with urllib.request.urlopen(f"{server.url}/metrics") as response:
        text = response.read().decode()
    for line in (
        'draftsmith_requests_total{endpoint="/v1/chat/completions",status="200"}',
        'draftsmith_accepted_length{drafter="small"}',
        'draftsmith_accepted_length_by_source{drafter="small",source="small"}',
        "draftsmith_ttft_seconds_bucket",
        "draftsmith_step_seconds_count",
        "draftsmith_rows 0.0",
    ):
        assert line in text


def test_keys_body_limit_and_a_full_queue(tiny):
    model, _, tokenizer = tiny
    with (
        RunningServer(
            model, tokenizer, batch_size=1, queue=1, queue_s=0.3, max_new_tokens=400, keys=["one", "zwei"],
            body_bytes=2000,
        ) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="zwei", max_retries=0) as client,
    ):  # fmt: skip
        with pytest.raises(openai.AuthenticationError):
            chat(client.with_options(api_key="three"))
        assert post(f"{server.url}/v1/models", headers={"Authorization": "one"})[0] == 405
        assert post(f"{server.url}/v1/completions")[0] == 401
        key = {"Authorization": "Bearer one"}
        assert post(f"{server.url}/v1/completions", b"{" + b" " * 2000, key)[0] == 413
        streams = [chat(client, max_tokens=400, stream=True)]
        next(streams[0])
        waited = []

        def wait():
            with pytest.raises(openai.InternalServerError) as problem:
                chat(client)
            waited.append(problem.value)

        waiting = threading.Thread(target=wait)
        # The engine is held, so that the row in it does not end meanwhile.
        with server.thread._changed:
            waiting.start()
        until(lambda: server.thread.state()["waiting"] == 1 or waited)
        if not waited:
            with pytest.raises(openai.RateLimitError) as full:
                chat(client)
            assert int(full.value.response.headers["retry-after"]) >= 1
        waiting.join()
        assert waited[0].status_code == 503
        assert "no seat was free within 0.3 s" in waited[0].message
        streams[0].close()
        until(server.idle)


def test_prompts_are_those_that_were_given():
    asked = CompletionRequest(model="m", prompt=[[1, 2], [3]])
    assert asked.prompts == [[1, 2], [3]]
    assert CompletionRequest(model="m", prompt=[1, 2]).prompts == [[1, 2]]
