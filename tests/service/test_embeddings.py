"""Embeddings: OpenAI's shape and limits, vectors of each text alone, and no session."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import ollama
import openai
import pytest
from numpy.typing import NDArray

from model.text.sentence_encoder import MAX_TOKENS
from service.turns.embeddings import MAX_TEXT_CHARS, MAX_TEXT_TOKENS
from tests.live import Client, assert_error, assert_success
from tests.model.tiny_encoder import save_encoder
from tests.service.in_process import InProcessServer

WORDS = ("my", "cat", "is", "called", "pixel", "dog")
TEXTS = ["my cat is called pixel", "my dog", "what is a cat"]


@pytest.fixture(scope="module")
def encoding_server(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[InProcessServer]:
    """Yield a server with a tiny sentence encoder."""
    folder = save_encoder(tmp_path_factory.mktemp("encoder") / "tiny", WORDS)
    server = InProcessServer(tiny_base, recall_encoder=str(folder))
    yield server
    server.stop()


@pytest.fixture
def client(encoding_server: InProcessServer) -> Iterator[Client]:
    with Client(encoding_server.url, encoding_server.model) as client:
        yield client


@pytest.fixture
def embeddings(encoding_server: InProcessServer) -> Iterator[Any]:
    """Yield the embeddings of OpenAI's client, whose base URL lacks the /v1."""
    with openai.OpenAI(base_url=encoding_server.url, api_key="none", max_retries=0) as client:
        yield client.embeddings


def vectors(reply: Any) -> NDArray[np.float32]:
    return np.array([entry.embedding for entry in reply.data], np.float32)


def test_openais_client_gets_a_unit_vector_for_each_text(embeddings: Any, encoding_server: InProcessServer) -> None:
    reply = embeddings.create(model=encoding_server.model, input=TEXTS)  # in base64, this client's default
    assert [entry.index for entry in reply.data] == [0, 1, 2]
    assert reply.model == encoding_server.model
    assert reply.usage.prompt_tokens == reply.usage.total_tokens == sum(len(text.split()) for text in TEXTS)
    assert np.abs(np.linalg.norm(vectors(reply), axis=1) - 1).max() < 1e-6
    in_digits = embeddings.create(model=encoding_server.model, input=TEXTS, encoding_format="float")
    assert (vectors(in_digits) == vectors(reply)).all()
    size = len(reply.data[0].embedding)
    assert (
        vectors(embeddings.create(model=encoding_server.model, input=TEXTS, dimensions=size)) == vectors(reply)
    ).all()


def test_a_vector_depends_on_its_text_alone(embeddings: Any, encoding_server: InProcessServer) -> None:
    together = vectors(embeddings.create(model=encoding_server.model, input=[*TEXTS, *TEXTS * 30]))
    for text, vector, again in zip(TEXTS, together, together[-3:], strict=False):
        assert (vectors(embeddings.create(model=encoding_server.model, input=text))[0] == vector).all()
        assert (vector == again).all()
    assert len({vector.tobytes() for vector in together}) == len(TEXTS)


def test_token_ids_stand_for_their_text(embeddings: Any, client: Client, encoding_server: InProcessServer) -> None:
    ids = [assert_success(client.http.post("/tokenize", json={"prompt": text}))["tokens"] for text in TEXTS]
    expected = vectors(embeddings.create(model=encoding_server.model, input=TEXTS))
    assert (vectors(embeddings.create(model=encoding_server.model, input=ids)) == expected).all()
    assert (vectors(embeddings.create(model=encoding_server.model, input=ids[0])) == expected[0]).all()


def test_objects_stand_for_their_text(embeddings: Any, client: Client) -> None:
    parts = {"content": [{"type": "text", "text": "my cat is "}, {"type": "text", "text": "called pixel"}]}
    expected = vectors(embeddings.create(model=client.model, input=TEXTS[:1]))[0].tolist()
    for value in (parts, {"prompt_string": TEXTS[0]}, ["my dog", parts], ["my dog", {"prompt_string": TEXTS[0]}]):
        data = assert_success(client.post("embeddings", {"input": value}))["data"]
        assert data[-1]["embedding"] == expected and len(data) == (len(value) if isinstance(value, list) else 1)


def test_every_part_of_a_long_text_counts(embeddings: Any, encoding_server: InProcessServer) -> None:
    start = "cat " * MAX_TOKENS
    texts = [start, start + "dog", start + "dog " * MAX_TOKENS]
    first, second, third = vectors(embeddings.create(model=encoding_server.model, input=texts))
    assert first @ first > first @ second > first @ third


def test_the_engines_thread_encodes(embeddings: Any, encoding_server: InProcessServer, monkeypatch: Any) -> None:
    """The device has one owner, also for embeddings."""
    encoder, threads = encoding_server.sessions.loaded_model.encoder, set[str]()
    assert encoder is not None
    encode = type(encoder).sum_of_states

    def record(*args: Any) -> Any:
        threads.add(threading.current_thread().name)
        return encode(*args)

    monkeypatch.setattr(type(encoder), "sum_of_states", record)
    embeddings.create(model=encoding_server.model, input=TEXTS)
    assert threads == {"imprint-engine"}


def test_ollamas_client_gets_the_same_vectors(embeddings: Any, encoding_server: InProcessServer) -> None:
    model = encoding_server.model
    expected = vectors(embeddings.create(model=model, input=TEXTS))
    with ollama.Client(encoding_server.url) as peer:
        reply = peer.embed(f"{model}:latest", TEXTS)
        assert (np.array(reply.embeddings, np.float32) == expected).all()
        assert reply.prompt_eval_count == sum(len(text.split()) for text in TEXTS)
        assert (np.array(peer.embed(model, TEXTS[0]).embeddings, np.float32) == expected[:1]).all()
        assert (np.array(peer.embeddings(model, TEXTS[0]).embedding, np.float32) == expected[0]).all()
        assert list(peer.embed(model, []).embeddings) == list(peer.embeddings(model, "").embedding) == []
        with pytest.raises(ollama.ResponseError, match="dimensions"):
            peer.embed(model, TEXTS, dimensions=1)
        with pytest.raises(ollama.ResponseError, match="another"):
            peer.embed("another", TEXTS)


def test_no_session_has_a_part_in_it(embeddings: Any, client: Client, encoding_server: InProcessServer) -> None:
    plain = vectors(embeddings.create(model=encoding_server.model, input=TEXTS))
    client.observe("ada", " ".join(TEXTS) * 5)
    named = embeddings.create(
        model=f"{encoding_server.model}@ada", input=TEXTS, extra_headers={"X-Imprint-Session": "new"}
    )
    assert (vectors(named) == plain).all()
    assert client.version("ada") == 1 and client.version("new") == 0


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": None}, "input"),
        ({"input": ["a", ""]}, "input.1"),
        ({"input": ["a", 1]}, "input.1"),
        ({"input": [1, "a"]}, "input.1"),
        ({"input": [[]]}, "input.0"),
        ({"input": {}}, "input.content"),
        ({"input": {"content": "a"}}, "input.content"),
        ({"input": {"content": [{"type": "text", "text": ""}]}}, "input.content.0.text"),
        ({"input": [{"content": [{"type": "image_url", "image_url": {"url": "a"}}]}]}, "input.0.content.0.type"),
        ({"input": ["a", {"prompt_string": ""}]}, "input.1.prompt_string"),
        ({"input": [10**6]}, "input.0"),
        ({"input": [[1], [1, 10**6]]}, "input.1.1"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "cat " * (MAX_TEXT_TOKENS + 1)}, "input"),
        ({"input": ["cat", "cat " * (MAX_TEXT_TOKENS + 1)]}, "input.1"),
        ({"input": " " * (MAX_TEXT_CHARS + 1)}, "input"),
        ({"input": ["cat " * MAX_TEXT_TOKENS] * 37}, "input"),
        ({"input": "a", "dimensions": 8}, "dimensions"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format"),
        ({}, "input"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_embedded_is_refused_by_name(client: Client, body: dict[str, Any], param: str) -> None:
    response = client.post("embeddings", {"model": client.model} | body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


def test_an_unknown_model_is_not_found(client: Client) -> None:
    response = client.post("embeddings", {"model": "text-embedding-3-small", "input": "a"})
    assert_error(response, 404, "model_not_found")


def test_a_server_without_an_encoder_says_so(memory_server: InProcessServer) -> None:
    with Client(memory_server.url, memory_server.model) as client:
        response = client.post("embeddings", {"model": client.model, "input": "a"})
        assert "IMPRINT_RECALL_ENCODER" in assert_error(response, 400, "no_encoder")["message"]
