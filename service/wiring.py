"""The parts of a service: the store, the sessions, the engine and the web application. Only this module wires them.

`open_service` has no sockets and no signals: a web server, an adapter to another runtime, or a test mounts the result.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path

from fastapi import FastAPI

from service.archiving import archive_idle, remove_lingering
from service.background import find_malloc_trim, keep_running, return_free_memory
from service.engine import Engine
from service.http.install import install
from service.metrics import Metrics
from service.model_loading import StartError, load_in_thread
from service.settings import Settings
from service.stopping import end_tasks
from service.store.base import RetentionConfig, SessionStore
from service.store.embedded import EmbeddedValkey
from service.store.objects import Objects, ObjectsError
from service.store.redis.codec import DEFAULT_PREFIX
from service.store.redis.store import RedisStore
from service.store_watch import check_store, restore_list, store_reporter, watch_store
from service.tenants import ApiKeys
from service.turns.quotas import Quotas
from service.turns.session_gate import ServerLimits
from service.turns.sessions import Sessions


class Service:
    """A service: its web application answers from the beginning, and `start` makes it ready.

    app: the web application. sessions: what it answers from. metrics: of this service.
    """

    def __init__(
        self, settings: Settings, store: SessionStore, keys: ApiKeys, metrics: Metrics, *, own_store: bool
    ) -> None:
        self.metrics, self.sessions = metrics, new_sessions(settings, store, metrics)
        self.app = create_app(self.sessions, metrics, settings, keys)
        self._engine: Engine | None = None
        self._loading = asyncio.create_task(load_in_thread(settings, metrics))
        # The service's own store has all rights.
        self._checking = None if own_store else asyncio.create_task(check_store(store, settings, metrics))

    async def start(self) -> None:
        """Wait until the model is loaded, and begin to take turns. Raises StartError and the errors of loading."""
        loaded_model = await asyncio.shield(self._loading)
        if self.sessions.state != "loading":
            return  # told to drain meanwhile
        self._engine = loaded_model.engine
        await self._engine.start()
        if self.sessions.state == "loading":
            self.sessions.set_ready(loaded_model)

    async def wait_failed(self) -> None:
        """Raise StartError when a store turns out not to be able to keep sessions; never return otherwise."""
        if self._checking is not None:
            await asyncio.shield(self._checking)
        await asyncio.Event().wait()

    async def drain(self, timeout_s: float) -> None:
        """Refuse new turns, and wait for the running ones, at most for `timeout_s` seconds."""
        await self.sessions.drain(timeout_s)

    async def stop(self) -> None:
        """End what runs besides the web application."""
        await end_tasks([self._loading, *([self._checking] if self._checking else [])])
        if self._engine is not None:
            await self._engine.stop()


@asynccontextmanager
async def open_service(
    settings: Settings, *, keys: ApiKeys | None = None, store: tuple[str, EmbeddedValkey | None] | None = None
) -> AsyncIterator[Service]:
    """Yield a service on the store of the settings: their Redis, or a Valkey that runs as long as the service.

    keys: default: those of the settings. store: a URL, and the embedded Valkey that has it, if they are open already.
    Raises StartError, ApiKeysError or StoreError.
    """
    keys = keys or ApiKeys(settings)
    if store is None and settings.redis_url is None:
        embedded = new_embedded(settings)
        url = await asyncio.to_thread(embedded.start)
        try:
            async with open_service(settings, keys=keys, store=(url, embedded)) as service:
                yield service
        finally:
            await asyncio.to_thread(embedded.stop)
        return
    url, own = store or (settings.redis_url or "", None)
    metrics = Metrics()
    sessions_store = _connect_store(settings, url, metrics, exclusive=own is not None)
    try:
        service = Service(settings, sessions_store, keys, metrics, own_store=own is not None)
        tasks = _background_tasks(sessions_store, service.sessions, metrics, keys, own, settings)
        try:
            yield service
        finally:
            await end_tasks(tasks)
            await service.stop()
    finally:
        await sessions_store.close()


def new_embedded(settings: Settings) -> EmbeddedValkey:
    """Return the Valkey of the settings' data folder, not yet started."""
    return EmbeddedValkey(settings.data_dir, max_bytes=settings.store_bytes, rewrite_s=settings.store_rewrite_s)


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


def _background_tasks(
    store: RedisStore,
    sessions: Sessions,
    metrics: Metrics,
    keys: ApiKeys,
    embedded: EmbeddedValkey | None,
    settings: Settings,
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
    if settings.archive_url:
        forever["archive_idle"] = partial(
            archive_idle, store.archive, settings.archive_after_s, metrics, owner=secrets.token_hex(8)
        )
        forever["remove_lingering"] = partial(remove_lingering, store.archive)
    if embedded is None:
        forever["heartbeat"] = store.heartbeat
    if (trim := find_malloc_trim()) is not None:
        forever["return_free_memory"] = partial(return_free_memory, trim)
    tasks = [asyncio.create_task(keep_running(name, task, metrics)) for name, task in forever.items()]
    if embedded is not None:
        tasks.append(asyncio.create_task(embedded.supervise(report)))
    return tasks


def _connect_store(settings: Settings, url: str, metrics: Metrics, *, exclusive: bool) -> RedisStore:
    """Return the store of the sessions; `exclusive`: no other server uses that store. Raises StartError."""
    retention = RetentionConfig(
        versions=settings.keep_versions,
        history_bytes=settings.keep_bytes,
        ttl_s=settings.session_ttl_s,
        lease_s=settings.lease_s,
        wait_s=settings.lease_wait_s,
    )
    if settings.archive_after_s and not settings.archive_url:
        raise StartError(f"IMPRINT_ARCHIVE_AFTER_S is {settings.archive_after_s} and needs IMPRINT_ARCHIVE_URL")
    try:
        objects = Objects(settings.archive_url) if settings.archive_url else None
    except ObjectsError as error:
        raise StartError(f"IMPRINT_ARCHIVE_URL: {error}") from error
    try:
        return RedisStore.from_url(
            url,
            retention,
            exclusive=exclusive,
            prefix=DEFAULT_PREFIX if exclusive else settings.redis_prefix,
            report_fault=lambda fault: metrics.store_faults_total.labels(fault).inc(),
            objects=objects,
            report_archive=metrics.report_archive,
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
