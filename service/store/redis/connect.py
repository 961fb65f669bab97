"""Clients of one server, of a master that Sentinels name, or of a cluster. No client here repeats a call by itself."""

from __future__ import annotations

from typing import Any
from urllib.parse import SplitResult, unquote, urlsplit

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.cluster import ClusterNode, RedisCluster
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff

CONNECTIONS = 16
CONNECT_TIMEOUT_S = 2.0
TIMEOUT_S = 10.0
HEALTH_CHECK_S = 15
DEFAULT_PORTS = {"sentinel": 26379, "cluster": 6379}

AnyRedis = Redis | RedisCluster


def connect(url: str) -> AnyRedis:
    """Return a client of the server or servers that a URL names; connect at the first call.

    Args:
        url: `redis://`, `rediss://`, `unix://`, `redis+sentinel://host:port,host:port/service` or
            `redis+cluster://host:port,host:port`; the last two also as `rediss+…`, which is TLS.

    Raises:
        ValueError: the URL has none of these forms.
    """
    split = urlsplit(url)
    scheme, _, kind = split.scheme.partition("+")
    options: dict[str, Any] = {
        "socket_timeout": TIMEOUT_S,
        "socket_connect_timeout": CONNECT_TIMEOUT_S,
        "health_check_interval": HEALTH_CHECK_S,
        "retry": Retry(NoBackoff(), 0),
    }
    if not kind:
        pool = BlockingConnectionPool.from_url(url, max_connections=CONNECTIONS, timeout=TIMEOUT_S, **options)
        return Redis.from_pool(pool)
    if scheme not in ("redis", "rediss") or kind not in DEFAULT_PORTS:
        raise ValueError(f"scheme must be redis+sentinel or redis+cluster, got {split.scheme!r}")
    hosts = _hosts(split, DEFAULT_PORTS[kind])
    credentials = _credentials(split)
    if scheme == "rediss":
        options["ssl"] = True
    if kind == "cluster":
        nodes = [ClusterNode(host, port) for host, port in hosts]
        return RedisCluster(startup_nodes=nodes, max_connections=CONNECTIONS, **options, **credentials)
    service, _, db = split.path.strip("/").partition("/")
    if not service or not (db.isdecimal() or not db):
        raise ValueError("redis+sentinel:// needs a path: the service, as in /mymaster or /mymaster/0")
    sentinels: Any = Sentinel(  # type: ignore[no-untyped-call]
        hosts, sentinel_kwargs=options, **options, **credentials
    )
    master: Redis = sentinels.master_for(service, db=int(db or 0))
    return master


def _hosts(split: SplitResult, default_port: int) -> list[tuple[str, int]]:
    hosts = []
    for address in split.netloc.rpartition("@")[2].split(","):
        host, _, port = address.rpartition(":") if ":" in address.rpartition("]")[2] else (address, "", "")
        if not host or not (port.isdecimal() or not port):
            raise ValueError(f"{split.scheme}:// needs host:port,host:port, got {address!r}")
        hosts.append((host.strip("[]"), int(port or default_port)))
    return hosts


def _credentials(split: SplitResult) -> dict[str, Any]:
    name, _, password = split.netloc.rpartition("@")[0].partition(":")
    credentials = {"username": unquote(name), "password": unquote(password)}
    return {key: value for key, value in credentials.items() if value}
