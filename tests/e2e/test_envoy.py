"""Three replicas behind a real Envoy with the configuration that ships: who serves a session, and what faults cost."""

from __future__ import annotations

import shutil
import subprocess
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest
import yaml

import imprint
from tests.conftest import Server, started
from tests.live import NO_EOS, Client, in_background, wait_until
from tests.service.valkeys import free_ports, valkey

ROOT = Path(__file__).parents[2]
ENVOY = shutil.which("envoy", path=sysconfig.get_path("scripts"))
SESSIONS, NAMES, TURNS = 60, 300, 4

pytestmark = pytest.mark.skipif(ENVOY is None, reason="no Envoy for this platform")


@pytest.fixture(scope="module")
def replicas(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    """Yield three servers on one Valkey."""
    folder = tmp_path_factory.mktemp("replicas")
    (port,) = free_ports(1)
    url = f"redis://127.0.0.1:{port}"
    with valkey(folder / "valkey", port):
        servers = [Server(str(tiny_base), folder / f"data-{n}", redis_url=url, recall_tokens=0) for n in range(4)]
        with started(servers):
            yield servers


@contextmanager
def envoy(folder: Path, *places: Server) -> Iterator[str]:
    """Run Envoy in front of servers, in the places of the configuration; yield its address.

    An answer says which server gave it, in `x-replica`.
    """
    listen, *_ = free_ports(1)
    config = yaml.safe_load((ROOT / "deploy/envoy/envoy.yaml").read_text())
    (listener,), (cluster,) = config["static_resources"]["listeners"], config["static_resources"]["clusters"]
    listener["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": listen}
    manager = listener["filter_chains"][0]["filters"][0]["typed_config"]
    (host,) = manager["route_config"]["virtual_hosts"]
    host["response_headers_to_add"] = [{"header": {"key": "x-replica", "value": "%UPSTREAM_REMOTE_ADDRESS%"}}]
    endpoints = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
    del endpoints[len(places) :]
    for endpoint, server in zip(endpoints, places, strict=True):
        address = {"address": "127.0.0.1", "port_value": httpx.URL(server.url).port}
        endpoint["endpoint"]["address"]["socket_address"] = address
    path = folder / f"{uuid4().hex}.yaml"
    path.write_text(yaml.safe_dump(config))
    command = [str(ENVOY), "-c", str(path), "--use-dynamic-base-id", "--concurrency", "1", "--log-level", "error"]
    with subprocess.Popen(command) as process:
        try:
            url = f"http://127.0.0.1:{listen}"
            wait_until(lambda: knows(url, len(places)))
            yield url
        finally:
            process.kill()


def knows(url: str, num_servers: int) -> bool:
    """Return whether Envoy has found all servers healthy: until then it sends sessions elsewhere."""
    try:
        return len(set(where(url, [f"probe-{number}" for number in range(40)]).values())) == num_servers
    except (httpx.TransportError, KeyError):
        return False


class Told:
    """A client of ours that notes which replica gave each answer."""

    def __init__(self, url: str, **options: Any) -> None:
        self.client, self.replicas = imprint.Client(url, **options), list[str]()
        self.client._http.event_hooks = {"response": [self._note]}

    def _note(self, response: httpx.Response) -> None:
        if response.url.path != "/v1/models":  # which is about no session
            self.replicas.append(response.headers["x-replica"])


def replicas_of_sessions(url: str, names: list[str]) -> dict[str, set[str]]:
    """Take each session through its turns; return the replicas that served it."""
    found = {}
    for name in names:
        told = Told(url)
        for turn in range(TURNS):
            told.client.observe(name, f"The fox of {name} sleeps at noon {turn}.")
        told.client.get(name)
        list(told.client.stream("The fox", session=name, max_tokens=2))
        found[name] = set(told.replicas)
    return found


def where(url: str, names: list[str]) -> dict[str, str]:
    """Return the replica that answers for each session, by a path alone."""
    with httpx.Client(timeout=60) as http:
        return {name: http.get(f"{url}/v1/sessions/{name}").headers["x-replica"] for name in names}


def test_a_session_stays_at_one_replica_and_few_move_when_one_is_added(replicas: list[Server], tmp_path: Path) -> None:
    names = [f"person-{number}" for number in range(NAMES)]
    with envoy(tmp_path, *replicas[:2]) as url:
        two = where(url, names)
    with envoy(tmp_path, *replicas[:3]) as url:
        served = replicas_of_sessions(url, names[:SESSIONS])
        three = where(url, names)
    assert served == {name: {three[name]} for name in served}, "all turns at one replica, and a path names it as well"
    moved = sum(two[name] != three[name] for name in names)
    assert moved <= 0.4 * NAMES, moved
    with envoy(tmp_path, replicas[0], replicas[1], replicas[3]) as url:  # a new server in the third one's place
        after = where(url, names)
    gone, new = (f"127.0.0.1:{httpx.URL(server.url).port}" for server in replicas[2:])
    assert after == {name: new if by == gone else by for name, by in three.items()}


@pytest.mark.parametrize("name", ["ada", "a~b:c@d+e=f,g", "per%40cent"])
def test_a_name_in_a_path_is_the_name_in_the_header(replicas: list[Server], tmp_path: Path, name: str) -> None:
    with envoy(tmp_path, *replicas[:3]) as url:
        by_path = httpx.get(f"{url}/v1/sessions/{name}").headers["x-replica"]
        unquoted = name.replace("%40", "@")
        body = {"model": replicas[0].model, "prompt": "x", "max_tokens": 1}
        answer = httpx.post(f"{url}/v1/completions", json=body, headers={"X-Imprint-Session": unquoted}, timeout=60)
        assert answer.headers["x-replica"] == by_path


def test_streams_pass_piece_by_piece_and_a_client_that_goes_is_noticed(replicas: list[Server], tmp_path: Path) -> None:
    session = uuid4().hex
    body = {"model": replicas[0].model, "prompt": "The fox", "session": session, "max_tokens": 100, "stream": True}
    body |= {"learn": "all", "logit_bias": NO_EOS}
    with envoy(tmp_path, *replicas[:3]) as url, httpx.Client(timeout=60) as http:
        with http.stream("POST", f"{url}/v1/completions", json=body) as answer:
            assert next(answer.iter_lines()).startswith("data: ")
        assert http.post(f"{url}/v1/sessions/{session}/observe", json={"text": "The fox."}).json()["version"] == 1


def test_a_replica_that_dies_or_drains_costs_no_turn(replicas: list[Server], tmp_path: Path) -> None:
    """One is killed while it teaches, another is told to stop while it streams: clients notice neither."""
    with envoy(tmp_path, *replicas[:3]) as url:
        by_port = {str(httpx.URL(server.url).port): server for server in replicas[:3]}
        names = {by.rpartition(":")[2]: name for name, by in where(url, [f"one-{n}" for n in range(30)]).items()}
        dying, draining, _ = names
        client = imprint.Client(url)
        client.observe(names[dying], "The fox sleeps.")
        by_port[dying].kill()
        assert client.observe(names[dying], "The fox wakes.").version == 2
        assert client.get(names[dying]).version == 2

        options: Any = {"max_tokens": 60, "learn": "all", "logit_bias": NO_EOS}
        with ThreadPoolExecutor() as pool, Client(by_port[draining].url) as direct:
            text = in_background(
                pool, direct, lambda: list(client.stream("The fox", session=names[draining], **options))
            )
            code = by_port[draining].stop()
            assert code == 0 and len(text.result()) > 10
        assert client.observe(names[draining], "The fox sleeps.").version == 2
