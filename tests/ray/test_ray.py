"""The service on a real Ray cluster of three nodes on this machine: who serves a session, and what faults cost.

Ray is in an environment of its own: `make ray`.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from uuid import uuid4

import httpx
import pytest

os.environ["RAY_SERVE_SESSION_ID_HEADER_KEY"] = "X-Imprint-Session"  # before Ray is imported, in all its processes
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

ray = pytest.importorskip("ray")

from ray import serve  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402
from ray.util.state import list_actors  # noqa: E402

import imprint  # noqa: E402
from service.model_loading import StartError  # noqa: E402
from service.ray import Replica, app, deployment_of  # noqa: E402
from tests.live import NO_EOS, wait_until  # noqa: E402
from tests.ray.replicas import NamedReplica  # noqa: E402
from tests.service.valkeys import free_ports, valkey  # noqa: E402

SESSIONS, NAMES = 20, 200


@pytest.fixture(scope="module")
def settings(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ray")
    (port,) = free_ports(1)
    with valkey(folder / "valkey", port):
        yield {
            "model": str(tiny_base),
            "redis_url": f"redis://127.0.0.1:{port}",
            "recall_tokens": 0,
            "threads": 1,
            "data_dir": str(folder / "data"),
        }


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Yield a cluster of a head without replicas and two nodes that have room for two each."""
    memory = {"object_store_memory": 80 * 2**20}
    nodes = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **memory})
    for _ in range(2):
        nodes.add_node(num_cpus=2, **memory)
    ray.init(address=nodes.address, namespace="serve", log_to_driver=False)
    try:
        yield nodes
    finally:
        serve.shutdown()
        ray.shutdown()
        nodes.shutdown()


@pytest.fixture(scope="module")
def url(cluster: Cluster) -> str:
    (port,) = free_ports(1)
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port})
    return f"http://127.0.0.1:{port}"


def deploy(settings: dict[str, Any], num_replicas: int, url: str) -> None:
    """Deploy replicas, and wait until as many ranks answer."""
    deployment = deployment_of(NamedReplica).options(num_replicas=num_replicas, ray_actor_options={"num_cpus": 1})
    serve.run(deployment.bind(settings), name="imprint", route_prefix="/")
    names = [f"probe-{number}" for number in range(40)]
    wait_until(lambda: len(set(where(url, names, "x-rank").values())) == num_replicas)


def where(url: str, names: list[str], header: str = "x-replica") -> dict[str, str]:
    """Return the replica, or its rank, that answers for each session."""
    with httpx.Client(timeout=60) as http:
        return {
            name: http.get(f"{url}/v1/sessions/{name}", headers={"X-Imprint-Session": name}).headers[header]
            for name in names
        }


def test_a_session_stays_at_one_replica_and_few_move(settings: dict[str, Any], url: str) -> None:
    names = [f"person-{number}" for number in range(NAMES)]
    deploy(settings, 2, url)
    two = where(url, names, "x-rank")
    for name in names[:SESSIONS]:
        assert ranks_of_turns(url, name) == {two[name]}
    deploy(settings, 3, url)
    three = where(url, names, "x-rank")
    moved = sum(two[name] != three[name] for name in names)
    assert moved <= 0.4 * NAMES, moved
    before = where(url, names)
    deploy(settings | {"max_queue": 99}, 3, url)
    assert set(where(url, names).values()).isdisjoint(before.values()), "other processes"
    assert where(url, names, "x-rank") == three, "in the same places"
    print(f"from two to three replicas {moved} of {NAMES} sessions moved")


def ranks_of_turns(url: str, name: str) -> set[str]:
    """Take a session through its turns with our client; return the ranks of the replicas that answered."""
    client, ranks = imprint.Client(url), set[str]()

    def note(response: httpx.Response) -> None:
        if response.url.path != "/v1/models":  # which is about no session
            ranks.add(response.headers["x-rank"])

    client._http.event_hooks = {"response": [note]}
    for hour in ("noon", "one"):
        client.observe(name, f"The fox of {name} sleeps at {hour}.")
    list(client.stream("The fox", session=name, max_tokens=3))
    assert client.get(name).version == 3
    return ranks


def test_a_new_deployment_fails_no_stream(settings: dict[str, Any], url: str) -> None:
    deploy(settings, 2, url)
    session = uuid4().hex
    body = {"model": "tiny", "prompt": "The fox", "session": session, "max_tokens": 150, "stream": True}
    headers = {"X-Imprint-Session": session}
    with ThreadPoolExecutor(1) as pool, httpx.Client(timeout=300) as http:
        with http.stream(
            "POST", f"{url}/v1/completions", json=body | {"logit_bias": NO_EOS}, headers=headers
        ) as answer:
            lines = answer.iter_lines()
            assert next(lines).startswith("data: ")
            deployed = pool.submit(deploy, settings | {"max_queue": 98}, 2, url)
            rest = [line for line in lines if line.startswith("data: ")]
        deployed.result()
    assert rest[-1] == "data: [DONE]" and len(rest) > 20
    assert imprint.Client(url).get(session).version == 1


def test_a_killed_replica_costs_no_turn(settings: dict[str, Any], url: str) -> None:
    deploy(settings, 2, url)
    client = imprint.Client(url)
    for number in range(4):
        client.observe("fox", f"The fox sleeps at {number}.")
    actor = next(
        each for each in list_actors(filters=[("state", "=", "ALIVE")]) if where(url, ["fox"])["fox"] in each.name
    )
    os.kill(actor.pid, signal.SIGKILL)
    for number in range(4, 8):
        client.observe("fox", f"The fox sleeps at {number}.")
    assert client.get("fox").version == 8


def test_what_ships_serves(settings: dict[str, Any], url: str) -> None:
    serve.run(app(settings), name="imprint", route_prefix="/")
    imprint.Client(url).observe("shipped", "The fox sleeps at noon.")
    assert imprint.Client(url).get("shipped").version == 1


def test_a_replica_without_a_shared_store_is_refused() -> None:
    with pytest.raises(StartError, match="IMPRINT_REDIS_URL"):
        Replica({"model": "x", "redis_url": None})


def test_a_node_whose_proxy_does_not_know_sessions_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_SERVE_SESSION_ID_HEADER_KEY", "x-session-id")
    with pytest.raises(StartError, match="must be X-Imprint-Session"):
        Replica({"model": "x", "redis_url": "redis://redis:6379/0"})


def test_the_shipped_config_names_the_application() -> None:
    assert app({"model": "x"})._bound_deployment.name == "imprint"
