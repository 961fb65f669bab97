"""The deployments of the oracle, and how many faults of each kind they get."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from tests.conftest import Server, started
from tests.live import find_valkey
from tests.oracle.deployment import LEASE_S, SEND_TIMEOUT_S, Deployment, Fault
from tests.oracle.eviction import LostKey
from tests.oracle.failover import ClusterStore, Failover, ReplicatedStore, SentinelStore
from tests.oracle.faults import FrozenReader, FullDisk, Kill, Pause
from tests.oracle.partition import Delayed, Dropped, HalfClosed
from tests.service.small_disk import can_mount, mounted
from tests.service.stalling_proxy import StallingProxy
from tests.service.valkeys import free_ports, valkey

# Faults of each kind in a run of 1,000.
SHARES: dict[str, dict[str, int]] = {
    "sentinel": {"failover (sentinel)": 70},
    "cluster": {"failover (cluster)": 70},
    "embedded": {
        "kill of the server": 8,
        "kill of the store": 85,
        "kill of both": 7,
        "full disk": 60,
        "frozen reader": 60,
        "key lost": 120,
    },
    "shared": {
        "pause of a replica": 80,
        "line dropped": 90,
        "line delayed": 90,
        "line half-closed": 90,
        "frozen reader": 60,
        "key lost": 110,
    },
}
LIMITS: dict[str, object] = {"max_queue": 200, "send_timeout_s": SEND_TIMEOUT_S}
REPLICA = LIMITS | {"lease_s": LEASE_S, "lease_wait_s": 5}
DISK = "size=768m"


def plan(total: int) -> dict[str, Counter[str]]:
    """Return how many faults of each kind make a run of `total` faults, by deployment."""
    whole = sum(sum(kinds.values()) for kinds in SHARES.values())
    planned, taken, share = dict[str, Counter[str]](), 0, 0
    for name, kinds in SHARES.items():
        planned[name] = Counter()
        for kind, count in kinds.items():
            share += count
            planned[name][kind] = round(total * share / whole) - taken
            taken += planned[name][kind]
    return planned


@contextmanager
def embedded(folder: Path, model: str) -> Iterator[Deployment]:
    """Yield a server on its embedded store, on a small disk if this process may mount one."""
    home = folder / "disk"
    with ExitStack() as stack:
        if can_mount():
            stack.enter_context(mounted(home, "-o", DISK))
        server = Server(model, home / "data", hot_sessions=10, **LIMITS)
        server.log = folder / "embedded.log"
        home.mkdir(exist_ok=True)
        server.start()
        try:
            lane: list[Fault] = [Kill(server, "server"), Kill(server, "store"), Kill(server, "both")]
            disk: list[Fault] = [FullDisk(server)] if can_mount() else []
            yield Deployment(
                "embedded",
                [server],
                lambda session: server.data_dir,
                [[*lane, *disk], [FrozenReader()], [LostKey()]],
            )
        finally:
            server.stop()
            if (orphan := find_valkey(server.data_dir)) is not None:
                orphan.terminate()


@contextmanager
def shared(folder: Path, model: str) -> Iterator[Deployment]:
    """Yield two replicas on one Valkey, each behind a proxy of its own."""
    (port,) = free_ports(1)
    store = f"redis://127.0.0.1:{port}/0"
    with ExitStack() as stack:
        stack.enter_context(valkey(folder / "valkey", port, "--appendonly", "yes", "--appendfsync", "always"))
        proxies = [stack.enter_context(StallingProxy(port).open()) for _ in range(2)]
        urls = [f"redis://127.0.0.1:{proxy.port}/0" for proxy in proxies]
        servers = stack.enter_context(replicas(folder, model, urls))
        lines: list[Fault] = [Dropped(proxies), Delayed(proxies), HalfClosed(proxies)]
        lanes: list[list[Fault]] = [[Pause()], lines, [FrozenReader()], [LostKey()]]
        yield Deployment("shared", servers, lambda session: store, lanes, timeout_s=2 * LEASE_S)


@contextmanager
def sentinel(folder: Path, model: str) -> Iterator[Deployment]:
    """Yield two replicas on a master under a Sentinel."""
    with replicated("sentinel", SentinelStore(folder / "nodes"), folder, model) as deployment:
        yield deployment


@contextmanager
def cluster(folder: Path, model: str) -> Iterator[Deployment]:
    """Yield two replicas on a cluster of three masters, each with a replica."""
    with replicated("cluster", ClusterStore(folder / "nodes"), folder, model) as deployment:
        yield deployment


@contextmanager
def replicated(name: str, store: ReplicatedStore, folder: Path, model: str) -> Iterator[Deployment]:
    """Yield two replicas on a store whose masters fail over."""
    with store.running(), replicas(folder, model, [store.url] * 2) as servers:
        lanes = [[Failover(name, store)]]
        yield Deployment(
            name,
            servers,
            lambda session: f"redis://127.0.0.1:{store.master_of(session)}/0",
            lanes,
            timeout_s=5.0,
        )


@contextmanager
def replicas(folder: Path, model: str, urls: list[str]) -> Iterator[list[Server]]:
    """Yield servers, each on one of the stores."""
    servers = [Server(model, folder / f"replica-{number}", redis_url=url, **REPLICA) for number, url in enumerate(urls)]
    with started(servers):
        yield servers


DEPLOYMENTS: dict[str, Callable[[Path, str], AbstractContextManager[Deployment]]] = {
    "embedded": embedded,
    "shared": shared,
    "sentinel": sentinel,
    "cluster": cluster,
}
