"""Tenants on a running server: a key decides which sessions a request sees, tenants are isolated, limits hold."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from service.tenants import OPERATOR, new_key
from tests.conftest import Server
from tests.live import NO_EOS, Client, Json, assert_error, assert_success, stored, tenant_usage, wait_until
from tests.service.test_keys import imprint
from tests.tiny import TEXT

OWNERS = ("acme", "bo", "bookish", "few", "laden", "thrifty", "single", OPERATOR)
LIMITS = {
    "bookish": "bytes=1000000000",
    "few": "sessions=1",
    "laden": "bytes=1",
    "thrifty": "tokens_per_minute=20",
    "single": "requests=1",
}


@pytest.fixture(scope="module")
def keys() -> dict[str, str]:
    """Return the keys by tenant; `server_with_keys` fills them in."""
    return {}


@pytest.fixture(scope="module")
def server_with_keys(
    tiny_base: Path, tmp_path_factory: pytest.TempPathFactory, keys: dict[str, str]
) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("guarded")
    lines = []
    for owner in OWNERS:
        keys[owner], line = new_key(owner)
        lines.append(f"{line} {LIMITS.get(owner, '')}")
    file = folder / "keys"
    file.write_text("# the keys of this server\n\n" + "\n".join(lines[1:]) + "\n")
    settings = {"api_keys": lines[0], "api_keys_file": file, "host": "0.0.0.0", "log_level": "debug"}
    server = Server(str(tiny_base), folder / "data", **settings).start()
    yield server
    assert server.stop() == 0, server.log.read_text()


@pytest.fixture
def user(server_with_keys: Server, keys: dict[str, str]) -> Iterator[Callable[[str], Client]]:
    clients: list[Client] = []

    def connect(owner: str) -> Client:
        clients.append(Client(server_with_keys.url, key=keys[owner]))
        return clients[-1]

    yield connect
    for client in clients:
        client.http.close()


def observable(response: httpx.Response) -> tuple[int, bytes, list[str]]:
    """Return everything that a client can see of a response, except its request id and date."""
    return response.status_code, response.content, sorted(set(response.headers) - {"x-request-id", "date"})


# --- no one else's ----------------------------------------------------------------------------------------------------


def test_one_id_is_a_session_of_its_own_for_each_key(server_with_keys: Server, keys: dict[str, str]) -> None:
    """With the openai client: two keys and one session id are two memories."""

    def chat(owner: str, text: str) -> Any:
        with openai.OpenAI(base_url=f"{server_with_keys.url}/v1", api_key=keys[owner], max_retries=0) as client:
            reply = client.chat.completions.create(
                model="tiny",
                messages=[{"role": "user", "content": text}],
                max_tokens=4,
                temperature=0,
                extra_body={"session": "shared"},
            )
        assert reply.model_extra is not None
        return reply.model_extra["adaptation"]

    assert [chat("acme", text)["version_to"] for text in (TEXT, TEXT[:50])] == [1, 2]
    assert chat("bo", TEXT)["version_from"] == 0  # the text does not count as resent
    with Client(server_with_keys.url, key=keys["acme"]) as acme, Client(server_with_keys.url, key=keys["bo"]) as bo:
        assert (acme.version("shared"), bo.version("shared")) == (2, 1)
        assert bo.http.delete("/v1/sessions/shared").status_code == 200
        assert (acme.version("shared"), bo.version("shared")) == (2, 0)


def test_what_a_tenant_teaches_affects_no_other_tenant(user: Callable[[str], Client]) -> None:
    acme, bo = user("acme"), user("bo")
    untaught = bo.score("unheard-of", TEXT)
    acme.observe("secret", TEXT * 2)
    own = acme.score("secret", TEXT)
    assert own["logprobs"] != own["frozen_logprobs"] == untaught["frozen_logprobs"]
    assert bo.score("secret", TEXT) == untaught
    before = acme.session("secret")
    assert bo.http.put("/v1/sessions/secret", json={"adapt": "predict"}).status_code in (200, 201)
    assert bo.http.delete("/v1/sessions/secret").status_code == 200
    assert acme.session("secret") == before


def import_file(client: Client, session: str, file: bytes, **headers: str) -> httpx.Response:
    return client.http.put(f"/v1/sessions/{session}/import", content=file, headers=headers)


REQUESTS: dict[str, Callable[[Client, str], httpx.Response]] = {
    "get": lambda client, name: client.http.get(f"/v1/sessions/{name}"),
    "delete": lambda client, name: client.http.delete(f"/v1/sessions/{name}"),
    "if-match": lambda client, name: client.post(f"sessions/{name}/observe", {"text": TEXT}, '"v1"'),
    "any": lambda client, name: client.http.put(f"/v1/sessions/{name}", json={}, headers={"If-Match": "*"}),
    "chat": lambda client, name: client.post("completions", client.completion(session=name), '"v1"'),
    "list": lambda client, name: client.http.get("/v1/sessions", params={"after": name[:-1]}),
    "cursor": lambda client, name: client.http.get("/v1/sessions", params={"after": name}),
    "log": lambda client, name: client.http.get(f"/v1/sessions/{name}/log"),
    "export": lambda client, name: client.http.get(f"/v1/sessions/{name}/export"),
    "fork": lambda client, name: client.post(f"sessions/{name}/fork", {"id": "copy"}),
    "episodes": lambda client, name: client.http.get(f"/v1/sessions/{name}/episodes"),
    "cells": lambda client, name: client.http.get(f"/v1/sessions/{name}/cells"),
    "diff": lambda client, name: client.http.get(f"/v1/sessions/{name}/diff?from=0&to=0"),
    "rollback": lambda client, name: client.post(f"sessions/{name}/rollback", {"version": 0}),
    "unlearn": lambda client, name: client.post(f"sessions/{name}/unlearn", {"version": 1}),
    "import": lambda client, name: import_file(client, name, b"", **{"If-Match": "*"}),
}
GONE = {"get", "delete", "log", "episodes", "cells", "diff", "export", "fork", "rollback", "unlearn"}


@pytest.mark.parametrize("kind", REQUESTS)
def test_anothers_session_answers_as_one_that_is_nowhere(user: Callable[[str], Client], kind: str) -> None:
    """Status, headers and body are equal, except for the requested id."""
    acme, few = user("acme"), user("few")
    acme.observe("theirs", TEXT)
    existing, absent = observable(REQUESTS[kind](few, "theirs")), observable(REQUESTS[kind](few, "absent"))
    assert existing[0] in (200, 412) or (existing[0] == 404 and kind in GONE)
    assert existing[1].replace(b"theirs", b"absent") == absent[1]
    assert existing[::2] == absent[::2]
    assert acme.version("theirs") >= 1


def test_forks_and_imports_land_in_the_keys_own_namespace(
    user: Callable[[str], Client], server_with_keys: Server
) -> None:
    acme, bo = user("acme"), user("bo")
    acme.observe("target", TEXT)
    bo.observe("source", TEXT[9:])
    before = stored(server_with_keys.data_dir, "target", tenant="acme")
    assert bo.post("sessions/source/fork", {"id": "target"}).status_code == 201
    assert bo.http.delete("/v1/sessions/target").status_code == 200
    file = bo.http.get("/v1/sessions/source/export").content
    assert import_file(bo, "target", file).status_code == 201
    assert bo.score("target", TEXT)["logprobs"] == bo.score("source", TEXT)["logprobs"]
    assert stored(server_with_keys.data_dir, "target", tenant="acme") == before


@pytest.mark.parametrize("repeated", [{"Idempotency-Key": "k"}, {"x-stainless-retry-count": "1"}])
def test_no_answer_is_remembered_for_another_tenant(user: Callable[[str], Client], repeated: dict[str, str]) -> None:
    """Two tenants send the same key, or retry, with the same body to the same session id."""
    acme, bo, name = user("acme"), user("bo"), f"once-{len(repeated)}-{next(iter(repeated))}"
    bo.observe(name, TEXT[9:])
    first = acme.post(f"sessions/{name}/observe", {"text": TEXT}, **repeated)
    other = bo.post(f"sessions/{name}/observe", {"text": TEXT}, **repeated)
    assert (assert_success(first)["version"], assert_success(other)["version"]) == (1, 2)
    assert "idempotent-replayed" not in other.headers
    for client, answer in ((acme, first), (bo, other)):
        again = client.post(f"sessions/{name}/observe", {"text": TEXT}, **repeated)
        assert again.headers["idempotent-replayed"] == "true" and again.json() == answer.json()
    # Another tenant's request does not use up a key.
    bo.post(f"sessions/{name}/observe", {"text": TEXT}, **{"Idempotency-Key": "bo's"})
    assert (
        assert_success(acme.post(f"sessions/{name}/observe", {"text": "else"}, **{"Idempotency-Key": "bo's"}))[
            "version"
        ]
        == 2
    )


@pytest.mark.parametrize("name", ["acme/theirs", "default/theirs", "}acme/theirs", "../acme/theirs", "acme:theirs"])
@pytest.mark.parametrize("field", ["session", "model", "X-Imprint-Session"])
def test_no_session_id_reaches_another_namespace(
    user: Callable[[str], Client], server_with_keys: Server, name: str, field: str
) -> None:
    bo = user("bo")
    named = f"{bo.model}@{name}" if field == "model" else name
    headers, fields = ({field: named}, {}) if field.startswith("X-") else ({}, {field: named})
    ignored = {"X-Imprint-Tenant": "acme", "OpenAI-Organization": "acme", "OpenAI-Project": "acme"}
    response = bo.post("completions", bo.completion(**fields), **headers, **ignored)
    if ":" in name:  # a valid id, in the namespace of bo
        assert response.status_code == 200
        assert stored(server_with_keys.data_dir, name, tenant="bo") and not stored(
            server_with_keys.data_dir, name, tenant="acme"
        )
    else:
        assert_error(response, 400, response.json()["error"]["code"])
    assert bo.post("completions", bo.completion(tenant="acme")).headers["x-imprint-ignored"] == "tenant"


def test_metrics_have_a_key_of_their_own_and_name_nobody(
    user: Callable[[str], Client], server_with_keys: Server, keys: dict[str, str]
) -> None:
    acme, operator = user("acme"), user(OPERATOR)
    acme.observe("unmistakable", TEXT)
    assert_error(httpx.get(f"{server_with_keys.url}/metrics"), 401, "invalid_api_key")
    assert_error(acme.http.get("/metrics"), 401, "invalid_api_key")
    assert_error(operator.http.get("/v1/sessions"), 401, "invalid_api_key")
    exposed = operator.http.get("/metrics").text
    assert "imprint_tokens_learned_total" in exposed
    assert not [name for name in (*OWNERS[:-1], "unmistakable", *keys.values()) if re.search(rf"\b{name}\b", exposed)]


def test_the_log_holds_no_key(server_with_keys: Server, keys: dict[str, str], user: Callable[[str], Client]) -> None:
    user("bo").complete()
    httpx.get(f"{server_with_keys.url}/v1/models", headers={"Authorization": "Bearer imp_wrong"})
    log = server_with_keys.log.read_text()
    assert "ready:" in log
    assert not [key for key in (*keys.values(), "imp_wrong") if key in log]


# --- keys -------------------------------------------------------------------------------------------------------------


def test_every_route_but_the_public_ones_wants_a_key(server_with_keys: Server) -> None:
    with httpx.Client(base_url=server_with_keys.url) as client:
        paths: Json = client.get("/openapi.json").json()["paths"]
        public = {"/livez", "/readyz", "/health", "/ping", "/version"}
        assert public < paths.keys()
        for path in (*public, "/v1/health", "/", "/playground/app.js"):
            assert client.get(path).status_code == 200
        for path, methods in {**paths, "/v1/nothing": {"get": None}}.items():
            for method in methods if path not in public else ():
                response = client.request(method, path.replace("{id}", "alice"))
                assert response.status_code == 401 and response.headers["WWW-Authenticate"] == "Bearer"
                if not path.startswith(("/api/", "/v1/messages")):  # whose errors have other interfaces' shapes
                    assert_error(response, 401, "invalid_api_key")


@pytest.mark.parametrize(
    "authorization",
    ["", "Bearer", "Bearer imp_wrong", "Basic {}", "{}", "Bearer {}x", "Bearer {} {}", "Bearer \xe9"],
)
def test_a_wrong_key_is_refused_and_never_repeated(
    server_with_keys: Server, keys: dict[str, str], authorization: str
) -> None:
    header = authorization.replace("{}", keys["bo"]).encode("latin-1")
    response = httpx.get(f"{server_with_keys.url}/v1/models", headers={b"Authorization": header})
    error = assert_error(response, 401, "invalid_api_key")
    assert error["type"] == "invalid_request_error"
    assert keys["bo"] not in response.text and "imp_" not in response.text


def test_two_authorization_headers_are_refused(server_with_keys: Server, keys: dict[str, str]) -> None:
    twice = [("Authorization", f"Bearer {keys[owner]}") for owner in ("bo", "acme")]
    assert httpx.get(f"{server_with_keys.url}/v1/models", headers=twice).status_code == 401


def test_the_client_gets_its_own_error(server_with_keys: Server) -> None:
    client = openai.OpenAI(base_url=f"{server_with_keys.url}/v1", api_key="imp_wrong")
    with client, pytest.raises(openai.AuthenticationError) as error:
        client.models.list()
    assert error.value.code == "invalid_api_key"


# --- limits -----------------------------------------------------------------------------------------------------------


def test_reading_takes_no_place_of_a_session(user: Callable[[str], Client]) -> None:
    few = user("few")
    for name in ("read-1", "read-2"):
        assert few.score(name, TEXT)["version"] == 0
        assert few.complete(session=name, adapt="predict")["adaptation"]["version_to"] == 0
    few.observe("first", TEXT)
    assert few.score("read-3", TEXT)["version"] == 0, "also of a tenant that has all its sessions"
    few.http.delete("/v1/sessions/first")


def test_a_tenant_at_its_sessions_makes_no_more(user: Callable[[str], Client]) -> None:
    few = user("few")
    few.observe("first", TEXT)
    file = few.http.get("/v1/sessions/first/export").content
    for response in (
        few.post("sessions/second/observe", {"text": TEXT}),
        few.post("completions", few.completion(session="second")),
        few.http.put("/v1/sessions/second", json={}),
        few.post("sessions/first/fork", {"id": "second"}),
        import_file(few, "second", file),
    ):
        error = assert_error(response, 429, "session_limit")
        assert "1 sessions and has 1" in error["message"]
        assert response.headers["x-should-retry"] == "false"
    few.observe("first", TEXT)
    assert import_file(few, "first", file).status_code == 200
    assert few.http.delete("/v1/sessions/first").status_code == 200
    assert_error(few.post("completions", few.completion([5] * 600, session="second")), 400, "context_length_exceeded")
    few.observe("third", TEXT)  # the failed requests do not count
    few.http.delete("/v1/sessions/third")


def test_a_tenant_at_its_bytes_predicts_but_learns_no_more(user: Callable[[str], Client]) -> None:
    laden = user("laden")
    key = {"Idempotency-Key": "k"}
    learned = assert_success(laden.post("sessions/first/observe", {"text": TEXT}, **key))
    num_bytes, file = laden.session("first")["bytes"], laden.http.get("/v1/sessions/first/export").content
    requests: dict[str, Json] = {
        "sessions/first/observe": {"text": TEXT},
        "sessions/second/observe": {"text": TEXT},
        "sessions/first/score": {"text": TEXT, "learn": True},
        "completions": laden.completion(session="first"),
        "sessions/first/fork": {"id": "second"},
    }
    for path, body in requests.items():
        error = assert_error(laden.post(path, body), 429, "byte_limit")
        assert f"1 bytes and hold {num_bytes}" in error["message"]
    assert_error(import_file(laden, "second", file), 429, "byte_limit")
    assert_error(import_file(laden, "first", file), 429, "byte_limit")
    assert (
        assert_success(laden.post("sessions/first/observe", {"text": TEXT}, **key)) == learned
    )  # the remembered answer
    assert laden.score("first", TEXT)["version"] == 1
    assert laden.complete(session="first", adapt="predict")["adaptation"]["version_to"] == 1
    assert laden.version("second") == 0
    laden.http.delete("/v1/sessions/first")
    laden.observe("first", TEXT)
    assert (
        assert_success(laden.post("sessions/first/rollback", {"version": 0}))["bytes"] == 0
    )  # a rollback frees the bytes
    laden.observe("first", TEXT)


def test_the_usage_record_equals_the_bytes_of_the_sessions(
    user: Callable[[str], Client], server_with_keys: Server
) -> None:
    """After every kind of new version, and after erasures."""
    bookish = user("bookish")

    def agrees() -> bool:
        sessions = assert_success(bookish.http.get("/v1/sessions"))["data"]
        num_bytes = {session["id"]: session["bytes"] for session in sessions}
        return tenant_usage(server_with_keys.data_dir, "bookish") == num_bytes | {"*": sum(num_bytes.values())}

    bookish.http.put("/v1/sessions/one", json={"keep_text": True})
    for turn in range(3):
        bookish.observe("one", TEXT[turn:])
    assert agrees()
    file = bookish.http.get("/v1/sessions/one/export").content
    changes: dict[str, Json] = {"fork": {"id": "two"}, "unlearn": {"version": 2}, "rollback": {"version": 1}}
    for path, body in changes.items():
        assert bookish.post(f"sessions/one/{path}", body).is_success and agrees()
    for name in ("one", "three"):
        assert import_file(bookish, name, file).is_success and agrees()
    for name in ("one", "two", "three"):
        assert bookish.http.delete(f"/v1/sessions/{name}").is_success and agrees()


def test_learned_tokens_are_told_and_bounded(server_with_keys: Server, keys: dict[str, str]) -> None:
    with openai.OpenAI(base_url=f"{server_with_keys.url}/v1", api_key=keys["thrifty"], max_retries=0) as client:

        def complete(**fields: str) -> Any:
            create = client.completions.with_raw_response.create
            return create(model="tiny", prompt=TEXT, max_tokens=2, extra_body={"session": "s", **fields}).http_response

        first = complete(adapt="predict")
        assert first.headers["x-ratelimit-limit-tokens"] == "20"
        assert first.headers["x-ratelimit-remaining-tokens"] == "20"
        assert first.headers["x-ratelimit-reset-tokens"] == "0.000s"
        learned = first.json() and complete().json()["adaptation"]["tokens_learned"]
        assert learned > 20
        with pytest.raises(openai.RateLimitError) as error:
            complete()
        headers = error.value.response.headers
        assert error.value.code == "rate_limit_exceeded"
        assert "20 tokens per minute" in error.value.message
        assert headers["x-ratelimit-remaining-tokens"] == "0"
        # 3 s per token: the tokens over the limit are paid off first.
        assert 0 < int(headers["retry-after"]) <= 3 * (learned - 20 + 1)
        assert float(headers["x-ratelimit-reset-tokens"].removesuffix("s")) > 60 >= 3 * 20
        assert complete(adapt="predict").json()["adaptation"]["tokens_learned"] == 0


def test_requests_in_flight_are_told_and_bounded(user: Callable[[str], Client]) -> None:
    single, bo = user("single"), user("bo")
    headers = single.http.get("/v1/models").headers
    assert (headers["x-ratelimit-limit-requests"], headers["x-ratelimit-remaining-requests"]) == ("1", "0")
    assert "x-ratelimit-limit-requests" not in bo.http.get("/v1/models").headers
    with single.stream(prompt=TEXT[:60], max_tokens=400, logit_bias=NO_EOS) as chunks:
        next(chunks)
        response = single.http.get("/v1/models")
        assert "1 requests in flight" in assert_error(response, 429, "rate_limit_exceeded")["message"]
        assert response.headers["x-ratelimit-limit-requests"] == "1"
        bo.complete()
    wait_until(lambda: single.http.get("/v1/models").status_code == 200)


# --- the command line -------------------------------------------------------------------------------------------------


def test_the_commands_send_the_key_from_the_environment(
    server_with_keys: Server, keys: dict[str, str], user: Callable[[str], Client], tmp_path: Path
) -> None:
    (tmp_path / "text").write_text(TEXT)
    teach = ("observe", str(tmp_path / "text"), "--session", "by-command")
    failure = imprint(*teach, IMPRINT_URL=server_with_keys.url)
    assert failure.returncode == 1 and "An API key is required" in failure.stderr
    assert imprint(*teach, IMPRINT_URL=server_with_keys.url, IMPRINT_API_KEY=keys["bo"]).returncode == 0
    assert (user("bo").version("by-command"), user("acme").version("by-command")) == (1, 0)


def test_the_commands_do_not_retry_at_a_quota(
    server_with_keys: Server, keys: dict[str, str], user: Callable[[str], Client], tmp_path: Path
) -> None:
    few = user("few")
    few.observe("first", TEXT)
    (tmp_path / "text").write_text(TEXT)
    teach = ("observe", str(tmp_path / "text"), "--session", "second")
    failure = imprint(*teach, IMPRINT_URL=server_with_keys.url, IMPRINT_API_KEY=keys["few"])
    assert failure.returncode == 1 and "1 sessions" in failure.stderr and "trying again" not in failure.stderr
    few.http.delete("/v1/sessions/first")
