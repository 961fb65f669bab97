"""The rules of the house: what generated pages say, how long files are, what the containers promise."""

import ast
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from redis import Redis
from redis.backoff import ConstantBackoff
from redis.retry import Retry

from service.settings import Settings
from service.store.embedded import valkey_binary
from service.tenants import OPERATOR, ApiKeys, new_key

ROOT = Path(__file__).resolve().parent.parent
TEXT = {".py", ".lua", ".md", ".toml", ".yml", ".yaml", ".html", ".css", ".js", ".sh", ".conf"}
PLACES = (
    "imprint",
    "model",
    "service",
    "research",
    "benchmarks",
    "tests",
    "docs",
    "examples",
    "docker",
    "deploy",
    "scripts",
)


@pytest.mark.parametrize("name", ["settings", "metrics"])
def test_a_generated_page_is_what_its_generator_prints(name: str) -> None:
    command = [sys.executable, "-m", f"service.{name}"]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert (ROOT / "docs" / f"{name}.md").read_text() == printed, f"write it again: python -m service.{name}"


def test_no_file_is_over_500_lines() -> None:
    files = [file for place in PLACES for file in (ROOT / place).rglob("*") if file.suffix in TEXT]
    assert files
    long = {str(file): lines for file in files if (lines := len(file.read_text().splitlines())) > 500}
    assert not long


def test_no_docstring_opens_with_a_question_word() -> None:
    """A docstring begins with a verb or names the thing: "Return the …", not "What …"."""
    question = re.compile(r"(What|How|Whether|Who|When|Where|Why|Which)\b")
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for file in (file for place in PLACES for file in (ROOT / place).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            text = ast.get_docstring(node) if isinstance(node, documented) else None
            assert text is None or not question.match(text), f"{file}: {text[:80]}"


# Containers: what can be told without an engine.


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions in order, each as (NAME, rest), with continued lines joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n", " ", text).split("\n")
    return [(line.split()[0], line.split(maxsplit=1)[1]) for line in lines if line.strip()]


def of(name: str) -> list[str]:
    return [rest for instruction, rest in instructions() if instruction == name]


def compose() -> dict[str, Any]:
    page: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return page


def test_the_image_is_built_from_the_pinned_base_in_two_stages() -> None:
    assert [rest.split()[0] for rest in of("FROM")] == ["python:3.11-slim"] * 2


def test_the_image_runs_as_an_ordinary_user_and_reports_its_health() -> None:
    final = instructions()[max(i for i, (name, _) in enumerate(instructions()) if name == "FROM") :]
    assert ("USER", "10001:10001") in final
    assert any(name == "HEALTHCHECK" and "healthcheck.py" in rest for name, rest in final)
    assert ("EXPOSE", "8000") in final
    assert ("STOPSIGNAL", "SIGTERM") in final
    # In exec form: signals reach the server, not a shell.
    for name in ("ENTRYPOINT", "CMD"):
        assert isinstance(json.loads(of(name)[-1]), list)


def test_the_images_state_lives_in_volumes_that_the_settings_name() -> None:
    variables = dict(re.findall(r"(IMPRINT_\w+)=(\S+)", " ".join(of("ENV"))))
    assert set(json.loads(of("VOLUME")[0])) == {variables["IMPRINT_DATA_DIR"], variables["IMPRINT_CACHE_DIR"]}
    assert variables["IMPRINT_PORT"] == of("EXPOSE")[0]


def test_nothing_but_sources_gets_into_the_image() -> None:
    assert not of("ADD")
    copied = [word for rest in of("COPY") for word in rest.split()[:-1] if not word.startswith("--")]
    assert all((ROOT / source).exists() for source in copied), copied
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    assert {f"!{source.split('/')[0]}" for source in copied} == {line for line in ignored if line.startswith("!")}


def test_compose_starts_a_server_with_a_store_of_its_own() -> None:
    page = compose()
    server, store = page["services"]["server"], page["services"]["redis"]
    assert server["environment"]["IMPRINT_REDIS_URL"] == "redis://redis:6379/0"
    assert server["environment"]["IMPRINT_HOST"] == "0.0.0.0"
    assert server["depends_on"]["redis"]["condition"] == "service_healthy"
    assert server["healthcheck"]["test"][1:] == json.loads(of("HEALTHCHECK")[0].split("CMD", 1)[1])
    assert "valkey-cli ping" in store["healthcheck"]["test"][1]
    assert store["command"][:2] == ["valkey-server", "/etc/valkey/redis.conf"]
    named = {mount.split(":")[0] for service in (server, store) for mount in service["volumes"]}
    assert named - {"./docker/redis.conf"} <= set(page["volumes"])
    assert set(json.loads(of("VOLUME")[0])) < {mount.split(":")[1] for mount in server["volumes"]}


def test_compose_publishes_the_server_to_this_host_only_and_the_store_to_nobody() -> None:
    services = compose()["services"]
    assert services["server"]["ports"] == ["127.0.0.1:8000:8000"]
    assert "ports" not in services["redis"]


def test_the_container_makes_itself_a_key_unless_it_is_given_one(tmp_path: Path) -> None:
    """The real entrypoint and the real command, up to a server that finds its port wrong: the key is shown once."""
    command = tmp_path / "imprint"
    command.write_text(f'#!/bin/sh\nexec {sys.executable} -m service "$@"\n')
    command.chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if not name.startswith("IMPRINT_")}
    data = tmp_path / "data"
    data.mkdir()
    environment = kept | {
        "PATH": f"{tmp_path}:{kept['PATH']}",
        "PYTHONPATH": str(ROOT),
        "IMPRINT_DATA_DIR": str(data),
        "IMPRINT_CACHE_DIR": str(tmp_path),
        "IMPRINT_HOST": "0.0.0.0",
        "IMPRINT_PORT": "-1",
        "METRICS_KEY_FILE": str(tmp_path / "metrics.key"),
    }

    def start(**given: str) -> str:
        arguments = [str(ROOT / "docker" / "entrypoint"), "serve"]
        ended = subprocess.run(arguments, env=environment | given, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 1 and "IMPRINT_PORT" in ended.stderr
        return ended.stderr

    _, line = new_key("mine")
    assert "the key" not in start(IMPRINT_API_KEYS=line)
    assert not (data / "keys").exists() and not (tmp_path / "metrics.key").exists()
    (shown,) = re.findall(r"the key, shown this once: (\S+)", start())
    keys = ApiKeys(Settings(api_keys_file=data / "keys"))
    assert keys.tenant(f"Bearer {shown}").name == "default"
    assert keys.tenant(f"Bearer {(tmp_path / 'metrics.key').read_text()}").name == OPERATOR
    assert (data / "keys").stat().st_mode & 0o077 == 0
    before = (data / "keys").read_text()
    assert "the key" not in start()
    assert (data / "keys").read_text() == before


def test_valkey_takes_the_stores_configuration() -> None:
    """A real Valkey reads docker/redis.conf: every commit is fsynced, nothing is ever evicted."""
    wanted = {"appendonly": "yes", "appendfsync": "always", "save": "", "maxmemory-policy": "noeviction"}
    configuration = str(ROOT / "docker" / "redis.conf")
    with tempfile.TemporaryDirectory() as folder:
        socket = f"{folder}/socket"
        options = ["--dir", folder, "--port", "0", "--unixsocket", socket]
        valkey = subprocess.Popen([valkey_binary(), configuration, *options], stdout=subprocess.DEVNULL)
        try:
            client = Redis(unix_socket_path=socket, decode_responses=True, retry=Retry(ConstantBackoff(0.05), 200))
            assert client.ping()
            for name, value in wanted.items():
                assert client.config_get(name) == {name: value}
        finally:
            valkey.terminate()
            valkey.wait()


@contextmanager
def answering(status: int) -> Iterator[int]:
    """A server on a free port whose /readyz answers `status`; yields the port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/readyz" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()


def healthcheck(port: int) -> int:
    environment = {"IMPRINT_HOST": "0.0.0.0", "IMPRINT_PORT": str(port)}
    command = [sys.executable, "-S", str(ROOT / "docker" / "healthcheck.py")]
    return subprocess.run(command, env=environment, capture_output=True).returncode


@pytest.mark.parametrize(("status", "code"), [(200, 0), (503, 1)])
def test_the_health_check_follows_readiness(status: int, code: int) -> None:
    with answering(status) as port:
        assert healthcheck(port) == code


def test_the_health_check_fails_where_nobody_answers() -> None:
    with answering(200) as port:
        pass
    assert healthcheck(port) == 1
