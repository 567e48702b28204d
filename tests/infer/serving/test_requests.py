"""Whatever is sent gets an answer or a clear refusal: never status 500, a traceback or silence."""

from __future__ import annotations

import http.client
import json
from urllib.parse import urlsplit

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from running_server import MODEL, until

from draftsmith.infer.serving.errors import ApiError
from draftsmith.infer.serving.requests import NEUTRAL, ChatRequest, CompletionRequest, parse

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": MODEL, "prompt": "hi"}


def refusal(kind, **fields):
    asked = (CHAT if kind is ChatRequest else TEXT) | fields
    with pytest.raises(ApiError) as problem:
        parse(json.dumps(asked).encode(), kind)
    assert problem.value.status == 400
    return problem.value


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
def test_every_field_that_is_not_supported_is_refused_unless_its_value_changes_nothing(kind):
    for name in NEUTRAL.keys() & kind.model_fields.keys():
        for value in NEUTRAL[name]:
            parse(json.dumps((CHAT if kind is ChatRequest else TEXT) | {name: value}).encode(), kind)
        found = refusal(kind, **{name: {"some": "thing"}})
        assert found.param == name
        assert name in str(found)


def test_a_number_is_no_truth_value_and_text_no_number():
    assert refusal(CompletionRequest, best_of=True).param == "best_of"
    assert refusal(CompletionRequest, echo=0).param == "echo"
    assert refusal(ChatRequest, max_tokens="7").param == "max_tokens"
    assert refusal(ChatRequest, max_tokens=True).param == "max_tokens"
    assert refusal(ChatRequest, stream="yes").param == "stream"


def test_two_limits_must_agree():
    assert (
        parse(json.dumps(CHAT | {"max_tokens": 4, "max_completion_tokens": 4}).encode(), ChatRequest).most_tokens == 4
    )
    assert refusal(ChatRequest, max_tokens=4, max_completion_tokens=5).param == "max_completion_tokens"


@pytest.mark.parametrize("prompt", ["", [], [""], ["a", ""], [[]], [1.5], [-1], [[1], "a"], None, {"a": 1}])
def test_prompts_that_are_none_are_refused(prompt):
    assert (refusal(CompletionRequest, prompt=prompt).param or "").startswith("prompt")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**20), 10**20) | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(sorted({*ChatRequest.model_fields, *CompletionRequest.model_fields, "beam", "\x00"}))
MESSAGES = st.lists(
    st.dictionaries(
        st.sampled_from(["role", "content", "tool_calls", "name", "x"]),
        JSON | st.sampled_from(["user", "system", "assistant", "tool"]),
        max_size=4,
    ),
    max_size=3,
)
CHANGES = st.dictionaries(FIELDS, JSON | MESSAGES, max_size=3)
HEADERS = st.dictionaries(
    st.sampled_from(["Authorization", "Content-Type", "Accept", "X-Y", "Expect", "Accept-Encoding"]),
    st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"), max_size=20),
    max_size=3,
)


def send(server, path, body, headers):
    at = urlsplit(server.url)
    connection = http.client.HTTPConnection(at.hostname, at.port, timeout=30)
    try:
        connection.request("POST", path, body, {"Content-Type": "application/json"} | headers)
        response = connection.getresponse()
        return response.status, response.read()
    finally:
        connection.close()


def try_bad_requests(server, count):
    statuses = set()

    @settings(max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(
        path=st.sampled_from(["/v1/chat/completions", "/v1/completions"]),
        changes=CHANGES,
        garbage=st.none() | st.binary(max_size=30),
        cut=st.integers(0, 20),
        headers=HEADERS,
    )
    def bad(path, changes, garbage, cut, headers):
        base = CHAT if "chat" in path else TEXT
        body = json.dumps(base | {"max_tokens": 1} | changes).encode() if garbage is None else garbage
        status, found = send(server, path, body[: len(body) - cut], headers)
        statuses.add(status)
        assert status in (200, 400, 404, 413), found
        if status != 200:
            assert set(json.loads(found)["error"]) >= {"message", "type", "param", "code"}

    bad()
    until(server.idle)
    assert {200, 400} <= statuses


def test_generated_requests_get_answers_or_refusals(server):
    try_bad_requests(server, 40)


@pytest.mark.slow
def test_5000_generated_requests_get_answers_or_refusals(server):
    try_bad_requests(server, 5000)
