"""Print the way of one streamed chat request through the project's files.

    python -m tests.request_walk            the table
    python -m tests.request_walk --json     the same as JSON

The script serves the tiny base in this process, sends one streamed chat request that learns, and records every Python
function that runs on behalf of the request, on all threads, from the arrival of the request to the last byte of the
answer. Tasks and threads that run without a request (the measurement of the store, say) do not count.

Three definitions, the same for every version of the code (the script needs `service.app.run`, `service.settings` and
`tests.tiny` only, so that a copy of the script runs on an older checkout):

- A file is *on the way* if one of its functions ran; generated methods (those of dataclasses) count.
- An *entry* is a function of a file that another project file called, with or without library code between the two.
  Reading a property or a length, making an object and entering an object as a context manager are no entries.
- A file *hands the request on* if one of its functions called an entry of another project file.
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import httpx

WARM_UP_TEXT = "The quick brown fox jumps over the lazy dog. "
TEXT = "A memory that learns while it serves is written sparsely. "
START_TIMEOUT_S = 600.0
STARTS_THE_LOOP = "service/app.py"  # at the bottom of the main thread's stack, under all that the event loop runs
OBJECT_PROTOCOL = (
    "__init__",
    "__post_init__",
    "__new__",
    "__enter__",
    "__exit__",
    "__aenter__",
    "__aexit__",
    "__len__",
)


@dataclass
class FileWalk:
    """One file on the way: the functions that other files called, and the files that the functions called."""

    path: str
    entries: list[str] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)


class Recorder:
    """A profile function for all threads that notes which project file called which function while `on` is set."""

    def __init__(self, root: Path) -> None:
        self.on = False
        self.walk: dict[str, FileWalk] = {}
        self._root = f"{root}{os.sep}"
        self._loop: asyncio.AbstractEventLoop | None = None
        self._older_tasks: set[asyncio.Task[Any]] = set()
        self._ignored_thread = 0

    def start(self) -> None:
        """Record from now on, except the calling thread and the tasks that exist already."""
        self._ignored_thread = threading.get_ident()
        if self._loop is not None:
            self._older_tasks = asyncio.all_tasks(self._loop)
        self.on = True

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        """Note a call; `sys.setprofile` and `threading.setprofile` call this method."""
        if event != "call" or threading.get_ident() == self._ignored_thread:
            return
        if self._loop is None:
            with suppress(RuntimeError):
                self._loop = asyncio.get_running_loop()
        path = self._project_path(frame) if self.on else None
        if path is None or self._is_older_task():
            return
        file = self._file(path)
        caller = self._calling_path(frame)
        if caller is None or caller == path:
            return
        if _is_object_protocol(frame.f_code, frame.f_globals):
            return
        for names, name in ((file.entries, frame.f_code.co_qualname), (self._file(caller).calls, path)):
            if name not in names:
                names.append(name)

    def _file(self, path: str) -> FileWalk:
        return self.walk.setdefault(path, FileWalk(path))

    def _is_older_task(self) -> bool:
        try:
            return asyncio.current_task() in self._older_tasks
        except RuntimeError:  # a thread without an event loop
            return False

    def _calling_path(self, frame: FrameType) -> str | None:
        """Return the file of the nearest project function up the stack; None at the start of a task or a thread."""
        caller = frame.f_back
        while caller is not None:
            if (path := self._project_path(caller)) is not None:
                return None if path == STARTS_THE_LOOP else path
            caller = caller.f_back
        return None

    def _project_path(self, frame: FrameType) -> str | None:
        name = frame.f_code.co_filename
        if name.startswith("<"):  # generated code, such as a dataclass's methods
            name = frame.f_globals.get("__file__") or name
        path = name.removeprefix(self._root)
        return path if path.startswith(("service/", "model/", "imprint/")) else None


def _is_object_protocol(code: CodeType, module: dict[str, Any]) -> bool:
    *owners, name = code.co_qualname.split(".")
    if name in OBJECT_PROTOCOL:
        return True
    owner: object = None
    for part in owners:
        owner = module.get(part) if owner is None else getattr(owner, part, None)
    return isinstance(owner, type) and isinstance(inspect.getattr_static(owner, name, None), property)


def record_walk(root: Path) -> list[FileWalk]:
    """Serve the tiny base in this process, send the request, and return the files on its way, by first entry."""
    with tempfile.TemporaryDirectory() as folder:
        port = _free_port()
        _set_environment(Path(folder), port)
        from service.app import run
        from service.settings import Settings

        # The first server compiles the kernels and is not recorded: a profile function slows a compiler down tenfold.
        url, recorder = f"http://127.0.0.1:{port}", Recorder(root)
        for record in (None, recorder):
            client = threading.Thread(target=_request_and_stop, args=(url, record))
            client.start()
            threading.setprofile(record)
            sys.setprofile(record)
            code = run(Settings())
            sys.setprofile(None)
            threading.setprofile(None)
            client.join()
        if code or not recorder.walk:
            raise SystemExit(f"the server ended with {code} and {len(recorder.walk)} files were recorded")
        return list(recorder.walk.values())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _set_environment(folder: Path, port: int) -> None:
    from tests.tiny import build_tiny_base

    for name in [name for name in os.environ if name.startswith("IMPRINT_")]:
        del os.environ[name]
    os.environ |= {
        "IMPRINT_MODEL": str(build_tiny_base(folder / "tiny")),
        "IMPRINT_PORT": str(port),
        "IMPRINT_DATA_DIR": str(folder / "data"),
        "IMPRINT_THREADS": "1",
        "IMPRINT_LOG_LEVEL": "error",
    }


def _request_and_stop(url: str, recorder: Recorder | None) -> None:
    """Send a request of another session, which compiles what is left; then, while a recorder is on, the request."""
    try:
        _wait_until_ready(url)
        _stream_chat(url, "warm-up", WARM_UP_TEXT)
        if recorder is not None:
            time.sleep(0.5)
            recorder.start()
            _stream_chat(url, "walk", TEXT)
            recorder.on = False
    finally:
        os.kill(os.getpid(), signal.SIGTERM)


def _wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    with httpx.Client(verify=False) as client:  # the certificates of authorities take 50 ms to read
        while time.monotonic() < deadline:
            with suppress(httpx.TransportError):
                if client.get(f"{url}/readyz").status_code == 200:
                    return
            time.sleep(0.1)
    raise TimeoutError("the server did not become ready")


def _stream_chat(url: str, session: str, text: str) -> None:
    messages = [{"role": "user", "content": text}]
    body = {"model": "tiny", "session": session, "messages": messages, "stream": True}
    body |= {"max_completion_tokens": 8, "temperature": 0}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=START_TIMEOUT_S) as response:
        lines = list(response.iter_lines())
    if response.status_code != 200 or "data: [DONE]" not in lines:
        raise AssertionError(f"{response.status_code}: {lines}")


def table(walk: list[FileWalk]) -> Iterator[str]:
    """Yield the lines of the printed table."""
    for number, file in enumerate(walk, 1):
        yield f"{number:3} {'→' if file.calls else ' '} {file.path:40} {len(file.entries):2}  {', '.join(file.entries)}"
    service = [file for file in walk if file.path.startswith("service/")]
    for name, files in (("all", walk), ("service/", service)):
        handing_on = sum(bool(file.calls) for file in files)
        entries = sum(len(file.entries) for file in files)
        most = max(len(file.entries) for file in files)
        yield f"{name}: {len(files)} files on the way, {handing_on} hand the request on (→)"
        yield f"{' ' * len(name)}  {entries} entries, at most {most} a file"


def main() -> None:
    spec = importlib.util.find_spec("service")
    assert spec is not None and spec.origin is not None
    walk = record_walk(Path(spec.origin).parent.parent)
    if "--json" in sys.argv:
        print(json.dumps([vars(file) for file in walk]))
    else:
        print("\n".join(table(walk)))


if __name__ == "__main__":
    main()
