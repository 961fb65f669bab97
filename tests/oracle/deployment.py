"""The parts of a run: servers on a store, the faults that can hit them, and the clients."""

from __future__ import annotations

import asyncio
import random
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import httpx

from tests.clients import ContractViolation, SessionClient, SessionHistory
from tests.conftest import Server
from tests.oracle.result import Result

LEASE_S = 1.0
SEND_TIMEOUT_S = 2.0  # within which a client must read
RECOVERY_S = 240.0  # within which a deployment must have recovered from a fault; the machine may be busy


class Fault(ABC):
    """A kind of fault.

    Attributes:
        kind: name of the kind.
    """

    kind: str

    @abstractmethod
    async def inject(self, run: Run) -> None:
        """Inject the fault once, and return when the next fault of its lane may come.

        Raises:
            ContractViolation: the deployment did not bear the fault.
        """

    async def settle(self, run: Run) -> None:  # noqa: B027
        """Bring the deployment back into its usual state after the last fault."""


@dataclass
class Deployment:
    """Servers on a store, and the faults that can hit them.

    Attributes:
        name: for the report.
        servers: the replicas.
        store_of: returns the store that has a session: the data folder of an embedded store, or a URL.
        lanes: kinds of faults; those in one lane never overlap.
        timeout_s: seconds for which a client waits for an answer.
        num_clients: number of clients, each with a session of its own.
    """

    name: str
    servers: list[Server]
    store_of: Callable[[str], Path | str]
    lanes: Sequence[Sequence[Fault]]
    timeout_s: float = 20.0
    num_clients: int = 10

    @property
    def urls(self) -> list[str]:
        return [server.url for server in self.servers]


@dataclass
class Run:
    """The state of a run, for the faults.

    Attributes:
        deployment: what the faults hit.
        model: name of the served model.
        result: where counts and findings go.
        random: decides about the faults.
        session_clients: the clients that teach.
        histories: the records of other sessions, which the faults taught.
    """

    deployment: Deployment
    model: str
    result: Result
    random: random.Random
    session_clients: list[SessionClient] = field(default_factory=list)
    histories: list[SessionHistory] = field(default_factory=list)

    def new_client(self, name: str) -> SessionClient:
        deployment = self.deployment
        return SessionClient(name, deployment.urls, self.model, self.result.counts, timeout_s=deployment.timeout_s)

    async def pause(self, low_s: float, high_s: float) -> None:
        await asyncio.sleep(self.random.uniform(low_s, high_s))


async def wait_ready(url: str, expected: Mapping[str, str], watch: Callable[[], None] = lambda: None) -> None:
    """Wait until /readyz answers `expected`; call `watch` before each try. Raises ContractViolation."""
    deadline = time.monotonic() + RECOVERY_S
    async with httpx.AsyncClient(timeout=5, verify=False) as http:
        while time.monotonic() < deadline:
            watch()
            try:
                status = (await http.get(f"{url}/readyz")).json()
                if all(status.get(name) == value for name, value in expected.items()):
                    return
            except httpx.TransportError:
                pass
            await asyncio.sleep(0.1)
    raise ContractViolation(f"{url} is not {expected} within {RECOVERY_S:g} s")
