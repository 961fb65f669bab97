"""The settings that decide how requests of any client are read: names, `user`, strictness, other origins, keys."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from service.settings import Settings, SettingsError
from service.tenants import new_key
from tests.live import Client, Json, assert_error, assert_success
from tests.service.in_process import InProcessServer

ORIGIN = "https://app.example"


@pytest.fixture(scope="module")
def open_server(tiny_base: Path) -> Iterator[InProcessServer]:
    """Yield a server that takes what clients send: two names and any other, `user` as a session, one foreign origin."""
    server = InProcessServer(
        tiny_base, served_model_name="first, second", any_model=True, user_sessions=True, cors_origins=ORIGIN
    )
    yield server
    server.stop()


@pytest.fixture(scope="module")
def strict_server(tiny_base: Path) -> Iterator[InProcessServer]:
    """Yield a server that ignores no field, with two keys of one tenant, one of them for housekeeping."""
    keys = {mode: new_key("acme") for mode in ("", "adapt=predict")}
    lines = ",".join(f"{line} {mode}" for mode, (_, line) in keys.items())
    server = InProcessServer(tiny_base, strict_fields=True, api_keys=lines)
    server.keys = {mode: key for mode, (key, _) in keys.items()}  # type: ignore[attr-defined]
    yield server
    server.stop()


@pytest.fixture
def client(open_server: InProcessServer) -> Iterator[Client]:
    with Client(open_server.url, "second") as client:
        yield client


def test_a_model_answers_to_all_its_names_and_replies_with_the_first(client: Client) -> None:
    models = assert_success(client.http.get("/v1/models"))["data"]
    assert [model["id"] for model in models] == ["first", "second"]
    assert {model["root"] for model in models} == {"first"}
    for name in ("first", "second", "gpt-4o", "claude-3-5-sonnet@20240620", "llama3:8b"):
        reply = client.complete(model=name)
        assert (reply["model"], reply["adaptation"]) == ("first", None), name
    assert client.complete(model="second@named")["adaptation"]["version_to"] == 1
    assert client.complete(model="first:predict@named")["adaptation"]["version_to"] == 1


@pytest.mark.parametrize("user", ["ada", "ada lovelace <ada@example.org>", "é" * 300])
def test_user_names_a_session_where_the_setting_says_so(client: Client, user: str) -> None:
    first, second = (client.complete(user=user)["adaptation"] for _ in range(2))
    assert (first["version_to"], second["version_to"]) == (1, 2)
    response = client.post("completions", client.completion(user=user))
    assert "x-imprint-ignored" not in response.headers
    assert client.complete(user="")["adaptation"] is None
    names = {session["id"] for session in assert_success(client.http.get("/v1/sessions"))["data"]}
    assert user in names or any(name.startswith("user-") for name in names)


def test_a_strict_server_ignores_nothing(strict_server: InProcessServer) -> None:
    with Client(strict_server.url, strict_server.model, strict_server.keys[""]) as client:  # type: ignore[attr-defined]
        for field, value in (("store", True), ("some_servers_own", 1), ("reasoning_effort", "low")):
            response = client.post("completions", client.completion(**{field: value}))
            assert assert_error(response, 400, None)["param"] == field
        message = {"role": "user", "content": "hi", "mood": "fine"}
        response = client.post("chat/completions", {"model": client.model, "messages": [message]})
        assert assert_error(response, 400, None)["param"] == "messages.mood"
        client.complete(store=False, metadata={}, user="ada")


def test_a_key_may_be_for_housekeeping_only(strict_server: InProcessServer) -> None:
    teaching, housekeeping = (
        Client(strict_server.url, strict_server.model, key)
        for key in strict_server.keys.values()  # type: ignore[attr-defined]
    )
    with teaching, housekeeping:
        assert teaching.complete(session="shared")["adaptation"]["version_to"] == 1
        assert housekeeping.complete(session="shared")["adaptation"]["version_to"] == 1
        assert housekeeping.complete()["adaptation"] is None
        assert housekeeping.complete(session="shared", adapt="both")["adaptation"]["version_to"] == 2


def preflight(url: str, origin: str) -> httpx.Response:
    headers = {
        "Origin": origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-imprint-session,idempotency-key",
    }
    return httpx.options(f"{url}/v1/chat/completions", headers=headers)


def test_the_pages_of_a_named_origin_may_call_and_read_our_headers(client: Client) -> None:
    allowed = preflight(client.url, ORIGIN)
    assert allowed.status_code == 200 and allowed.headers["access-control-allow-origin"] == ORIGIN
    assert "x-imprint-session" in allowed.headers["access-control-allow-headers"]
    body: Json = client.completion(store=True)
    for path, status in (("completions", 200), ("nothing", 404)):
        answer = client.post(path, body, Origin=ORIGIN)
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (status, ORIGIN)
        exposed = answer.headers["access-control-expose-headers"].lower()
        assert "x-imprint-ignored" in exposed and "etag" in exposed and "retry-after" in exposed


@pytest.mark.parametrize("origin", ["https://other.example", "http://app.example", "https://app.example:8443", "null"])
def test_the_pages_of_other_origins_may_not(client: Client, origin: str) -> None:
    assert "access-control-allow-origin" not in preflight(client.url, origin).headers
    answer = client.post("completions", client.completion(), Origin=origin)
    assert "access-control-allow-origin" not in answer.headers


def test_no_origin_is_allowed_by_default(memory_server: InProcessServer) -> None:
    assert "access-control-allow-origin" not in preflight(memory_server.url, ORIGIN).headers


@pytest.mark.parametrize("origin", ["*", "https://*.example", "app.example", "https://app.example/", "null"])
def test_an_origin_that_is_not_exact_stops_the_server(origin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMPRINT_CORS_ORIGINS", f"{ORIGIN},{origin}")
    with pytest.raises(SettingsError, match="IMPRINT_CORS_ORIGINS"):
        Settings.load()
