"""Many clients at once: whole and streamed, greedy and sampled, aborted, malformed and over every limit.

Each good answer is the one that plain decoding gives alone, and nothing is left behind.
"""

from __future__ import annotations

import json
import random
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import openai
import pytest
from running_server import MODEL, RunningServer, alone, models, row_of, until

from draftsmith.infer.drafters import SmallLM

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "the",
    "lazy",
    "dog",
    "what",
    "does",
    "the",
    "target",
    "say",
    "to",
    "that",
]
LONG = 4000


class Load:
    """`requests` requests to a server, `at_once` of them at a time; what became of them is in the lists."""

    def __init__(self, server, seed=0):
        self.server = server
        self.random = random.Random(seed)
        self.ttft, self.greedy, self.sampled, self.aborted, self.refused, self.retried = [], [], [], [], [], []
        self.clients = {}
        prompts = [" ".join(self.random.choices(WORDS, k=3 + 4 * i)) for i in range(12)]
        self.prompts = [server.target.tokenizer(text)["input_ids"] for text in prompts]

    def run(self, requests, at_once, long_at=()):
        """`long_at`: the numbers of the requests that come with a prompt of LONG tokens."""
        kinds = ["whole", "stream", "sampled", "sampled stream", "several", "abort", "malformed", "limit"]
        work = [(number, kinds[number % len(kinds)], self.random.randrange(12)) for number in range(requests)]
        with (
            openai.OpenAI(base_url=f"{self.server.url}/v1", api_key="none", max_retries=0) as self.client,
            ThreadPoolExecutor(at_once) as pool,
        ):
            long = [pool.submit(self.one, -number, "stream", None) for number in long_at]
            for done in [*long, *(pool.submit(self.one, *item) for item in work)]:
                done.result()

    def one(self, number, kind, prompt):
        if kind == "malformed":
            self.refused.append(self.post([b"{", b'{"model": 3}', b'{"prompt": [-1]}', b"\xff"][number // 8 % 4], 400))
        elif kind == "limit":
            body, status = self.over_a_limit(number // 8 % 5)
            self.refused.append(self.post(json.dumps(body).encode(), status))
        else:
            self.good(number, kind, prompt)

    def over_a_limit(self, which):
        asked = {"model": MODEL, "prompt": "fox"}
        return [
            (asked | {"max_tokens": 10**6}, 400),
            (asked | {"n": 100}, 400),
            (asked | {"prompt": [9] * self.server.target.max_positions}, 400),
            (asked | {"prompt": "x" * self.server.app.body_bytes}, 413),
            (asked | {"model": "another"}, 404),
        ][which]

    def post(self, body, status):
        asked = urllib.request.Request(f"{self.server.url}/v1/completions", body)
        with pytest.raises(urllib.error.HTTPError) as problem:
            urllib.request.urlopen(asked, timeout=60)
        with problem.value as found:
            assert found.code == status
            assert json.loads(found.read())["error"]["message"]
        return status

    def good(self, number, kind, prompt):
        ids = [5 + i * i % 250 for i in range(LONG)] if prompt is None else self.prompts[prompt]
        sampled = kind in ("sampled", "sampled stream", "several")
        settings = {"temperature": 0.9, "seed": number % 3} if sampled else {"temperature": 0}
        fields = settings | {"n": 2 if kind == "several" else 1, "max_tokens": 8 + 4 * (number % 5)}
        fields["stream"] = kind in ("stream", "sampled stream", "abort")
        began, found = time.monotonic(), self.patiently(ids, fields)
        if not fields["stream"]:
            texts = [choice.token_ids for choice in found.choices]
        else:
            tokens = []
            for chunk in found:
                if not tokens:
                    self.ttft.append(time.monotonic() - began)
                tokens += chunk.choices[0].token_ids
                if kind == "abort":
                    found.close()
                    self.aborted.append(number)
                    return
            texts = [tokens]
        for key, text in enumerate(texts):
            (self.sampled if sampled else self.greedy).append((tuple(ids), key, fields["max_tokens"], settings, text))

    def patiently(self, ids, fields):
        """Ask again as long as the queue is full."""
        while True:
            try:
                return self.client.completions.create(
                    model=MODEL, prompt=list(ids), extra_body={"return_token_ids": True}, **fields
                )
            except openai.RateLimitError as full:
                self.retried.append(int(full.response.headers["retry-after"]))
                time.sleep(0.2)

    def check(self):
        @lru_cache(None)
        def plain(ids, key, most, settings):
            row = row_of(self.server, list(ids), most, str(key), **dict(settings))
            return alone(self.server, row).token_ids

        for ids, key, most, settings, text in [*self.greedy, *self.sampled]:
            assert text == plain(ids, key, most, tuple(settings.items()))


def check_nothing_is_left(server):
    """After the server's end: no row, seat, note or slot."""
    target, drafter = server.target, server.drafter
    assert len(server.engine) == len(server.thread.rule) == 0
    for lm in (target.lm, drafter.reader.lm):
        assert not lm._rows
        assert not lm.cache._regions
        assert lm.cache.size <= 300
    for held in (target._features, target._states, target._pending, target._given, drafter.reader._drafts):
        assert not held


def loaded(requests, at_once, context=512, long_at=(), **limits):
    model, draft, tokenizer = models(context)
    drafter = SmallLM(draft, min_confidence=0.0, sample="coupled")
    with RunningServer(model, tokenizer, drafter, body_bytes=64 << 10, **limits) as server:
        load = Load(server)
        load.run(requests, at_once, long_at)
        until(server.idle)
        value = server.thread.metrics.registry.get_sample_value
        lengths = value("draftsmith_accepted_length", {"drafter": "small"})
        cached = value("draftsmith_cached_tokens_total")
    check_nothing_is_left(server)
    assert lengths > 1.2
    assert min(load.retried) >= 1
    load.check()
    assert len({tuple(text) for *_, text in load.greedy}) > 5
    return load, cached


def test_a_small_load():
    load, _ = loaded(40, 8, batch_size=3, queue=2, prefix_cache=600)
    assert len(load.greedy) == 10
    assert len(load.sampled) == 20
    assert len(load.aborted) == 5
    assert sorted({*load.refused}) == [400, 404, 413]


@pytest.mark.slow
def test_400_requests_16_at_a_time_with_a_long_prompt_among_them():
    load, cached = loaded(400, 16, 8192, long_at=[1, 2], batch_size=8, queue=6, prefix_cache=6000)
    assert len(load.greedy) == 102
    assert len(load.sampled) == 200
    assert len(load.aborted) == 50
    assert len(load.refused) == 100
    assert cached > 0
    ttft = sorted(load.ttft)
    print(f"\nTTFT p50 {ttft[len(ttft) // 2]:.3f} s, p95 {ttft[int(len(ttft) * 0.95)]:.3f} s, longest {ttft[-1]:.3f} s")
