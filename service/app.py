"""The start of a server: takes the signals, a socket and a store, serves, and drains."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from types import FrameType

import uvicorn
from uvicorn.loops.auto import auto_loop_factory

from model.base.checkpoint import CheckpointError
from model.base.config import ConfigError
from model.memory import MemoryConfigError
from model.policies.config import PolicyError
from service.base_cache import BaseError
from service.http.limits import ConnectionLimits, ConnectionReport
from service.http.protocol import Connection
from service.model_loading import LOADER_THREAD, StartError
from service.settings import Settings
from service.stopping import StopSignals, end_tasks, first_line
from service.store.embedded import EmbeddedValkey, StoreError
from service.tenants import ApiKeys, ApiKeysError
from service.turns.sessions import Sessions
from service.wiring import Service, new_embedded, open_service

END_SERVING_S = 1.0  # seconds that the web server gets to end when the start has failed

log = logging.getLogger(__name__)


STARTUP_ERRORS = (
    StartError,
    ApiKeysError,
    StoreError,
    BaseError,
    CheckpointError,
    ConfigError,
    MemoryConfigError,
    PolicyError,
)


def run(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT, drain, and return the exit code."""
    logging.basicConfig(
        level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    for chatty in ("httpx", "httpcore", "urllib3", "filelock", "uvicorn.error"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    with StopSignals() as signals:
        try:
            keys = ApiKeys(settings)
            with (
                _listening(settings, keys) as listener,
                _store_url(settings, signals) as (url, embedded),
                asyncio.Runner(loop_factory=auto_loop_factory()) as runner,
            ):
                code = runner.run(_serve(settings, keys, listener, url, embedded, signals))
        except Exception as error:
            code = _report_failure(error, signals)
        if any(thread.name == LOADER_THREAD for thread in threading.enumerate()):
            # The server stops while the model loads: a thread inside torch aborts a process whose interpreter ends.
            sys.stderr.flush()
            os._exit(code)
        return code


def _report_failure(error: Exception, signals: StopSignals) -> int:
    """Print why the server ends, see to it that the process ends soon, and return its exit code.

    An error of a start that was told to stop is no failure.
    """
    code = 0 if signals.is_set() else 1
    if code == 0:
        log.info("stopped before the server was ready")
    else:
        unexpected = "" if isinstance(error, STARTUP_ERRORS) else f"cannot start: {type(error).__name__}: "
        print(f"imprint: {unexpected}{first_line(error)}", file=sys.stderr, flush=True)
        log.debug("the start failed", exc_info=error)
    signals.end_within(code)
    return code


async def _serve(
    settings: Settings,
    keys: ApiKeys,
    listener: socket.socket,
    url: str,
    embedded: EmbeddedValkey | None,
    signals: StopSignals,
) -> int:
    """Serve on the listener until the server is told to stop; return the exit code."""
    async with open_service(settings, keys=keys, store=(url, embedded)) as service:
        limits = ConnectionLimits.of(settings)
        config = uvicorn.Config(
            service.app,
            http=Connection.with_limits(limits, ConnectionReport(service.metrics)),
            ws="none",
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_keep_alive=math.ceil(limits.idle_timeout_s),
        )
        server = _Server(config, service.sessions, settings.drain_timeout_s, signals)
        serving = asyncio.create_task(server.serve([listener]))
        try:
            await _serve_until_stopped(service, serving, listener, settings)
        except Exception as error:
            return _report_failure(error, signals)
        finally:
            server.should_exit = True
            await asyncio.wait({serving}, timeout=END_SERVING_S)
            await end_tasks([serving])
    return 0


async def _serve_until_stopped(
    service: Service, serving: asyncio.Task[None], listener: socket.socket, settings: Settings
) -> None:
    """Return when the web server has ended. Raises what keeps the service from starting."""
    starting = asyncio.create_task(service.start())
    failing = asyncio.create_task(service.wait_failed())
    try:
        await asyncio.wait({serving, starting, failing}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done() and not failing.done():
            await starting
            if service.sessions.state == "ready":
                host, port, *_ = listener.getsockname()
                log.info("ready: http://%s:%s (data in %s)", host, port, settings.data_dir)
            await asyncio.wait({serving, failing}, return_when=asyncio.FIRST_COMPLETED)
        if failing.done():
            await failing
        await serving
    finally:
        await end_tasks([starting, failing])


class _Server(uvicorn.Server):
    """A web server that drains on the first signal and ends on the second.

    While the server drains, the probes say so and new turns are refused, and the running turns end.
    """

    def __init__(
        self, config: uvicorn.Config, sessions: Sessions, drain_timeout_s: float, signals: StopSignals
    ) -> None:
        super().__init__(config)
        self._signals = signals
        self._sessions = sessions
        self._drain_timeout_s = drain_timeout_s
        self._exit_requested = False
        self._draining: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Take the signals over from `StopSignals`, and a signal that came before."""
        with super().capture_signals():
            if self._signals.received is not None:
                self.handle_exit(self._signals.received, None)
            yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._exit_requested:
            self._exit(within_s=0)
            self.force_exit = True
            return
        self._exit_requested = True
        log.info("%s: draining for at most %.0f s", signal.Signals(sig).name, self._drain_timeout_s)
        self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        self._draining = asyncio.create_task(self._drain_and_exit())

    async def _drain_and_exit(self) -> None:
        # A server that has not been ready has no turn to wait for.
        timeout_s = self._drain_timeout_s if self._sessions.state == "ready" else min(1.0, self._drain_timeout_s)
        deadline = time.monotonic() + timeout_s
        await self._sessions.drain(timeout_s)
        # The rest of the time is for connections without a turn, such as half-sent requests.
        self._exit(within_s=max(0, round(deadline - time.monotonic())))

    def _exit(self, *, within_s: int) -> None:
        self.config.timeout_graceful_shutdown = within_s
        self.should_exit = True


@contextmanager
def _listening(settings: Settings, keys: ApiKeys) -> Iterator[socket.socket]:
    """Yield the server's socket, which is taken before any slow work begins. Raises StartError."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        raise StartError(f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}") from error
    with listener:
        # Event loops set TCP_NODELAY only on sockets that name TCP as their protocol, and the sockets accepted here do
        # not. The second piece of an answer would wait 40 ms for the client to acknowledge the first piece.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        address = listener.getsockname()[0]
        if not (keys.required or ip_address(address).is_loopback):
            raise StartError(
                f"{settings.host} can be reached from other machines, so API keys are needed: "
                "`imprint keys new TENANT >> FILE` and IMPRINT_API_KEYS_FILE=FILE, or IMPRINT_HOST=127.0.0.1"
            )
        yield listener


@contextmanager
def _store_url(settings: Settings, signals: StopSignals) -> Iterator[tuple[str, EmbeddedValkey | None]]:
    """Yield the URL of the settings' Redis, or the URL of an embedded Valkey that runs as long as the server."""
    if settings.redis_url is not None:
        yield settings.redis_url, None
        return
    embedded = new_embedded(settings)
    url = embedded.start(stopped=signals.is_set)
    try:
        yield url, embedded
    finally:
        embedded.stop()
