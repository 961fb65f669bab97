"""A real Prometheus with the shipped configuration scrapes a busy server: every graph and every alert has data."""

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
SCRAPE_INTERVAL = "1s"  # instead of 15 s
GRAFANA_VARIABLES = {"$job": "imprint", "$instance": ".*", "$__rate_interval": "5s"}
USERS, SESSIONS = 4, 10  # sessions of each user
SMALL_LIMITS = {"max_queue": 2 * USERS, "max_batch": USERS, "hot_sessions": 1}  # so that sessions are evicted


@pytest.fixture(scope="module")
def prometheus(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """Yield the API of a Prometheus that scrapes a busy server with API keys on a Valkey."""
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
            **SMALL_LIMITS,
        ).start()
        assert httpx.get(f"{server.url}/metrics", headers={"Authorization": f"Bearer {key}"}).status_code == 401
        with load(server.url, key, poor), run_prometheus(configured(folder, server.url), folder, port) as api:
            yield api
        assert server.stop() == 0, server.log.read_text()


def configured(folder: Path, target: str) -> Path:
    """Write the shipped configuration with this server as its target and a short interval; return the file."""
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    config["global"] = dict.fromkeys(config["global"], SCRAPE_INTERVAL)
    config["rule_files"] = [str(DEPLOY / "prometheus" / name) for name in config["rule_files"]]
    (job,) = config["scrape_configs"]
    job["authorization"]["credentials_file"] = str(folder / "metrics.key")
    job["static_configs"] = [{"targets": [target.removeprefix("http://")]}]
    path = folder / "prometheus.yml"
    path.write_text(yaml.safe_dump(config))
    subprocess.run(["promtool", "check", "config", path], check=True, capture_output=True)
    return path


@contextmanager
def run_prometheus(config: Path, folder: Path, port: int) -> Iterator[httpx.Client]:
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
    """Keep users busy during the block: learning, completing, acting, and sending bad requests.

    The key `poor` may learn next to nothing.
    """
    finished = Event()

    def use(number: int) -> None:
        with Client(url, key=key) as client, Client(url, key=poor) as limited:
            for turn in count():
                if finished.is_set():
                    return
                session = f"user-{number}-{turn % SESSIONS}"
                client.observe(session, TEXT)
                with client.stream(prompt=TEXT[:60], max_tokens=8, session=session) as chunks:
                    list(chunks)
                action = assert_success(
                    client.post(f"sessions/shopper-{number}-{turn}/act", {"model": "bandit", "observation": [0.0]})
                )
                reward = {"action_id": action["action_id"], "reward": 1, "regret": 0.5}
                assert_success(client.post(f"sessions/shopper-{number}-{turn}/feedback", reward))
                banner = f"sessions/banner-{number}-{turn % SESSIONS}"
                client.http.put(f"/v1/{banner}", json={"model": "bandit", "holdout": 0.5})
                shown = assert_success(client.post(f"{banner}/act", {"actions": ["a", "b"]}))
                assert_success(client.post(f"{banner}/feedback", {"action_id": shown["action_id"], "reward": turn % 3}))
                assert client.post("completions", {"model": "tiny"}).status_code == 400
                assert limited.post("sessions/poor/observe", {"text": TEXT}).status_code in (200, 429)
                finished.wait(0.05)

    with ThreadPoolExecutor(USERS) as pool:
        users = [pool.submit(use, number) for number in range(USERS)]
        try:
            yield
        finally:
            finished.set()
        for user in users:
            user.result()


def query_now(api: httpx.Client, query: str) -> list[Any]:
    """Return the series that a query finds now. Raises AssertionError for a query that Prometheus rejects."""
    answer = api.get("/query", params={"query": query}).json()
    assert answer["status"] == "success", (query, answer)
    result: list[Any] = answer["data"]["result"]
    return result


def has_data(api: httpx.Client, query: str) -> bool:
    return any(not math.isnan(float(series["value"][1])) for series in query_now(api, query))


def panel_queries() -> dict[str, str]:
    """Return each query of each panel under its title, with Grafana's variables filled in."""
    queries = {}
    for path in sorted((DEPLOY / "grafana" / "dashboards").glob("*.json")):
        for panel in json.loads(path.read_text())["panels"]:
            for target in panel.get("targets", ()):
                query = target["expr"]
                for variable, value in GRAFANA_VARIABLES.items():
                    query = query.replace(variable, value)
                queries[f"{path.stem}, {panel['title']}, {target['legendFormat']}"] = query
    return queries


def test_the_server_is_scraped_with_the_key_of_the_metrics(prometheus: httpx.Client) -> None:
    def up() -> bool:
        try:
            return any(series["value"][1] == "1" for series in query_now(prometheus, 'up{job="imprint"}'))
        except (httpx.TransportError, ValueError):  # Prometheus is still starting
            return False

    wait_until(up)


def test_every_query_of_every_panel_returns_data(prometheus: httpx.Client) -> None:
    without_data = panel_queries()
    assert len(without_data) > 60
    deadline = time.monotonic() + 30
    while without_data and time.monotonic() < deadline:
        time.sleep(0.5)
        without_data = {title: query for title, query in without_data.items() if not has_data(prometheus, query)}
    assert not without_data


def test_every_alert_is_evaluated_and_both_sides_of_it_have_data(prometheus: httpx.Client) -> None:
    def rules() -> list[Any]:
        groups = prometheus.get("/rules").json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]

    wait_until(lambda: all(rule["health"] != "unknown" for rule in rules()))
    assert len(rules()) >= 15
    for rule in rules():
        assert rule["health"] == "ok", rule
        as_bool = re.sub(r" (==|<|>) ", r" \1 bool ", rule["query"])  # 0 or 1 instead of no series or a series
        assert as_bool != rule["query"] and has_data(prometheus, as_bool), rule["name"]
