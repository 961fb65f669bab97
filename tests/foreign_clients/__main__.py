"""Run the real clients: `.venv/bin/python -m tests.foreign_clients [NAME …]`. `make clients` runs them all.

Each client is installed once, in its newest version, into an environment of its own under build/clients. All clients
meet one server of the default base. A table says what passed; the exit code is 1 if something failed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.conftest import Server

HERE = Path(__file__).resolve().parent
BUILD = HERE.parents[1] / "build" / "clients"
HARNESS_OF_NODE = HERE / "node" / "checks.mjs"
HEAD = re.compile(r"^# /// script$\n((?:^#.*$\n)+?)^# ///$", re.MULTILINE)

Row = tuple[str, str, str]


class CannotInstall(Exception):
    """A client that cannot be installed here."""


def clients() -> dict[str, Path]:
    """Return the files of the clients, by their names."""
    files = [*HERE.glob("*_client.py"), *(HERE / "node").glob("*.mjs")]
    names = {file.stem.removesuffix("_client"): file for file in sorted(files) if file != HARNESS_OF_NODE}
    return {f"npm {name}" if file.suffix == ".mjs" else name: file for name, file in names.items()}


def head(file: Path) -> dict[str, Any]:
    """Return the head of a client's file, in the form that Python's packaging gives to the heads of scripts."""
    found = HEAD.search(file.read_text())
    assert found is not None, f"{file} has no head"
    return tomllib.loads(re.sub(r"^# ?", "", found[1], flags=re.MULTILINE))


def install(name: str, file: Path) -> list[str]:
    """Install a client, unless it is installed, and return the command of its checks. Raises CannotInstall."""
    folder = BUILD / ("node" if file.suffix == ".mjs" else name)
    needs = HERE / "node" / "package.json" if file.suffix == ".mjs" else file
    stamp = folder / ".installed"
    state = hashlib.sha256(needs.read_bytes() if file.suffix == ".mjs" else repr(head(file)).encode()).hexdigest()
    if not (stamp.exists() and stamp.read_text() == state):
        folder.mkdir(parents=True, exist_ok=True)
        _npm(folder, needs) if file.suffix == ".mjs" else _pip(folder, head(file))
        stamp.write_text(state)
    if file.suffix == ".mjs":
        shutil.copy(HARNESS_OF_NODE, folder)
        return ["node", str(shutil.copy(file, folder))]  # imports are looked up beside the file
    return [str(folder / "bin" / "python"), str(HERE / "harness.py"), str(file)]


def _pip(folder: Path, script: dict[str, Any]) -> None:
    _run([sys.executable, "-m", "venv", "--clear", "--without-pip", str(folder)])
    options = script.get("tool", {}).get("imprint", {})
    if options.get("with-server-packages"):
        # The server's torch and transformers, which then need not be installed a second time, and the server itself.
        (site,) = folder.glob("lib/python*/site-packages")
        installed = next(path for path in sys.path if path.endswith("site-packages"))
        (site / "server.pth").write_text(f"{installed}\n{HERE.parents[1]}\n")
    pip = [sys.executable, "-m", "pip", "--quiet", "--python", str(folder / "bin" / "python"), "install"]
    _run([*pip, *script["dependencies"]])
    if alone := options.get("without-dependencies"):  # these would bring another torch
        _run([*pip, "--no-deps", *alone])


def _npm(folder: Path, package: Path) -> None:
    if shutil.which("npm") is None:
        raise CannotInstall("there is no npm here")
    shutil.copy(package, folder)
    _run(["npm", "install", "--silent", "--no-audit", "--no-fund", "--prefix", str(folder)])


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise CannotInstall((done.stderr or done.stdout).strip().splitlines()[-1][:200])


def checked(name: str, file: Path, server: Server) -> Iterator[Row]:
    """Yield a row of the table for each check of a client: the client, the check, and what went wrong ("": nothing)."""
    try:
        command = [*install(name, file), server.url, server.model]
    except CannotInstall as error:
        yield name, "installation", str(error)
        return
    log = BUILD / f"{name}.log"
    with log.open("w") as errors, subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if line.startswith('{"check"'):
                found = json.loads(line)
                yield name, found["check"], " ".join((found["error"] or "").split())
    if run.returncode:
        yield name, "the run", f"exit code {run.returncode}, see {log.relative_to(BUILD.parents[1])}"


@contextmanager
def serving() -> Iterator[Server]:
    """Run a server of the default base during the block, with folders of its own."""
    with tempfile.TemporaryDirectory(prefix="imprint-clients-") as folder:
        server = Server("smollm2-135m-instruct", Path(folder) / "data", recall_encoder="default")
        server.start(forked=False)
        try:
            yield server
        finally:
            server.stop()


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"Of {', '.join(clients())}; default: all.")
    names = parser.parse_args().names
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the server ends too
    BUILD.mkdir(parents=True, exist_ok=True)
    failed = 0
    print("| client | check | |\n| --- | --- | --- |")
    with serving() as server:
        for name, file in clients().items():
            for client, check, error in checked(name, file, server) if not names or name in names else ():
                failed += bool(error)
                print(f"| {client} | {check} | {error[:300].replace('|', '/') or 'ok'} |", flush=True)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
