"""One server for most tests: a tiny target with a draft model, four seats and a prefix cache."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from running_server import RunningServer, models

from draftsmith.infer.drafters import SmallLM


@pytest.fixture(scope="package")
def tiny() -> tuple[object, object, object]:
    return models()


@pytest.fixture(scope="package")
def server(tiny: tuple[object, object, object]) -> Iterator[RunningServer]:
    model, draft, tokenizer = tiny
    with RunningServer(model, tokenizer, SmallLM(draft, min_confidence=0.0), prefix_cache=2000) as running:
        yield running


@pytest.fixture
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as made:
        yield made
