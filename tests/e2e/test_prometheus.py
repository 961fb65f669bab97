"""A real Prometheus, as it is shipped, watches a server that works: every graph and every alert has data."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from threading import Event
from typing import Any

import httpx
import pytest
import yaml

from service.tenants import OPERATOR, new_key
from tests.conftest import Server
from tests.live import Client, assert_success, wait_until
from tests.service.valkeys import free_ports, valkey
from tests.tiny import TEXT

pytestmark = pytest.mark.e2e

DEPLOY = Path(__file__).parents[2] / "deploy"
EVERY = "1s"  # instead of 15 s
GRAFANA = {"$job": "imprint", "$instance": ".*", "$__rate_interval": "5s"}  # what it would put in
USERS, SESSIONS = 4, 10  # of each user
SCARCE = {"max_queue": 2 * USERS, "max_batch": USERS, "hot_sessions": 1}  # so that sessions come and go


@pytest.fixture(scope="module")
def prometheus(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Its API, while a server on a Valkey, with keys, is under load."""
    if shutil.which("prometheus") is None:
        pytest.skip("prometheus is not installed")
    folder = tmp_path_factory.mktemp("watched")
    (key, line), (poor, poor_line), (metrics_key, metrics_line) = map(new_key, ("acme", "poor", OPERATOR))
    (folder / "metrics.key").write_text(metrics_key)
    store, port = free_ports(2)
    with valkey(folder / "valkey", store, "--maxmemory", "1gb"):
        server = Server(
            str(tiny_base),
            folder / "data",
            redis_url=f"redis://127.0.0.1:{store}/0",
            api_keys=f"{line},{poor_line} tokens_per_minute=1,{metrics_line}",
            **SCARCE,
        ).start()
        assert httpx.get(f"{server.url}/metrics", headers={"Authorization": f"Bearer {key}"}).status_code == 401
        with load(server.url, key, poor), watching(configured(folder, server.url), folder, port) as api:
            yield api
        assert server.stop() == 0, server.log.read_text()


def configured(folder: Path, target: str) -> Path:
    """The shipped configuration, of this server and at a test's pace."""
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    config["global"] = dict.fromkeys(config["global"], EVERY)
    config["rule_files"] = [str(DEPLOY / "prometheus" / name) for name in config["rule_files"]]
    (job,) = config["scrape_configs"]
    job["authorization"]["credentials_file"] = str(folder / "metrics.key")
    job["static_configs"] = [{"targets": [target.removeprefix("http://")]}]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    subprocess.run(["promtool", "check", "config", path], check=True, capture_output=True)
    return path


@contextmanager
def watching(config: Path, folder: Path, port: int) -> Iterator[httpx.Client]:
    options = {
        "config.file": config,
        "storage.tsdb.path": folder / "tsdb",
        "web.listen-address": f"127.0.0.1:{port}",
    }
    command = ["prometheus", *(f"--{name}={value}" for name, value in options.items())]
    with (folder / "prometheus.log").open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1", timeout=30) as api:
            yield api
    finally:
        process.terminate()
        process.wait()


@contextmanager
def load(url: str, key: str, poor: str) -> Iterator[None]:
    """Users who learn, complete, choose and err, until the block ends. The key `poor` may learn next to nothing."""
    over = Event()

    def use(number: int) -> None:
        with Client(url, key=key) as client, Client(url, key=poor) as limited:
            for turn in count():
                if over.is_set():
                    return
                session = f"user-{number}-{turn % SESSIONS}"
                client.observe(session, TEXT)
                with client.stream(prompt=TEXT[:60], max_tokens=8, session=session) as chunks:
                    list(chunks)
                shown = assert_success(
                    client.post(f"sessions/shopper-{number}-{turn}/act", {"model": "bandit", "observation": [0.0]})
                )
                bought = {"action_id": shown["action_id"], "reward": 1, "regret": 0.5}
                assert_success(client.post(f"sessions/shopper-{number}-{turn}/feedback", bought))
                assert client.post("completions", {"model": "tiny"}).status_code == 400
                assert limited.post("sessions/poor/observe", {"text": TEXT}).status_code in (200, 429)
                over.wait(0.05)

    with ThreadPoolExecutor(USERS) as pool:
        users = [pool.submit(use, number) for number in range(USERS)]
        try:
            yield
        finally:
            over.set()
        for user in users:
            user.result()


def asked(api: httpx.Client, query: str) -> list[Any]:
    """The series that a query finds now. Raises AssertionError for one that Prometheus refuses."""
    answer = api.get("/query", params={"query": query}).json()
    assert answer["status"] == "success", (query, answer)
    result: list[Any] = answer["data"]["result"]
    return result


def has_data(api: httpx.Client, query: str) -> bool:
    return any(not math.isnan(float(series["value"][1])) for series in asked(api, query))


def panel_queries() -> dict[str, str]:
    """Each query of each panel by where it stands, with Grafana's variables put in."""
    found = {}
    for path in sorted((DEPLOY / "grafana" / "dashboards").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", ()):
                query = target["expr"]
                for variable, value in GRAFANA.items():
                    query = query.replace(variable, value)
                found[f"{path.stem}, {panel['title']}, {target['legendFormat']}"] = query
    return found


def test_the_server_is_scraped_with_the_key_of_the_metrics(prometheus: httpx.Client) -> None:
    def up() -> bool:
        try:
            return any(series["value"][1] == "1" for series in asked(prometheus, 'up{job="imprint"}'))
        except (httpx.TransportError, ValueError):  # it begins
            return False

    wait_until(up)


def test_every_query_of_every_panel_returns_data(prometheus: httpx.Client) -> None:
    waiting = panel_queries()
    assert len(waiting) > 60
    deadline = time.monotonic() + 30
    while waiting and time.monotonic() < deadline:
        time.sleep(0.5)
        waiting = {where: query for where, query in waiting.items() if not has_data(prometheus, query)}
    assert not waiting


def test_every_alert_is_evaluated_and_both_sides_of_it_have_data(prometheus: httpx.Client) -> None:
    def rules() -> list[Any]:
        groups = prometheus.get("/rules").json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    wait_until(lambda: all(rule["health"] != "unknown" for rule in rules()))
    assert len(rules()) >= 15
    for rule in rules():
        assert rule["health"] == "ok", rule
        told = re.sub(r" (==|<|>) ", r" \1 bool ", rule["query"])  # 0 or 1, where the alert has nothing or something
        assert told != rule["query"] and has_data(prometheus, told), rule["name"]
