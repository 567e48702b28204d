"""A conversation keeps its cache from turn to turn and says what each turn says alone."""

from __future__ import annotations

import re

import pytest
from running_server import MODEL, RunningServer, models

from draftsmith.infer.contract.row import Row, Stops
from draftsmith.infer.drafters import SmallLM
from draftsmith.infer.drafters.controls import Empty
from draftsmith.infer.engine.engine import Engine
from draftsmith.infer.models.hf_target import HFTarget
from draftsmith.infer.serving.chat.conversation import LocalConversation
from draftsmith.infer.serving.chat.remote_conversation import RemoteConversation
from draftsmith.infer.text.record import Message
from draftsmith.infer.text.templates import find_template
from draftsmith.retrieval import PromptLookup

MOST = 14


@pytest.fixture
def parts():
    """A target, a bound drafter and a template; what the target was given to read is in the list."""
    model, draft, tokenizer = models()
    target = HFTarget(model, tokenizer)
    drafter = SmallLM(draft, min_confidence=0.0)
    drafter.bind(target)
    read, inner = [], target.admit

    def admit(rows, features=()):
        inner(rows, features)
        read.extend(target.lm.length(row) for row in rows)

    target.admit = admit
    return target, drafter, find_template("auto", tokenizer), read


@pytest.fixture
def conversation(parts):
    target, drafter, template, _ = parts
    return LocalConversation(target, drafter, template, max_new_tokens=MOST)


def said(conversation, text):
    return "".join(part.text for part in conversation.ask(text))


def alone(parts, messages):
    target, _, template, _ = parts
    plain = HFTarget(target.model, target.tokenizer)
    drafter = Empty()
    drafter.bind(plain)
    row = Row("0", template.prompt_ids(messages), stops=Stops(MOST, target.eos_ids), tokenizer=target.tokenizer)
    (done,) = Engine(plain, drafter).run([row])
    return done.text


def test_each_turn_says_what_it_says_alone_whatever_is_kept(parts, conversation):
    conversation.system = "a fox"
    messages = [Message("system", "a fox")]
    for text in ("what does it say?", "and then?", "at night?"):
        messages.append(Message("user", text))
        answer = said(conversation, text)
        assert answer == alone(parts, messages)
        messages.append(Message("assistant", answer))
    assert conversation.messages == messages[1:]
    assert len(conversation._engine) == 1
    assert "accepted_length" in conversation.stats()


def test_a_turn_goes_on_from_the_cache_and_does_not_read_the_conversation_again(parts):
    target, _, template, admitted = parts
    conversation = LocalConversation(target, Empty(), template, max_new_tokens=MOST)
    said(conversation, "one " * 60)
    first = conversation._row
    # An answer whose text has the tokens that were generated, as real models' answers mostly have.
    ids = template.prompt_ids([Message("user", "one " * 60)])
    first.ids[:] = [*ids, *target.tokenizer("the fox")["input_ids"], 3]
    target.lm.shorten(first, len(ids))
    conversation.messages[-1] = Message("assistant", "the fox")
    said(conversation, "two")
    assert conversation._row is first
    assert admitted == [0]
    # And one whose text has other tokens: a row of its own, which shares what both begin with.
    conversation.messages[-1] = Message("assistant", "other")
    said(conversation, "three")
    assert conversation._row is not first
    assert admitted[1] >= 192
    assert len(conversation._engine) == 1


@pytest.mark.parametrize("interrupt", [False, True])
def test_an_answer_that_is_stopped_stays_as_far_as_it_came(parts, conversation, interrupt):
    whole = alone(parts, [Message("user", "hello there")])
    answer = conversation.ask("hello there")
    shown = next(answer).text
    if interrupt:
        inner = parts[0].score

        def score(rows, drafts):
            parts[0].score = inner
            raise KeyboardInterrupt

        parts[0].score = score
        with pytest.raises(KeyboardInterrupt):
            list(answer)
    else:
        answer.close()
    kept = conversation.messages[-1].content
    assert whole.startswith(kept)
    assert kept.startswith(shown)
    assert len(kept) < len(whole)
    messages = [*conversation.messages, Message("user", "go on")]
    assert said(conversation, "go on") == alone(parts, messages)


def test_sources_are_the_drafters_and_the_targets(parts, conversation):
    sources = {part.source for part in conversation.ask("hello")}
    assert sources == {"small", "target"}
    pld = PromptLookup()
    pld.bind(parts[0])
    conversation.use(pld)
    messages = [*conversation.messages, Message("user", "hello")]
    assert said(conversation, "hello") == alone(parts, messages)
    conversation.reset()
    assert len(conversation._engine) == 0
    assert conversation.messages == []


def test_a_prompt_beyond_the_context_leaves_the_conversation_as_it_was(conversation):
    said(conversation, "hello")
    before = list(conversation.messages)
    with pytest.raises(ValueError, match="context ends at 512"):
        said(conversation, "a " * 900)
    assert conversation.messages == before
    assert said(conversation, "again")


def test_through_a_server_a_conversation_is_the_same(parts, server):
    remote = RemoteConversation(server.url, max_tokens=MOST, temperature=0)
    assert remote.model == MODEL
    messages = []
    for text in ("what does it say?", "and then?"):
        messages.append(Message("user", text))
        answer = said(remote, text)
        assert answer == alone(parts, messages)
        messages.append(Message("assistant", answer))
    assert remote.messages == messages
    assert re.match(r"\d+ tokens, .* tokens/s, first after 0\.\d+ s; \d+ tokens of context", remote.stats())
    with pytest.raises(ValueError, match=r"refused with 400: the prompt has .* tokens"):
        said(remote, "a " * 900)
    assert remote.messages == messages
    with pytest.raises(ValueError, match="refused with 404: there is no model 'x'"):
        said(RemoteConversation(server.url, "x"), "hi")
    with pytest.raises(ValueError, match="does not answer"):
        RemoteConversation("http://127.0.0.1:9")


def test_a_server_with_a_key_wants_it(tiny):
    model, _, tokenizer = tiny
    with RunningServer(model, tokenizer, keys=["k"]) as server:
        with pytest.raises(ValueError, match="refused with 401"):
            RemoteConversation(server.url)
        assert RemoteConversation(server.url, api_key="k").model == MODEL
