"""The start of a server: reads the settings, builds the parts, serves, and drains. Only this module builds them."""

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
from collections.abc import Awaitable, Callable, Generator, Iterator
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from ipaddress import ip_address
from pathlib import Path
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from uvicorn.loops.auto import auto_loop_factory

from model.base.checkpoint import CheckpointError
from model.base.config import ConfigError
from model.memory import MemoryConfigError
from model.policies.config import PolicyError
from service.background import find_malloc_trim, keep_running, return_free_memory
from service.base_cache import BaseError
from service.engine import Engine
from service.http.install import install
from service.http.limits import ConnectionLimits, ConnectionReport
from service.http.protocol import Connection
from service.metrics import Metrics
from service.model_loading import LOADER_THREAD, StartError, load_in_thread
from service.settings import Settings
from service.stopping import StopSignals, end_tasks, first_line
from service.store.base import RetentionConfig, SessionStore
from service.store.embedded import EmbeddedValkey, StoreError
from service.store.redis.codec import DEFAULT_PREFIX
from service.store.redis.store import RedisStore
from service.store_watch import check_store, restore_list, store_reporter, watch_store
from service.tenants import ApiKeys, ApiKeysError
from service.turns.quotas import Quotas
from service.turns.session_gate import ServerLimits
from service.turns.sessions import Sessions

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


def create_app(sessions: Sessions, metrics: Metrics, settings: Settings, keys: ApiKeys) -> FastAPI:
    """Return the web application in front of `sessions`."""
    # Without docs_url and redoc_url: FastAPI's pages load their scripts from another host.
    app = FastAPI(
        title="Imprint",
        version=version("imprint"),
        description="A language model that learns as it serves.",
        docs_url=None,
        redoc_url=None,
        generate_unique_id_function=lambda route: route.name,
    )
    metrics.build_info.info({"version": version("imprint"), "model": settings.model})
    install(app, sessions=sessions, metrics=metrics, settings=settings, keys=keys)
    return app


async def _serve(
    settings: Settings,
    keys: ApiKeys,
    listener: socket.socket,
    url: str,
    embedded: EmbeddedValkey | None,
    signals: StopSignals,
) -> int:
    """Serve on the listener until the server is told to stop; return the exit code."""
    metrics = Metrics()
    store = _connect_store(settings, url, metrics, exclusive=embedded is not None)
    sessions = new_sessions(settings, store, metrics)
    app = create_app(sessions, metrics, settings, keys)
    connection_limits = ConnectionLimits.of(settings)
    config = uvicorn.Config(
        app,
        http=Connection.with_limits(connection_limits, ConnectionReport(metrics)),
        ws="none",
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_keep_alive=math.ceil(connection_limits.idle_timeout_s),
    )
    server = _Server(config, sessions, settings.drain_timeout_s, signals)
    tasks = _background_tasks(store, sessions, metrics, keys, embedded)
    checking = asyncio.create_task(_no_check() if embedded else check_store(store, settings, metrics))
    serving = asyncio.create_task(server.serve([listener]))
    loading = asyncio.create_task(load_in_thread(settings, metrics))
    engine: Engine | None = None
    try:
        await _first_done(serving, loading, check=checking)
        if loading.done() and sessions.state == "loading":
            loaded_model = loading.result()
            engine = loaded_model.engine
            await engine.start()
            if sessions.state == "loading":  # no signal has come meanwhile
                sessions.set_ready(loaded_model)
                host, port, *_ = listener.getsockname()
                log.info("ready: http://%s:%s (data in %s)", host, port, settings.data_dir)
        await _first_done(serving, check=checking)
        await serving
    except Exception as error:
        return _report_failure(error, signals)
    finally:
        server.should_exit = True
        await asyncio.wait({serving}, timeout=END_SERVING_S)
        await end_tasks([serving, *tasks, loading, checking])
        if engine is not None:
            await engine.stop()
        await store.close()
    return 0


async def _first_done(*tasks: asyncio.Task[Any], check: asyncio.Task[None]) -> None:
    """Wait until one of the tasks has ended; raise the error of the check if the check fails first."""
    await asyncio.wait({*tasks, check}, return_when=asyncio.FIRST_COMPLETED)
    if check.done():
        check.result()
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)


async def _no_check() -> None:
    """Check nothing: the server's own store has all rights."""


def _background_tasks(
    store: SessionStore, sessions: Sessions, metrics: Metrics, keys: ApiKeys, embedded: EmbeddedValkey | None
) -> list[asyncio.Task[None]]:
    """Start the background tasks, which run until the server ends."""
    report = store_reporter(sessions, metrics)
    watch = partial(watch_store, store, sessions, metrics, keys, None if embedded else report)
    forever: dict[str, Callable[[], Awaitable[None]]] = {
        "watch_store": watch,
        "drop_erased": sessions.drop_erased,
        "drop_missing": sessions.drop_missing,
        "restore_list": partial(restore_list, store, metrics),
    }
    if embedded is None:
        forever["heartbeat"] = store.heartbeat
    if (trim := find_malloc_trim()) is not None:
        forever["return_free_memory"] = partial(return_free_memory, trim)
    tasks = [asyncio.create_task(keep_running(name, task, metrics)) for name, task in forever.items()]
    if embedded is not None:
        tasks.append(asyncio.create_task(embedded.supervise(report)))
    return tasks


def _connect_store(settings: Settings, url: str, metrics: Metrics, *, exclusive: bool) -> SessionStore:
    """Return the store of the sessions; `exclusive`: no other server uses that store. Raises StartError."""
    retention = RetentionConfig(
        versions=settings.keep_versions,
        history_bytes=settings.keep_bytes,
        ttl_s=settings.session_ttl_s,
        lease_s=settings.lease_s,
        wait_s=settings.lease_wait_s,
    )
    try:
        return RedisStore.from_url(
            url,
            retention,
            exclusive=exclusive,
            prefix=DEFAULT_PREFIX if exclusive else settings.redis_prefix,
            report_fault=lambda fault: metrics.store_faults_total.labels(fault).inc(),
        )
    except ValueError as error:
        raise StartError(f"IMPRINT_REDIS_URL: {error}") from error


def new_sessions(settings: Settings, store: SessionStore, metrics: Metrics) -> Sessions:
    """Return the sessions in a store, under the limits of the settings."""
    limits = ServerLimits(
        max_queue=settings.max_queue,
        session_bytes=settings.session_max_bytes,
        key_ttl_s=settings.idempotency_ttl_s,
        retry_ttl_s=settings.retry_ttl_s,
        response_ttl_s=settings.response_ttl_s,
        lease_s=settings.lease_s,
        export_key=settings.export_key or "",
    )
    return Sessions(
        store,
        Quotas(store),
        metrics,
        model_id=settings.model_names[0] if settings.model_names else _model_id(settings.model),
        limits=limits,
        proof_rate=settings.proof_rate,
    )


def _model_id(model: str) -> str:
    """Return the base's id for clients: its name, or the name of its folder or file."""
    path = Path(model).expanduser()
    return path.absolute().name if path.exists() else model


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
    embedded = EmbeddedValkey(settings.data_dir, max_bytes=settings.store_bytes, rewrite_s=settings.store_rewrite_s)
    url = embedded.start(stopped=signals.is_set)
    try:
        yield url, embedded
    finally:
        embedded.stop()
