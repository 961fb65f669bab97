"""Where the parts are put together: settings in, a running server out. Nothing else names concrete parts."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
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
from model.decode.cuda_graphs import wrap_for_serving
from model.memory import Memory, MemoryConfigError, load_memory
from model.memory.initial import default_config, random_memory
from model.policies.network import Policy, PolicyError, load_policy
from model.text.tokenizer import Tokenizer
from service.base_cache import BaseError, resolve_base
from service.engine import Engine
from service.errors import StoreUnavailable
from service.http.install import install
from service.http.limits import ConnectionLimits, ConnectionReport
from service.http.protocol import Connection
from service.http.schemas import MAX_CHOICES
from service.metrics import Metrics
from service.settings import Settings
from service.store.base import RetentionConfig
from service.store.embedded import EmbeddedValkey, StoreError
from service.store.redis.store import RedisStore
from service.tenants import ApiKeys, ApiKeysError
from service.turns.loaded_model import LoadedModel
from service.turns.quotas import Quotas
from service.turns.session_gate import ServerLimits
from service.turns.sessions import Sessions

WATCH_EVERY_S = 10.0
LOADER_THREAD = "imprint-load"  # the thread that loads the model
KV_SHARE = 0.4  # of the memory that is free at the start
SHIPPED_MEMORIES = {"smollm2-135m-instruct": "smollm2-135m-instruct.safetensors"}

log = logging.getLogger(__name__)


class StartError(Exception):
    """The server cannot start; the message is one line that says why."""


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
    """Serves until SIGTERM or SIGINT, drains, and returns the exit code."""
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
            # Stopped while it loads: a thread inside torch aborts a process whose interpreter ends under it.
            sys.stderr.flush()
            os._exit(code)
        return code
    except STARTUP_ERRORS as error:
        print(f"imprint: {error}", file=sys.stderr)
        return 1


def create_app(sessions: Sessions, metrics: Metrics, settings: Settings, keys: ApiKeys) -> FastAPI:
    """The web application in front of `sessions`."""
    # No docs_url: FastAPI's pages take their scripts from another host.
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
    host, port, *_ = listener.getsockname()
    metrics = Metrics()
    retention = RetentionConfig(
        versions=settings.keep_versions,
        history_bytes=settings.keep_bytes,
        ttl_s=settings.session_ttl_s,
        lease_s=settings.lease_s,
        wait_s=settings.lease_wait_s,
    )
    try:
        store = RedisStore.from_url(url, retention, exclusive=embedded is not None)
    except ValueError as error:
        raise StartError(f"IMPRINT_REDIS_URL: {error}") from error
    limits = ServerLimits(
        max_queue=settings.max_queue,
        session_bytes=settings.session_max_bytes,
        key_ttl_s=settings.idempotency_ttl_s,
        retry_ttl_s=settings.retry_ttl_s,
        lease_s=settings.lease_s,
        export_key=settings.export_key or "",
    )
    sessions = Sessions(
        store,
        Quotas(store),
        metrics,
        model_id=_model_id(settings.model),
        limits=limits,
        proof_rate=settings.proof_rate,
    )
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
    server = _Server(config, sessions, settings.drain_timeout_s)
    watching = asyncio.create_task(_watch_store(store, sessions, metrics, keys))
    tasks = [watching, asyncio.create_task(sessions.drop_erased())]
    if embedded is not None:
        tasks.append(asyncio.create_task(embedded.supervise()))
    serving = asyncio.create_task(server.serve([listener]))
    loading = asyncio.create_task(_load(settings, metrics))
    engine: Engine | None = None
    try:
        await asyncio.wait({serving, loading}, return_when=asyncio.FIRST_COMPLETED)
        if loading.done() and sessions.state == "loading":
            loaded_model = loading.result()
            engine = loaded_model.engine
            await engine.start()
            sessions.begin(loaded_model)
            log.info("ready: http://%s:%s (data in %s)", host, port, settings.data_dir)
        await serving
    finally:
        server.should_exit = True
        for task in [*tasks, loading]:
            task.cancel()
        await asyncio.gather(serving, *tasks, loading, return_exceptions=True)
        if engine is not None:
            await engine.stop()
        await store.close()
    return 0


async def _load(settings: Settings, metrics: Metrics) -> LoadedModel:
    """Reads the model on a thread of its own, so that the probes are answered meanwhile; one that nobody waits for when
    the server is told to stop."""
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
            outcome = _load_now(settings, metrics)
        except Exception as error:
            outcome = error
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(settle, outcome)

    threading.Thread(target=load, name=LOADER_THREAD, daemon=True).start()
    return await loaded


def _load_now(settings: Settings, metrics: Metrics) -> LoadedModel:
    began = time.monotonic()
    folder = resolve_base(settings.model, settings.cache_dir, progress=log.info)
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise StartError("IMPRINT_DEVICE is cuda, but this machine has no CUDA device that torch can use")
    backbone = load_backbone(folder, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    tokenizer = Tokenizer.load(folder, special_in_messages=settings.message_special_tokens == "tokens")
    memory = choose_memory(settings, backbone.config.hidden_size).to(device)
    policies = {policy.config.name: policy.to(device) for policy in choose_policies(settings)}
    context = min(settings.context or backbone.config.max_context, backbone.config.max_context)
    kv_tokens = settings.kv_tokens or _kv_tokens(backbone, context)
    lm = AdaptiveLM(backbone, memory, decoder=choose_decoder(settings, backbone))
    engine = Engine(
        # A request that is larger than the budget runs alone: there must be room for the largest.
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
    fingerprints = {"base": fingerprint(folder), "memory": memory.fingerprint()}
    metrics.build_info.info({"version": version("imprint"), "model": settings.model, **fingerprints})
    _watch_device(metrics, device)
    log.info("loaded %s on %s in %.1f s", settings.model, device, time.monotonic() - began)
    policy_fingerprints = {name: policy.fingerprint() for name, policy in policies.items()}
    # A collection visits every object, with the interpreter's lock held: 0.4 s for those of torch and the model, and
    # 0.1 s for the tokens of a long text. So the former are left out, and collections are rarer than by default.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    return LoadedModel(
        engine, tokenizer, fingerprints, context, backbone.config.vocab_size, policies, policy_fingerprints
    )


def choose_decoder(settings: Settings, backbone: Backbone) -> Backbone:
    """The base as it is to generate."""
    return backbone.fp16_decoder() if settings.decode_dtype == "fp16" else backbone


def choose_memory(settings: Settings, hidden_size: int) -> Memory:
    """The memory that is asked for, the one shipped for the base, or a random one. Raises MemoryConfigError."""
    if settings.memory != "default":
        return load_memory(Path(settings.memory), hidden_size=hidden_size)
    if settings.model in SHIPPED_MEMORIES:
        with as_file(files("model") / "checkpoints" / SHIPPED_MEMORIES[settings.model]) as path:
            return load_memory(path, hidden_size=hidden_size)
    log.warning("no memory is shipped for %s: serving an unfitted one (see `imprint train`)", settings.model)
    return random_memory(default_config(hidden_size), seed=0)


def choose_policies(settings: Settings) -> list[Policy]:
    """The policies that are asked for: files, or all that are shipped. Raises StartError for two of one name."""
    if settings.policies == "default":
        with as_file(files("model") / "checkpoints" / "policies") as folder:
            policies = [load_policy(path) for path in sorted(folder.glob("*.safetensors"))]
    else:
        paths = [] if settings.policies == "none" else settings.policies.split(",")
        policies = [load_policy(Path(path.strip())) for path in paths]
    names = [policy.config.name for policy in policies]
    if twice := {name for name in names if names.count(name) > 1}:
        raise StartError(f"IMPRINT_POLICIES: two policies are called {min(twice)!r}")
    return policies


def _model_id(model: str) -> str:
    """What clients call the base: its name, or that of its folder or file."""
    path = Path(model).expanduser()
    return path.absolute().name if path.exists() else model


def _kv_tokens(backbone: Backbone, context: int) -> int:
    """Key-value cache tokens for a share of the free memory, at least one request's."""
    one = backbone.new_cache(context).nbytes // context
    free = psutil.virtual_memory().available
    if backbone.embedding.is_cuda:
        free = torch.cuda.mem_get_info()[0]
    return max(context, int(KV_SHARE * free) // one)


async def _watch_store(store: RedisStore, sessions: Sessions, metrics: Metrics, keys: ApiKeys) -> None:
    """Measures the store, over and over."""
    while True:
        try:
            used, limit = await store.memory()
            metrics.store_used_bytes.set(used)
            metrics.store_limit_bytes.set(limit)
            if sessions.state == "ready":
                metrics.sessions_cold.set(await sessions.count_cold(keys.tenants))
            metrics.store_up.set(1)
        except StoreUnavailable:
            metrics.store_up.set(0)
        await asyncio.sleep(WATCH_EVERY_S)


def _watch_device(metrics: Metrics, device: str) -> None:
    """Has the device measured whenever the metrics are read."""

    def free_bytes() -> int:
        return torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available

    name = torch.cuda.get_device_name() if device == "cuda" else torch.backends.cpu.get_cpu_capability()
    metrics.device_info.info({"kind": device, "name": name})
    total = torch.cuda.mem_get_info()[1] if device == "cuda" else psutil.virtual_memory().total
    metrics.device_memory_bytes.set(total)
    metrics.device_memory_used_bytes.set_function(lambda: total - free_bytes())


class _Server(uvicorn.Server):
    """On a signal it first drains: probes say so and new turns are refused while the running ones end. On a second one,
    it ends."""

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
        # What is left of the time is for connections without a turn, such as those of half a request.
        self._exit(within_s=max(0, round(deadline - time.monotonic())))

    def _exit(self, *, within_s: int) -> None:
        self.config.timeout_graceful_shutdown = within_s
        self.should_exit = True


@contextmanager
def _listening(settings: Settings, keys: ApiKeys) -> Iterator[socket.socket]:
    """The server's own socket, taken before anything slow is begun."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        listener = socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        raise StartError(f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}") from error
    with listener:
        # Event loops set it only on sockets that name TCP as their protocol, which those accepted here do not: the
        # second piece of an answer would wait 40 ms for the client to acknowledge the first.
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
    """The address of the given Redis, or of an embedded Valkey that lives as long as the server."""
    if settings.redis_url is not None:
        yield settings.redis_url, None
        return
    embedded = EmbeddedValkey(settings.data_dir, max_bytes=settings.store_bytes)
    url = embedded.start()
    try:
        yield url, embedded
    finally:
        embedded.stop()
