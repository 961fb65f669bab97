"""Tenants: the key decides whose sessions a request sees, nothing of anybody else's shows, and limits hold."""

from __future__ import annotations

import hmac
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from service.app import run
from service.errors import Unauthorized
from service.settings import Settings
from service.tenants import DEFAULT, OPERATOR, Keys, KeysError, Limits, Tenant, new_key
from tests.conftest import Server
from tests.live import ENDLESS, Client, Json, refusal, stored, until
from tests.tiny import TEXT

OWNERS = ("acme", "bo", "few", "full", "slow", "single", OPERATOR)
LIMITS = {"few": "sessions=1", "full": "bytes=1", "slow": "tokens_per_minute=20", "single": "requests=1"}


@pytest.fixture(scope="module")
def keys() -> dict[str, str]:
    """The keys by tenant; the server's file is made of them."""
    return {}


@pytest.fixture(scope="module")
def guarded(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory, keys: dict[str, str]) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("guarded")
    lines = []
    for owner in OWNERS:
        keys[owner], line = new_key(owner)
        lines.append(f"{line} {LIMITS.get(owner, '')}")
    file = folder / "keys"
    file.write_text("# who may come in\n\n" + "\n".join(lines[1:]) + "\n")
    settings = {"api_keys": lines[0], "api_keys_file": file, "host": "0.0.0.0", "log_level": "debug"}
    server = Server(str(tiny_base), folder / "data", **settings).start()
    yield server
    assert server.stop() == 0, server.log.read_text()


@pytest.fixture
def user(guarded: Server, keys: dict[str, str]) -> Iterator[Callable[[str], Client]]:
    made: list[Client] = []

    def of(owner: str) -> Client:
        made.append(Client(guarded.url, key=keys[owner]))
        return made[-1]

    yield of
    for client in made:
        client.http.close()


def said(response: httpx.Response) -> tuple[int, bytes, list[str]]:
    """All that a response tells, but its request id and date."""
    return response.status_code, response.content, sorted(set(response.headers) - {"x-request-id", "date"})


# --- no one else's ----------------------------------------------------------------------------------------------------


def test_one_id_is_a_session_of_its_own_for_each_key(guarded: Server, keys: dict[str, str]) -> None:
    """The real client: two keys, one session id, two memories."""

    def chat(owner: str, text: str) -> Any:
        with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=keys[owner], max_retries=0) as client:
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
    assert chat("bo", TEXT)["version_from"] == 0  # nor is it taken for resent
    with Client(guarded.url, key=keys["acme"]) as acme, Client(guarded.url, key=keys["bo"]) as bo:
        assert (acme.version("shared"), bo.version("shared")) == (2, 1)
        assert bo.http.delete("/v1/sessions/shared").status_code == 200
        assert (acme.version("shared"), bo.version("shared")) == (2, 0)


def test_what_a_key_teaches_shows_under_no_other_key(user: Callable[[str], Client]) -> None:
    acme, bo = user("acme"), user("bo")
    untaught = bo.score("unheard-of", TEXT)
    acme.observe("secret", TEXT * 2)
    mine = acme.score("secret", TEXT)
    assert mine["logprobs"] != mine["frozen_logprobs"] == untaught["frozen_logprobs"]
    assert bo.score("secret", TEXT) == untaught
    before = acme.session("secret")
    assert bo.http.put("/v1/sessions/secret", json={"adapt": "predict"}).status_code in (200, 201)
    assert bo.http.delete("/v1/sessions/secret").status_code == 200
    assert acme.session("secret") == before


REQUESTS: dict[str, Callable[[Client, str], httpx.Response]] = {
    "get": lambda client, name: client.http.get(f"/v1/sessions/{name}"),
    "delete": lambda client, name: client.http.delete(f"/v1/sessions/{name}"),
    "if-match": lambda client, name: client.post(f"sessions/{name}/observe", {"text": TEXT}, '"v1"'),
    "any": lambda client, name: client.http.put(f"/v1/sessions/{name}", json={}, headers={"If-Match": "*"}),
    "chat": lambda client, name: client.post("completions", client.completion(session=name), '"v1"'),
    "list": lambda client, name: client.http.get("/v1/sessions", params={"after": name[:-1]}),
    "cursor": lambda client, name: client.http.get("/v1/sessions", params={"after": name}),
}


@pytest.mark.parametrize("request_", REQUESTS.values(), ids=REQUESTS)
def test_anothers_session_answers_as_one_that_is_nowhere(
    user: Callable[[str], Client], request_: Callable[[Client, str], httpx.Response]
) -> None:
    """Status, headers and body are the same, but for the id that was asked for."""
    acme, few = user("acme"), user("few")
    acme.observe("theirs", TEXT)
    theirs, nowhere = said(request_(few, "theirs")), said(request_(few, "absent"))
    assert theirs[0] != 403
    assert theirs[1].replace(b"theirs", b"absent") == nowhere[1]
    assert theirs[::2] == nowhere[::2]
    assert acme.version("theirs") >= 1


@pytest.mark.parametrize("name", ["acme/theirs", "default/theirs", "}acme/theirs", "../acme/theirs", "acme:theirs"])
@pytest.mark.parametrize("where", ["session", "user", "X-Imprint-Session"])
def test_no_name_leads_into_another_namespace(
    user: Callable[[str], Client], guarded: Server, name: str, where: str
) -> None:
    bo = user("bo")
    headers, fields = ({where: name}, {}) if where.startswith("X-") else ({}, {where: name})
    named = {"X-Imprint-Tenant": "acme", "OpenAI-Organization": "acme", "OpenAI-Project": "acme"}
    response = bo.post("completions", bo.completion(**fields), **headers, **named)
    if ":" in name:  # an ordinary name, of bo's own
        assert response.status_code == 200
        assert stored(guarded.data_dir, name, tenant="bo") and not stored(guarded.data_dir, name, tenant="acme")
    else:
        refusal(response, 400, response.json()["error"]["code"])
    assert bo.post("completions", bo.completion(tenant="acme")).status_code == 400


def test_metrics_have_a_key_of_their_own_and_name_nobody(
    user: Callable[[str], Client], guarded: Server, keys: dict[str, str]
) -> None:
    acme, operator = user("acme"), user(OPERATOR)
    acme.observe("unmistakable", TEXT)
    refusal(httpx.get(f"{guarded.url}/metrics"), 401, "invalid_api_key")
    refusal(acme.http.get("/metrics"), 401, "invalid_api_key")
    refusal(operator.http.get("/v1/sessions"), 401, "invalid_api_key")
    exposed = operator.http.get("/metrics").text
    assert "imprint_tokens_learned_total" in exposed
    assert not [name for name in (*OWNERS[:-1], "unmistakable", *keys.values()) if name in exposed]


def test_the_log_holds_no_key(guarded: Server, keys: dict[str, str], user: Callable[[str], Client]) -> None:
    user("bo").complete()
    httpx.get(f"{guarded.url}/v1/models", headers={"Authorization": "Bearer imp_wrong"})
    log = guarded.log.read_text()
    assert "ready:" in log
    assert not [key for key in (*keys.values(), "imp_wrong") if key in log]


# --- keys -------------------------------------------------------------------------------------------------------------


def test_every_route_but_the_public_ones_wants_a_key(guarded: Server) -> None:
    with httpx.Client(base_url=guarded.url) as client:
        paths: Json = client.get("/openapi.json").json()["paths"]
        public = {"/livez", "/readyz"}
        assert public < paths.keys()
        for path in (*public, "/", "/playground/app.js"):
            assert client.get(path).status_code == 200
        for path, methods in {**paths, "/v1/nothing": {"get": None}}.items():
            for method in methods if path not in public else ():
                response = client.request(method, path.replace("{id}", "alice"))
                refusal(response, 401, "invalid_api_key")
                assert response.headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "given",
    ["", "Bearer", "Bearer imp_wrong", "Basic {}", "{}", "Bearer {}x", "Bearer {} {}", "Bearer \xe9"],
)
def test_a_wrong_key_is_refused_and_never_repeated(guarded: Server, keys: dict[str, str], given: str) -> None:
    header = given.replace("{}", keys["bo"]).encode("latin-1")
    response = httpx.get(f"{guarded.url}/v1/models", headers={b"Authorization": header})
    error = refusal(response, 401, "invalid_api_key")
    assert error["type"] == "invalid_request_error"
    assert keys["bo"] not in response.text and "imp_" not in response.text


def test_two_authorizations_are_none(guarded: Server, keys: dict[str, str]) -> None:
    twice = [("Authorization", f"Bearer {keys[owner]}") for owner in ("bo", "acme")]
    assert httpx.get(f"{guarded.url}/v1/models", headers=twice).status_code == 401


def test_the_client_gets_its_own_error(guarded: Server) -> None:
    client = openai.OpenAI(base_url=f"{guarded.url}/v1", api_key="imp_wrong")
    with client, pytest.raises(openai.AuthenticationError) as refused:
        client.models.list()
    assert refused.value.code == "invalid_api_key"


def bearer(key: str) -> str:
    return f"Bearer {key}"


def test_a_key_is_compared_with_every_hash_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made = [new_key(owner) for owner in ("a", "b", "c")]
    keys = Keys(Settings(api_keys=",".join(line for _, line in made)))
    compared: list[str] = []
    compare = hmac.compare_digest

    def watched(stored: str, given: str) -> bool:
        compared.append(stored)
        return compare(stored, given)

    monkeypatch.setattr(hmac, "compare_digest", watched)
    for (key, _), owner in zip(made, "abc", strict=True):
        assert keys.tenant(bearer(key)).name == owner
    with pytest.raises(Unauthorized):
        keys.tenant(bearer("imp_wrong"))
    assert compared == [line.split(":")[1] for _, line in made] * 4
    assert not any(key in line for key, line in made)


def test_keys_rotate_while_the_server_runs(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file = tmp_path / "keys"
    (old, old_line), (new, new_line) = new_key("acme"), new_key("acme")
    file.write_text(old_line)
    keys = Keys(Settings(api_keys_file=file))

    def enters(key: str) -> bool:
        try:
            return keys.tenant(bearer(key)).name == "acme"
        except Unauthorized:
            return False

    assert (enters(old), enters(new)) == (True, False)
    file.write_text(f"{old_line}\n{new_line}\n")
    assert (enters(old), enters(new)) == (True, True)
    file.write_text(f"{new_line}\n")
    assert (enters(old), enters(new)) == (False, True)
    for fault in ("acme:nonsense\n", None):
        file.write_text(fault) if fault else file.unlink()
        assert (enters(old), enters(new)) == (False, True)
        assert "stay as they were" in caplog.text
        caplog.clear()
    file.write_text("# nobody\n")
    assert (enters(old), enters(new)) == (False, False)


HASH, OTHER = "ab" * 32, "cd" * 32


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ("", "hold no key"),
        ("# acme", "hold no key"),
        ("acme", "TENANT:SHA256"),
        (f"acme/x:{HASH}", "TENANT:SHA256"),
        (f"acme:{HASH[:-1]}", "TENANT:SHA256"),
        (f"acme:{HASH} sessions=-1", "TENANT:SHA256"),
        (f"acme:{HASH} speed=1", "one of sessions, bytes, tokens_per_minute, requests, got speed"),
        (f"acme:{HASH}\nbo:{HASH}", "line 2: this key belongs to another tenant"),
        (f"acme:{HASH} bytes=1\nacme:{OTHER} bytes=2", "line 2: bytes of acme was 1 before, and is 2 here"),
    ],
)
def test_faulty_keys_stop_the_start_with_one_line(tmp_path: Path, lines: str, reason: str) -> None:
    file = tmp_path / "keys"
    file.write_text(lines)
    with pytest.raises(KeysError) as fault:
        Keys(Settings(api_keys_file=file))
    assert reason in str(fault.value)
    assert "\n" not in str(fault.value) and HASH[:-1] not in str(fault.value)


def test_a_tenants_own_limits_go_before_the_settings() -> None:
    (key, line), (plain, other) = new_key("acme"), new_key("bo")
    keys = Keys(Settings(api_keys=f"{line} bytes=5 sessions=0,{other}", tenant_sessions=3, tenant_requests=4))
    assert keys.tenant(bearer(key)) == Tenant("acme", Limits(sessions=0, bytes=5, requests=4))
    assert keys.tenant(bearer(plain)) == Tenant("bo", Limits(sessions=3, requests=4))


def test_without_keys_everybody_is_the_default_tenant() -> None:
    assert Keys(Settings()).tenant(None) == Keys(Settings()).tenant("Bearer none") == Tenant(DEFAULT)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_without_keys_no_other_machine_is_served(host: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Settings(host=host, port=0, data_dir=tmp_path / "data")) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"imprint: {host} can be reached from other machines")
    assert "imprint keys new" in line and "IMPRINT_API_KEYS_FILE" in line
    assert not (tmp_path / "data").exists()


# --- limits -----------------------------------------------------------------------------------------------------------


def test_a_tenant_at_its_sessions_makes_no_more(user: Callable[[str], Client]) -> None:
    few = user("few")
    few.observe("first", TEXT)
    for refused in (
        few.post("sessions/second/observe", {"text": TEXT}),
        few.post("completions", few.completion(session="second")),
        few.http.put("/v1/sessions/second", json={}),
    ):
        error = refusal(refused, 429, "session_limit")
        assert "1 sessions and has 1" in error["message"]
        assert refused.headers["x-should-retry"] == "false"
    few.observe("first", TEXT)
    assert few.http.delete("/v1/sessions/first").status_code == 200
    refusal(few.post("completions", few.completion(session="second", max_tokens=10**6)), 400, "context_length_exceeded")
    few.observe("third", TEXT)  # what failed has left no trace
    few.http.delete("/v1/sessions/third")


def test_a_tenant_at_its_bytes_predicts_and_learns_no_more(user: Callable[[str], Client]) -> None:
    full = user("full")
    held = full.observe("first", TEXT) and full.session("first")["bytes"]
    requests: dict[str, Json] = {
        "sessions/first/observe": {"text": TEXT},
        "sessions/second/observe": {"text": TEXT},
        "sessions/first/score": {"text": TEXT, "learn": True},
        "completions": full.completion(session="first"),
    }
    for path, body in requests.items():
        error = refusal(full.post(path, body), 429, "byte_limit")
        assert f"1 bytes and hold {held}" in error["message"]
    assert full.score("first", TEXT)["version"] == 1
    assert full.complete(session="first", adapt="predict")["adaptation"]["version_to"] == 1
    assert full.version("second") == 0
    full.http.delete("/v1/sessions/first")
    full.observe("first", TEXT)


def test_learned_tokens_are_told_and_bounded(guarded: Server, keys: dict[str, str]) -> None:
    with openai.OpenAI(base_url=f"{guarded.url}/v1", api_key=keys["slow"], max_retries=0) as client:

        def complete(**fields: str) -> Any:
            create = client.completions.with_raw_response.create
            return create(model="tiny", prompt=TEXT, max_tokens=2, extra_body={"session": "s", **fields}).http_response

        first = complete(adapt="predict")
        assert first.headers["x-ratelimit-limit-tokens"] == "20"
        assert first.headers["x-ratelimit-remaining-tokens"] == "20"
        assert first.headers["x-ratelimit-reset-tokens"] == "0.000s"
        learned = first.json() and complete().json()["adaptation"]["tokens_learned"]
        assert learned > 20
        with pytest.raises(openai.RateLimitError) as refused:
            complete()
        headers = refused.value.response.headers
        assert refused.value.code == "rate_limit_exceeded"
        assert "20 tokens per minute" in refused.value.message
        assert headers["x-ratelimit-remaining-tokens"] == "0"
        # 3 s a token: those over the limit are paid off first.
        assert 0 < int(headers["retry-after"]) <= 3 * (learned - 20 + 1)
        assert float(headers["x-ratelimit-reset-tokens"].removesuffix("s")) > 60 >= 3 * 20
        assert complete(adapt="predict").json()["adaptation"]["tokens_learned"] == 0


def test_requests_in_flight_are_told_and_bounded(user: Callable[[str], Client]) -> None:
    single, bo = user("single"), user("bo")
    told = single.http.get("/v1/models").headers
    assert (told["x-ratelimit-limit-requests"], told["x-ratelimit-remaining-requests"]) == ("1", "0")
    assert "x-ratelimit-limit-requests" not in bo.http.get("/v1/models").headers
    with single.stream(prompt=TEXT[:60], max_tokens=400, logit_bias=ENDLESS) as chunks:
        next(chunks)
        refused = single.http.get("/v1/models")
        assert "1 requests in flight" in refusal(refused, 429, "rate_limit_exceeded")["message"]
        assert refused.headers["x-ratelimit-limit-requests"] == "1"
        bo.complete()
    until(lambda: single.http.get("/v1/models").status_code == 200)


# --- the command line -------------------------------------------------------------------------------------------------


def imprint(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("IMPRINT_")}
    command = [sys.executable, "-m", "service", *arguments]
    return subprocess.run(command, env=kept | environment, capture_output=True, text=True, timeout=60)


def test_a_new_key_goes_to_the_terminal_and_its_hash_to_the_file() -> None:
    made = imprint("keys", "new", "acme")
    (key,) = re.findall(r"imp_\S+", made.stderr)
    assert "imp_" not in made.stdout
    assert Keys(Settings(api_keys=made.stdout)).tenant(f"Bearer {key}").name == "acme"
    refused = imprint("keys", "new", "a/b")
    assert refused.returncode == 1 and "'a/b'" in refused.stderr and "Traceback" not in refused.stderr


def test_the_commands_send_the_key_of_the_environment(
    guarded: Server, keys: dict[str, str], user: Callable[[str], Client], tmp_path: Path
) -> None:
    (tmp_path / "text").write_text(TEXT)
    teach = ("observe", str(tmp_path / "text"), "--session", "by-command")
    refused = imprint(*teach, IMPRINT_URL=guarded.url)
    assert refused.returncode == 1 and "An API key is required" in refused.stderr
    assert imprint(*teach, IMPRINT_URL=guarded.url, IMPRINT_API_KEY=keys["bo"]).returncode == 0
    assert (user("bo").version("by-command"), user("acme").version("by-command")) == (1, 0)


def test_the_commands_do_not_wait_for_what_does_not_come(
    guarded: Server, keys: dict[str, str], user: Callable[[str], Client], tmp_path: Path
) -> None:
    few = user("few")
    few.observe("first", TEXT)
    (tmp_path / "text").write_text(TEXT)
    teach = ("observe", str(tmp_path / "text"), "--session", "second")
    refused = imprint(*teach, IMPRINT_URL=guarded.url, IMPRINT_API_KEY=keys["few"])
    assert refused.returncode == 1 and "1 sessions" in refused.stderr and "trying again" not in refused.stderr
    few.http.delete("/v1/sessions/first")
