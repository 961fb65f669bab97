"""Real Valkey processes for tests: a single server, a cluster of three, or a master under a Sentinel."""

from __future__ import annotations

import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

from redis import Redis
from redis.exceptions import RedisError

from service.store.embedded import valkey_binary

WAIT_TIMEOUT_S = 20.0


def free_ports(count: int) -> list[int]:
    """Return ports that no process listens on."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]


@contextmanager
def valkey(folder: Path, port: int, *options: object) -> Iterator[subprocess.Popen[bytes]]:
    """Run a Valkey with an empty store, and kill the process in the end."""
    folder.mkdir(parents=True, exist_ok=True)
    arguments = ["--port", port, "--bind", "127.0.0.1", "--dir", folder, "--save", "", *options]
    process = subprocess.Popen([valkey_binary(), *map(str, arguments)], stdout=subprocess.DEVNULL)
    try:
        with Redis(port=port) as client:
            wait_for(lambda: bool(client.ping()))
        yield process
    finally:
        process.kill()
        process.wait()


def wait_for(condition: Callable[[], bool]) -> None:
    """Wait until the condition holds; a server that does not answer counts as false."""
    deadline = time.monotonic() + WAIT_TIMEOUT_S
    while True:
        with suppress(RedisError):
            if condition():
                return
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.02)


@contextmanager
def cluster(folder: Path) -> Iterator[list[int]]:
    """Yield the ports of three nodes that share the slots."""
    ports = free_ports(6)
    nodes, buses = ports[:3], ports[3:]
    with ExitStack() as stack:
        for port, bus in zip(nodes, buses, strict=True):
            options = ("--cluster-enabled", "yes", "--cluster-port", bus, "--cluster-node-timeout", 2000)
            stack.enter_context(valkey(folder / str(port), port, *options))
        clients = [stack.enter_context(Redis(port=port)) for port in nodes]
        for number, client in enumerate(clients):
            first, last = number * 5462, min(16383, number * 5462 + 5461)
            client.execute_command("CLUSTER ADDSLOTSRANGE", first, last)
            for port, bus in zip(nodes, buses, strict=True):
                client.execute_command("CLUSTER MEET", "127.0.0.1", port, bus)

        def is_complete(client: Any) -> bool:
            info = client.execute_command("CLUSTER INFO")
            return bool(info["cluster_state"] == "ok" and info["cluster_known_nodes"] == "3")

        for client in clients:
            wait_for(lambda client=client: is_complete(client))  # type: ignore[misc]
        yield nodes


@contextmanager
def sentinel(folder: Path) -> Iterator[tuple[int, list[int], list[subprocess.Popen[bytes]]]]:
    """Yield the port of a Sentinel that watches "mymaster", and the ports and processes of a master and its replica."""
    sentinel_port, master, replica = free_ports(3)
    with ExitStack() as stack:
        processes = [
            stack.enter_context(valkey(folder / "master", master)),
            stack.enter_context(valkey(folder / "replica", replica, "--replicaof", f"127.0.0.1 {master}")),
        ]
        with Redis(port=replica) as client:
            wait_for(lambda: dict(client.info("replication"))["master_link_status"] == "up")
        config = folder / "sentinel.conf"
        config.write_text(
            f"port {sentinel_port}\nbind 127.0.0.1\ndir {folder}\nsentinel monitor mymaster 127.0.0.1 {master} 1\n"
            "sentinel down-after-milliseconds mymaster 500\nsentinel failover-timeout mymaster 2000\n"
        )
        process = subprocess.Popen([valkey_binary(), str(config), "--sentinel"], stdout=subprocess.DEVNULL)
        try:
            with Redis(port=sentinel_port) as client:
                wait_for(lambda: len(client.execute_command("SENTINEL REPLICAS", "mymaster")) == 1)
            yield sentinel_port, [master, replica], processes
        finally:
            process.kill()
            process.wait()
