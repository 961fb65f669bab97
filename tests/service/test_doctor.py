"""`imprint doctor` finds faults, says what to do about each, and changes nothing."""

from __future__ import annotations

import json
import logging
import re
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from redis import Redis
from typer.testing import CliRunner, Result

from service.cli.checks import Finding, run_checks
from service.cli.main import app
from service.settings import Settings
from service.tenants import OPERATOR, new_key
from tests.conftest import Server
from tests.service.valkeys import free_ports, valkey

NAMES = ["device", "model", "memory", "recall", "policies", "store", "archive", "port", "disk", "keys"]


@pytest.fixture
def settings(tiny_base: Path, tmp_path: Path) -> dict[str, Any]:
    """Return settings with which a server could start."""
    (port,) = free_ports(1)
    return {
        "model": str(tiny_base),
        "data_dir": tmp_path / "data",
        "cache_dir": tmp_path / "cache",
        "port": port,
        "device": "cpu",
        "recall_encoder": "none",
    }


def findings(settings: dict[str, Any], **others: object) -> dict[str, Finding]:
    by_name = {finding.name: finding for finding in run_checks(Settings(**settings | others))}
    assert list(by_name) == NAMES
    assert all(finding.found and bool(finding.do) == (finding.status != "ok") for finding in by_name.values())
    return by_name


def failed(settings: dict[str, Any], **others: object) -> dict[str, str]:
    """Return the texts of the findings that keep a server from starting, by name."""
    return {
        name: f"{finding.found} → {finding.do}"
        for name, finding in findings(settings, **others).items()
        if finding.status == "fail"
    }


def test_nothing_fails_and_no_file_is_made_if_a_server_could_start(settings: dict[str, Any], tmp_path: Path) -> None:
    found = findings(settings)
    statuses = {name: finding.status for name, finding in found.items()}
    assert statuses == dict.fromkeys(NAMES, "ok") | {"memory": "warn"}  # none is shipped for a tiny base
    assert "imprint train" in found["memory"].do
    assert found["policies"].found.startswith("labels, regression, bandit, bandit-5, bandit-linear, bandit-10, ")
    found = findings(settings, archive_url=str(tmp_path / "archive"), archive_after_s=60)
    assert found["archive"].found == f"idle sessions go to {tmp_path / 'archive'} after 60 s"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "others", "words"),
    [
        ("model", {"model": "/no/such/folder"}, "/no/such/folder"),
        ("memory", {"memory": "/no/such/file"}, "imprint train"),
        ("recall", {"recall_encoder": "/no/such/folder"}, "IMPRINT_RECALL_ENCODER=none"),
        ("store", {"redis_url": "redis://127.0.0.1:1/0"}, "does not answer"),
        ("store", {"redis_url": "redis+sentinel://127.0.0.1:1"}, "IMPRINT_REDIS_URL"),
        ("archive", {"archive_after_s": 60}, "IMPRINT_ARCHIVE_URL"),
        ("archive", {"archive_url": "nothing://x"}, "IMPRINT_ARCHIVE_URL"),
        ("archive", {"archive_url": str(Path(__file__))}, "is not a folder"),
        ("disk", {"data_dir": Path(__file__) / "data"}, "cannot be written"),
        ("keys", {"api_keys": "acme:123"}, "imprint keys new"),
        ("keys", {"host": "0.0.0.0"}, "can be reached from other machines"),
        ("keys", {"api_keys_file": Path("/no/such/keys")}, "/no/such/keys"),
        pytest.param(
            "device",
            {"device": "cuda"},
            "IMPRINT_DEVICE",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_a_fault_is_reported_with_what_to_do(
    settings: dict[str, Any], name: str, others: dict[str, Any], words: str
) -> None:
    faults = failed(settings, **others)
    assert faults.keys() == {name}
    assert words in faults[name]


def test_a_damaged_base_is_a_fault(settings: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    assert "config.json" in failed(settings, model=str(tmp_path))["model"]


def test_a_base_that_must_be_fetched_first_is_a_warning(settings: dict[str, Any]) -> None:
    found = findings(settings, model="smollm2-135m-instruct")
    assert (found["model"].status, found["memory"].status) == ("warn", "warn")
    assert "93 MB" in found["model"].do


def test_a_port_in_use_is_a_fault(settings: dict[str, Any]) -> None:
    with socket.create_server(("127.0.0.1", settings["port"])):
        assert str(settings["port"]) in failed(settings)["port"]


def test_a_running_server_is_no_fault(server: Server, settings: dict[str, Any]) -> None:
    port = int(server.url.rpartition(":")[2])
    found = findings(settings, port=port, data_dir=server.data_dir)
    assert found["port"].found.endswith("ready")
    assert found["store"].status == "ok"
    assert "IMPRINT_DATA_DIR" in failed(settings, data_dir=server.data_dir)["store"]


def test_keys_without_one_for_prometheus_are_a_warning(settings: dict[str, Any]) -> None:
    keys = new_key("acme")[1]
    assert findings(settings, api_keys=keys)["keys"].status == "warn"
    assert findings(settings, api_keys=f"{keys},{new_key(OPERATOR)[1]}")["keys"].status == "ok"


@pytest.fixture
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    (port,) = free_ports(1)
    with valkey(tmp_path_factory.mktemp("valkey"), port, "--maxmemory", "100mb"):
        yield port


def test_a_redis_that_loses_data_is_a_fault(settings: dict[str, Any], redis: int) -> None:
    url = f"redis://127.0.0.1:{redis}/0"
    assert findings(settings, redis_url=url)["store"].status == "warn"  # it writes nothing to its disk
    with Redis(port=redis) as client:
        client.config_set("appendonly", "yes")
        found = findings(settings, redis_url=url)["store"]
        assert found.status == "ok" and "104.9 MB" in found.found
        client.config_set("maxmemory-policy", "allkeys-lru")
        assert "noeviction" in failed(settings, redis_url=url)["store"]
        client.execute_command("ACL", "SETUSER", "limited", "on", ">pw", "~*", "&*", "+@all", "-scan")
        assert "SCAN" in failed(settings, redis_url=f"redis://limited:pw@127.0.0.1:{redis}/0")["store"]
        client.config_set("requirepass", "secret")
    assert "password" in failed(settings, redis_url=url)["store"]


@pytest.fixture
def doctor(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Result]]:
    """Yield a function that runs `imprint doctor`."""
    for name, value in settings.items():
        monkeypatch.setenv(f"IMPRINT_{name.upper()}", str(value))
    yield lambda *arguments: CliRunner().invoke(app, ["doctor", *arguments])
    logging.disable(logging.NOTSET)


def test_the_command_shows_the_same_as_text_and_as_json(
    doctor: Callable[..., Result], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = json.loads(doctor("--json").stdout)
    assert report["healthy"]
    shown = doctor()
    assert shown.exit_code == 0

    def without_sizes(text: str) -> str:
        """Replace sizes, which change from moment to moment."""
        return re.sub(r"[\d.]+ [kMGT]?B", "…", text)

    for finding in report["findings"]:
        assert without_sizes(f"{finding['name']:<8} {finding['found']}") in without_sizes(shown.stdout)
        assert finding["do"] in shown.stdout
    monkeypatch.setenv("IMPRINT_HOST", "0.0.0.0")
    assert doctor().exit_code == doctor("--json").exit_code == 1


def test_an_unknown_setting_is_the_one_finding(doctor: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMPRINT_PROT", "1")
    done = doctor("--json")
    assert done.exit_code == 1
    (finding,) = json.loads(done.stdout)["findings"]
    assert finding["name"] == "settings" and "IMPRINT_PORT" in finding["found"]
