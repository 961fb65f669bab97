"""The start of a server: reads the settings, builds the parts, serves, and drains. Only this module builds them."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from importlib.metadata import version
from importlib.resources import as_file, files
from ipaddress import ip_address
from pathlib import Path
from types import FrameType

import psutil
import torch
import uvicorn
from fastapi import FastAPI
from uvicorn.loops.auto import auto_loop_factory

from model.adaptive_lm import AdaptiveLM
from model.base.backbone import Backbone
from model.base.checkpoint import CheckpointError, fingerprint, load_backbone
from model.base.config import ConfigError
from model.decode.backend import choose_decode_step
from model.decode.cuda_graphs import wrap_for_serving
from model.memory import Memory, MemoryConfigError, load_memory
from model.memory.initial import default_config, random_memory
from model.policies.config import PolicyError
from model.policies.network import Policy, load_policy
from model.text.tokenizer import Tokenizer
from service.background import keep_running
from service.base_cache import BaseError, resolve_base
from service.engine import Engine
from service.errors import StoreRefused, Unavailable
from service.http.install import install
from service.http.schemas import MAX_CHOICES
from service.metrics import Metrics
from service.settings import Settings
from service.store.base import RetentionConfig, SessionStore
from service.store.embedded import EmbeddedValkey, StoreError
from service.store.redis.codec import DEFAULT_PREFIX
from service.store.redis.store import RedisStore
from service.tenants import ApiKeys, ApiKeysError
from service.turns.loaded_model import LoadedModel
from service.turns.quotas import Quotas
from service.turns.session_gate import ServerLimits
from service.turns.sessions import Sessions

WATCH_EVERY_S = 10.0
RESTORE_EVERY_S = 300.0
LOADER_THREAD = "imprint-load"  # name of the thread that loads the model
KV_SHARE = 0.4  # share of the memory free at the start that the key-value cache gets
SHIPPED_MEMORIES = {"smollm2-135m-instruct": "smollm2-135m-instruct.safetensors"}

log = logging.getLogger(__name__)


class StartError(Exception):
    """An error that keeps the server from starting; the message is one line."""


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
    for chatty in ("httpx", "httpcore", "urllib3", "filelock"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    try:
        keys = ApiKeys(settings)
        with (
            _listening(settings, keys) as listener,
            _store_url(settings) as (url, embedded),
            asyncio.Runner(loop_factory=auto_loop_factory()) as runner,
        ):
            code = runner.run(_serve(settings, keys, listener, url, embedded))
        if any(thread.name == LOADER_THREAD for thread in threading.enumerate()):
            # The server stops while the model loads: a thread inside torch aborts a process whose interpreter ends.
            sys.stderr.flush()
            os._exit(code)
        return code
    except STARTUP_ERRORS as error:
        print(f"imprint: {error}", file=sys.stderr)
        return 1


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
    settings: Settings, keys: ApiKeys, listener: socket.socket, url: str, embedded: EmbeddedValkey | None
) -> int:
    """Serve on the listener until the server is told to stop; return the exit code."""
    metrics = Metrics()
    store = _connect_store(settings, url, metrics, exclusive=embedded is not None)
    sessions = new_sessions(settings, store, metrics)
    app = create_app(sessions, metrics, settings, keys)
    config = uvicorn.Config(app, log_config=None, access_log=False, lifespan="off", timeout_keep_alive=75)
    server = _Server(config, sessions, settings.drain_timeout_s)
    watch = partial(_watch_store, store, sessions, metrics, keys)
    watching = asyncio.create_task(keep_running("watch_store", watch, metrics))
    tasks = [watching, asyncio.create_task(keep_running("drop_erased", sessions.drop_erased, metrics))]
    if embedded is not None:
        tasks.append(asyncio.create_task(embedded.supervise()))
    else:
        tasks.append(asyncio.create_task(keep_running("heartbeat", store.heartbeat, metrics)))
        tasks.append(asyncio.create_task(keep_running("restore_list", lambda: _restore_list(store, metrics), metrics)))
    checking = asyncio.create_task(check_store(store, settings, metrics) if embedded is None else asyncio.sleep(0))
    serving = asyncio.create_task(server.serve([listener]))
    loading = asyncio.create_task(_load(settings, metrics))
    engine: Engine | None = None
    try:
        await asyncio.wait({serving, loading, checking}, return_when=asyncio.FIRST_COMPLETED)
        if checking.done():
            checking.result()
            await asyncio.wait({serving, loading}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done() and sessions.state == "loading":
            loaded_model = loading.result()
            engine = loaded_model.engine
            await engine.start()
            sessions.begin(loaded_model)
            host, port, *_ = listener.getsockname()
            log.info("ready: http://%s:%s (data in %s)", host, port, settings.data_dir)
        await asyncio.wait({serving, checking}, return_when=asyncio.FIRST_COMPLETED)
        if checking.done():
            checking.result()
        await serving
    finally:
        server.should_exit = True
        for task in [*tasks, loading, checking]:
            task.cancel()
        await asyncio.gather(serving, *tasks, loading, checking, return_exceptions=True)
        if engine is not None:
            await engine.stop()
        await store.close()
    return 0


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
        lease_s=settings.lease_s,
        export_key=settings.export_key or "",
    )
    return Sessions(
        store,
        Quotas(store),
        metrics,
        model_id=_model_id(settings.model),
        limits=limits,
        proof_rate=settings.proof_rate,
    )


async def _load(settings: Settings, metrics: Metrics) -> LoadedModel:
    """Load the model in a thread of its own, so that the server answers probes meanwhile.

    Nothing waits for the thread when the server is told to stop.
    """
    loop = asyncio.get_running_loop()
    loaded: asyncio.Future[LoadedModel] = loop.create_future()

    def settle(outcome: LoadedModel | Exception) -> None:
        if loaded.done():
            return
        if isinstance(outcome, Exception):
            loaded.set_exception(outcome)
        else:
            loaded.set_result(outcome)

    def load() -> None:
        outcome: LoadedModel | Exception
        try:
            outcome = load_model(settings, metrics)
        except Exception as error:
            outcome = error
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, outcome)

    threading.Thread(target=load, name=LOADER_THREAD, daemon=True).start()
    return await loaded


def load_model(settings: Settings, metrics: Metrics) -> LoadedModel:
    """Load the base, the memory and the policies, and build the engine on them."""
    started = time.monotonic()
    folder = resolve_base(settings.model, settings.cache_dir, progress=log.info)
    device = _choose_device(settings)
    backbone = load_backbone(folder, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    tokenizer = Tokenizer.load(folder)
    memory = choose_memory(settings, backbone.config.hidden_size).to(device)
    policies = {policy.config.name: policy.to(device) for policy in choose_policies(settings)}
    context = min(settings.context or backbone.config.max_context, backbone.config.max_context)
    lm = AdaptiveLM(backbone, memory, decoder=choose_decoder(settings, backbone))
    engine = _new_engine(settings, lm, tokenizer, policies, metrics, context)
    fingerprints = {"base": fingerprint(folder), "memory": memory.fingerprint()}
    metrics.build_info.info({"version": version("imprint"), "model": settings.model, **fingerprints})
    _watch_device(metrics, device)
    log.info("loaded %s on %s in %.1f s", settings.model, device, time.monotonic() - started)
    policy_fingerprints = {name: policy.fingerprint() for name, policy in policies.items()}
    return LoadedModel(
        engine, tokenizer, fingerprints, context, backbone.config.vocab_size, policies, policy_fingerprints
    )


def _new_engine(
    settings: Settings,
    lm: AdaptiveLM,
    tokenizer: Tokenizer,
    policies: dict[str, Policy],
    metrics: Metrics,
    context: int,
) -> Engine:
    kv_tokens = settings.kv_tokens or _kv_tokens(lm.backbone, context)
    return Engine(
        # A request larger than the budget runs alone: the caches must have room for the largest request.
        wrap_for_serving(
            lm, kv_tokens=max(kv_tokens, MAX_CHOICES * context), max_batch=max(settings.max_batch, MAX_CHOICES)
        ),
        tokenizer,
        max_turns=settings.max_queue,
        max_batch=settings.max_batch,
        kv_tokens=kv_tokens,
        hot_rows=settings.hot_rows,
        hot_sessions=settings.hot_sessions,
        threads=settings.threads,
        metrics=metrics,
        policies=policies,
    )


def _choose_device(settings: Settings) -> str:
    """Return "cuda" or "cpu". Raises StartError for a CUDA device that is not there."""
    if settings.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise StartError("IMPRINT_DEVICE is cuda, but this machine has no CUDA device that torch can use")
    return settings.device


def choose_decoder(settings: Settings, backbone: Backbone) -> Backbone:
    """Return the base with the weights that generate, in the number format of the settings."""
    return backbone.fp16_decoder(choose_decode_step(backbone)) if settings.decode_dtype == "fp16" else backbone


def choose_memory(settings: Settings, hidden_size: int) -> Memory:
    """Return the memory of the settings, else the memory shipped for the base, else a random one.

    Raises MemoryConfigError.
    """
    if settings.memory != "default":
        return load_memory(Path(settings.memory), hidden_size=hidden_size)
    if settings.model in SHIPPED_MEMORIES:
        with as_file(files("model") / "checkpoints" / SHIPPED_MEMORIES[settings.model]) as path:
            return load_memory(path, hidden_size=hidden_size)
    log.warning("no memory is shipped for %s: serving an unfitted one (see `imprint train`)", settings.model)
    return random_memory(default_config(hidden_size), seed=0)


def choose_policies(settings: Settings) -> list[Policy]:
    """Return the policies of the settings, or all shipped ones. Raises StartError for two policies of one name."""
    if settings.policies == "default":
        with as_file(files("model") / "checkpoints" / "policies") as folder:
            policies = [load_policy(path) for path in sorted(folder.glob("*.safetensors"))]
    else:
        paths = [] if settings.policies == "none" else settings.policies.split(",")
        policies = [load_policy(Path(path.strip())) for path in paths]
    names = [policy.config.name for policy in policies]
    if duplicates := {name for name in names if names.count(name) > 1}:
        raise StartError(f"IMPRINT_POLICIES: two policies are called {min(duplicates)!r}")
    return policies


def _model_id(model: str) -> str:
    """Return the base's id for clients: its name, or the name of its folder or file."""
    path = Path(model).expanduser()
    return path.absolute().name if path.exists() else model


def _kv_tokens(backbone: Backbone, context: int) -> int:
    """Return the number of key-value cache tokens for a share of the free memory, at least one request's."""
    bytes_per_token = backbone.new_cache(context).nbytes // context
    free_bytes = psutil.virtual_memory().available
    if backbone.embedding.is_cuda:
        free_bytes = torch.cuda.mem_get_info()[0]
    return max(context, int(KV_SHARE * free_bytes) // bytes_per_token)


async def _watch_store(store: SessionStore, sessions: Sessions, metrics: Metrics, keys: ApiKeys) -> None:
    """Measure the store every few seconds, for ever."""
    while True:
        try:
            used, limit = await store.memory()
            metrics.store_used_bytes.set(used)
            metrics.store_limit_bytes.set(limit)
            if sessions.state == "ready":
                metrics.sessions_cold.set(await sessions.count_cold(keys.tenants))
            metrics.store_up.set(1)
        except Unavailable:
            metrics.store_up.set(0)
        await asyncio.sleep(WATCH_EVERY_S)


async def check_store(store: SessionStore, settings: Settings, metrics: Metrics) -> None:
    """Check the store as soon as the store answers. Raises StartError for a store that cannot keep sessions."""
    while True:
        try:
            await store.check_rights()
            evicts = await store.may_evict()
            metrics.store_evicts.set(evicts)
            if evicts and not settings.allow_eviction:
                raise StartError(
                    "the Redis of IMPRINT_REDIS_URL may evict sessions when its memory is full: set its "
                    "maxmemory-policy to noeviction (or IMPRINT_ALLOW_EVICTION=true, which risks sessions)"
                )
            if evicts:
                log.warning("the session store may evict keys of sessions when its memory is full")
            return
        except StoreRefused as error:
            raise StartError(
                f"the Redis of IMPRINT_REDIS_URL refuses what the server needs: {error.__cause__}"
            ) from error
        except Unavailable:
            await asyncio.sleep(1.0)


async def _restore_list(store: SessionStore, metrics: Metrics) -> None:
    """List sessions again that the store has lost from the list, every few minutes, for ever."""
    while True:
        with suppress(Unavailable):
            if restored := await store.restore_list():
                log.error("%d sessions had been lost from the list and are listed again", restored)
                metrics.sessions_relisted_total.inc(restored)
        await asyncio.sleep(RESTORE_EVERY_S)


def _watch_device(metrics: Metrics, device: str) -> None:
    """Make the metrics measure the device whenever the metrics are read."""

    def free_bytes() -> int:
        return torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available

    name = torch.cuda.get_device_name() if device == "cuda" else torch.backends.cpu.get_cpu_capability()
    metrics.device_info.info({"kind": device, "name": name})
    total = torch.cuda.mem_get_info()[1] if device == "cuda" else psutil.virtual_memory().total
    metrics.device_memory_bytes.set(total)
    metrics.device_memory_used_bytes.set_function(lambda: total - free_bytes())


class _Server(uvicorn.Server):
    """A web server that drains on the first signal and ends on the second.

    While the server drains, the probes say so and new turns are refused, and the running turns end.
    """

    def __init__(self, config: uvicorn.Config, sessions: Sessions, drain_timeout_s: float) -> None:
        super().__init__(config)
        self._sessions = sessions
        self._drain_timeout_s = drain_timeout_s
        self._exit_requested = False
        self._draining: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

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
        deadline = time.monotonic() + self._drain_timeout_s
        await self._sessions.drain(self._drain_timeout_s)
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
def _store_url(settings: Settings) -> Iterator[tuple[str, EmbeddedValkey | None]]:
    """Yield the URL of the settings' Redis, or the URL of an embedded Valkey that runs as long as the server."""
    if settings.redis_url is not None:
        yield settings.redis_url, None
        return
    embedded = EmbeddedValkey(settings.data_dir, max_bytes=settings.store_bytes)
    url = embedded.start()
    try:
        yield url, embedded
    finally:
        embedded.stop()
