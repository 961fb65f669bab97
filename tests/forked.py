"""`imprint` in a process forked from one that has loaded the modules: loading them is most of the work of a start."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Lock

from service.cli.main import main

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(["service.app", "tests.forked"])


class ForkedImprint:
    """An `imprint` in a process of its own; its methods are those of `subprocess.Popen`."""

    def __init__(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        *,
        stdout: Path,
        stderr: Path,
        stdin: Path = Path(os.devnull),
    ) -> None:
        """Start `imprint` with the arguments; what it prints is appended to the files."""
        files = (stdin, stdout, stderr)
        self._process = _FORKS.Process(target=_run, args=(list(arguments), dict(environment), *files), daemon=True)
        self._process.start()
        self._reading = Lock()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        with self._reading:  # the first reader alone gets the code
            return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        multiprocessing.connection.wait([self._process.sentinel], timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired("imprint", timeout or 0)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(arguments: list[str], environment: dict[str, str], stdin: Path, stdout: Path, stderr: Path) -> None:
    """Become `imprint`."""
    os.environ.clear()
    os.environ.update(environment)
    sys.stdin = stdin.open()
    for stream, path in ((sys.stdout, stdout), (sys.stderr, stderr)):
        with path.open("ab") as file:
            os.dup2(file.fileno(), stream.fileno())
    sys.argv = ["imprint", *arguments]
    main()
