"""The fixtures of the conformance suite: one live server of the tiny base, and clients that a test sends with.

The cases restate what the peers document, each by itself: what a request is answered, and which requests are refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest

from tests.conftest import Server
from tests.live import Client, Json, assert_success

HELLO = [{"role": "user", "content": "The quick brown fox"}]
Ask = Callable[..., Json]


@pytest.fixture(scope="module")
def api(server: Server) -> Iterator[Client]:
    with Client(server.url, server.model) as client:
        yield client


@pytest.fixture(scope="module")
def sdk(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def complete(api: Client) -> Ask:
    """Return a function that sends a completion of 6 tokens with a seed, and returns the reply."""

    def send(prompt: Any = "The quick brown", **fields: Any) -> Json:
        body = {"model": api.model, "prompt": prompt, "max_tokens": 6, "seed": 7} | fields
        return assert_success(api.post("completions", body))

    return send


@pytest.fixture
def chat(api: Client) -> Ask:
    """Return a function that sends a chat completion of 6 tokens with a seed, and returns the reply."""

    def send(messages: Any = HELLO, **fields: Any) -> Json:
        body = {"model": api.model, "messages": messages, "max_tokens": 6, "seed": 7} | fields
        return assert_success(api.post("chat/completions", body))

    return send


@pytest.fixture
def refused(api: Client) -> Callable[[str, Json], Json]:
    """Return a function that sends a body with a fault, and returns the error of the 400."""

    def send(path: str, fields: Json) -> Json:
        prompt = {"messages": HELLO} if path.startswith("chat") else {"prompt": "The quick"}
        response = api.post(path, {"model": api.model, "max_tokens": 2} | prompt | fields)
        assert response.status_code == 400, response.text
        error: Json = response.json()["error"]
        assert error["type"] == "invalid_request_error"
        return error

    return send
