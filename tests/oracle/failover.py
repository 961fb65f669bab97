"""Masters that die under a Sentinel or in a cluster.

Redis replicates asynchronously, so a master that dies may lose commits that it has acknowledged
(docs/reliability.md). The oracle asks what else is lost: it holds writes back (`CLIENT PAUSE … WRITE`) until the
replicas have everything, and kills the master then. Turns that run meanwhile meet the dead master.
"""

from __future__ import annotations

import asyncio
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from redis import Redis
from redis.crc import key_slot
from redis.exceptions import RedisError

from service.store.embedded import valkey_binary
from tests.clients import ContractViolation
from tests.oracle.deployment import RECOVERY_S, Fault, Run
from tests.service.valkeys import free_ports

NODES = 3  # a master and two replicas under Sentinel; three masters with a replica each in the cluster
DOWN_AFTER_MS = 2000  # longer than a node waits for its turn on a busy machine
HOLD_MS = 10_000  # for which writes are held back at most


class ReplicatedStore(ABC):
    """Valkey processes that take over from each other. Use it within `running`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._masters: list[int] = []  # after the last failover

    @property
    @abstractmethod
    def url(self) -> str:
        """Return the address for the servers."""

    @abstractmethod
    def master_of(self, session: str) -> int:
        """Return the port of the master that has a session."""

    @abstractmethod
    def fail_over(self, session: str) -> None:
        """Kill the master that has a session; return when another has taken over and the killed one follows it."""

    @contextmanager
    def running(self) -> Iterator[None]:
        try:
            self._start_all()
            yield
        finally:
            for process in self._processes.values():
                process.kill()
                process.wait()

    @abstractmethod
    def _start_all(self) -> None: ...

    def _start(self, port: int, *options: object) -> None:
        home = self._folder / str(port)
        home.mkdir(parents=True, exist_ok=True)
        common = ("--port", port, "--bind", "127.0.0.1", "--dir", home, "--save", "")
        replicating = ("--repl-diskless-sync-delay", 0)
        command = [valkey_binary(), *map(str, (*common, *replicating, *options))]
        self._processes[port] = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _until(lambda: bool(ask(port, "PING")))

    def _kill(self, master: int, replicas: list[int]) -> None:
        """Kill a master that has replicated everything that it has acknowledged."""

        def is_level() -> bool:
            ask(master, "CLIENT", "PAUSE", HOLD_MS, "WRITE")  # each time anew: the pause must outlast the comparison
            end = replication(master)["master_repl_offset"]
            return all(replication(port)["master_repl_offset"] == end for port in replicas)

        _until(is_level)
        self._processes[master].kill()
        self._processes[master].wait()

    def _check_undisturbed(self, masters: list[int]) -> None:
        """Raise ContractViolation if a master was replaced that the oracle did not kill: commits may be lost then."""
        if masters != self._masters:
            expected, self._masters = self._masters, masters
            raise ContractViolation(f"{expected} were replaced by {masters}: the machine is too busy")


class SentinelStore(ReplicatedStore):
    """A master and two replicas that a Sentinel watches."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._sentinel, *self._nodes = free_ports(1 + NODES)

    @property
    def url(self) -> str:
        return f"redis+sentinel://127.0.0.1:{self._sentinel}/mymaster/0"

    def master_of(self, session: str) -> int:
        return int(ask(self._sentinel, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", "mymaster")[1])

    def fail_over(self, session: str) -> None:
        master = self.master_of(session)
        self._check_undisturbed([master])
        replicas = [port for port in self._nodes if port != master]
        self._kill(master, replicas)
        _until(lambda: self.master_of(session) != master and role(self.master_of(session)) == "master")
        self._masters = [self.master_of(session)]
        self._start(master, "--replicaof", f"127.0.0.1 {self.master_of(session)}")
        self._wait_for_replicas()

    def _start_all(self) -> None:
        master, *replicas = self._nodes
        self._start(master)
        self._masters = [master]
        for port in replicas:
            self._start(port, "--replicaof", f"127.0.0.1 {master}")
        config = self._folder / "sentinel.conf"
        config.write_text(
            f"port {self._sentinel}\nbind 127.0.0.1\ndir {self._folder}\n"
            f"sentinel monitor mymaster 127.0.0.1 {master} 1\n"
            f"sentinel down-after-milliseconds mymaster {DOWN_AFTER_MS}\nsentinel failover-timeout mymaster 1000\n"
        )
        command = [valkey_binary(), str(config), "--sentinel"]
        self._processes[self._sentinel] = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        _until(lambda: bool(ask(self._sentinel, "SENTINEL", "DEBUG", "INFO-PERIOD", 500)))
        self._wait_for_replicas()

    def _wait_for_replicas(self) -> None:
        """Wait until both replicas follow the master and the Sentinel knows them to be up."""
        _until(lambda: [role(port) for port in self._nodes].count("slave") == NODES - 1)
        _until(lambda: all(is_linked(port) for port in self._nodes if role(port) == "slave"))

        def known() -> bool:
            replicas = ask(self._sentinel, "SENTINEL", "REPLICAS", "mymaster")
            states = [dict(zip(each[::2], each[1::2], strict=True)) for each in replicas]
            return [state[b"flags"] for state in states] == [b"slave"] * (NODES - 1)

        _until(known)


class ClusterStore(ReplicatedStore):
    """A cluster of three masters, each with a replica."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        ports = free_ports(4 * NODES)
        self._buses = dict(zip(ports[: 2 * NODES], ports[2 * NODES :], strict=True))

    @property
    def url(self) -> str:
        return "redis+cluster://" + ",".join(f"127.0.0.1:{port}" for port in self._buses)

    def master_of(self, session: str) -> int:
        slot = key_slot(f"{{default/{session}}}".encode())
        return next(ports[0] for first, last, ports in self._slots(next(iter(self._buses))) if first <= slot <= last)

    def fail_over(self, session: str) -> None:
        master = self.master_of(session)
        self._check_undisturbed(self._present_masters())
        _, _, (_, *replicas) = next(each for each in self._slots(master) if each[2][0] == master)
        self._kill(master, replicas)
        others = [port for port in self._buses if port != master]
        _until(lambda: role(replicas[0]) == "master" and all(map(self._is_complete, others)))
        self._start_node(master)
        _until(lambda: role(master) == "slave" and is_linked(master) and self._agree())
        self._masters = self._present_masters()

    def _start_node(self, port: int) -> None:
        timing = ("--cluster-node-timeout", DOWN_AFTER_MS, "--cluster-replica-validity-factor", 0)
        self._start(port, "--cluster-enabled", "yes", "--cluster-port", self._buses[port], *timing)

    def _start_all(self) -> None:
        for port in self._buses:
            self._start_node(port)
        nodes = list(self._buses)
        for number, port in enumerate(nodes[:NODES]):
            ask(port, "CLUSTER", "ADDSLOTSRANGE", number * 5462, min(16383, number * 5462 + 5461))
        for port, bus in self._buses.items():
            ask(nodes[0], "CLUSTER", "MEET", "127.0.0.1", port, bus)
        _until(lambda: all(map(self._is_complete, nodes)))
        for master, replica in zip(nodes[:NODES], nodes[NODES:], strict=True):
            ask(replica, "CLUSTER", "REPLICATE", ask(master, "CLUSTER", "MYID").decode())
        _until(lambda: all(map(is_linked, nodes[NODES:])) and self._agree())
        self._masters = self._present_masters()

    def _is_complete(self, port: int) -> bool:
        info = ask(port, "CLUSTER", "INFO").decode()
        return "cluster_state:ok" in info and f"cluster_known_nodes:{2 * NODES}" in info

    def _present_masters(self) -> list[int]:
        return sorted(ports[0] for _, _, ports in self._slots(next(iter(self._buses))))

    def _agree(self) -> bool:
        """Return whether all nodes know the cluster to be whole, and every range to have a master and a replica."""
        views = [self._slots(port) for port in self._buses]
        return all(map(self._is_complete, self._buses)) and all(
            len(view) == NODES and all(len(ports) == 2 for _, _, ports in view) for view in views
        )

    @staticmethod
    def _slots(port: int) -> list[tuple[int, int, list[int]]]:
        """Return the ranges of slots as a node knows them: first, last, and the ports of master and replicas."""
        ranges = ask(port, "CLUSTER", "SLOTS")
        return [(first, last, [node[1] for node in nodes]) for first, last, *nodes in ranges]


class Failover(Fault):
    """Kills the master that has a random client's session, and waits until the store is whole again."""

    def __init__(self, kind: str, store: ReplicatedStore) -> None:
        self.kind, self._store = f"failover ({kind})", store

    async def inject(self, run: Run) -> None:
        await run.pause(0.2, 1)
        session = run.random.choice(run.session_clients).history.name
        await asyncio.to_thread(self._store.fail_over, session)


def ask(port: int, *command: object) -> Any:
    """Return the reply of a node, in bytes and lists."""
    with Redis(port=port, socket_timeout=5, protocol=2) as client:
        client.response_callbacks.clear()
        return client.execute_command(*command)


def replication(port: int) -> dict[str, Any]:
    """Return what a node says about its replication."""
    with Redis(port=port, socket_timeout=5) as client:
        return cast(dict[str, Any], client.info("replication"))


def role(port: int) -> str:
    return str(replication(port)["role"])


def is_linked(port: int) -> bool:
    return replication(port).get("master_link_status") == "up"


def _until(condition: Callable[[], bool]) -> None:
    """Wait until the condition holds; a node that does not answer counts as false. Raises ContractViolation."""
    deadline = time.monotonic() + RECOVERY_S
    while time.monotonic() < deadline:
        with suppress(RedisError, StopIteration):
            if condition():
                return
        time.sleep(0.03)
    raise ContractViolation("the store's failover did not end")
