"""The limits on connections: how large, how slow and how many they may be."""

from __future__ import annotations

import logging
import resource
import time
from dataclasses import dataclass, field
from typing import Literal, get_args

from service.metrics import Metrics
from service.settings import Settings

RESERVED_FILES = 256  # open files kept for everything but connections
LOG_EVERY_S = 10.0
Reason = Literal[  # for which the server ends a connection
    "head",
    "headers",
    "framing",
    "invalid HTTP",
    "head timeout",
    "body timeout",
    "a client that does not read",
    "room for others",
    "connections",
]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ConnectionLimits:
    """The limits on the connections of one server; `IMPRINT_*` settings of these names have the meanings."""

    max_connections: int = 2048
    max_head_bytes: int = 65_536
    max_headers: int = 100
    head_timeout_s: float = 10.0
    body_timeout_s: float = 120.0
    idle_timeout_s: float = 75.0
    send_timeout_s: float = 30.0

    @classmethod
    def of(cls, settings: Settings) -> ConnectionLimits:
        """Return the limits of the settings, with no more connections than the process may have open files."""
        _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        allowed = max(16, hard - RESERVED_FILES) if hard != resource.RLIM_INFINITY else settings.max_connections
        if allowed < settings.max_connections:
            log.warning("max_connections is %d: the process may have %d open files", allowed, hard)
        return cls(
            min(settings.max_connections, allowed),
            settings.max_head_bytes,
            settings.max_headers,
            settings.head_timeout_s,
            settings.body_timeout_s,
            settings.idle_timeout_s,
            settings.send_timeout_s,
        )


@dataclass
class ConnectionReport:
    """Counts and logs the connections that the server ends. A flood of them makes few log lines.

    Attributes:
        metrics: the metrics that count; None counts nothing.
    """

    metrics: Metrics | None = None
    _logged: dict[str, float] = field(default_factory=dict)
    _unlogged: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.metrics is not None:
            for reason in get_args(Reason):
                self.metrics.connections_ended_total.labels(reason)  # at 0, so that an alert sees the first one

    def opened(self, connections: int) -> None:
        """Set the number of open connections."""
        if self.metrics is not None:
            self.metrics.connections.set(connections)

    def ended(self, reason: Reason, client: object) -> None:
        """Count a connection that the server ended for `reason`, and log the first of each 10 seconds."""
        if self.metrics is not None:
            self.metrics.connections_ended_total.labels(reason).inc()
        self._unlogged[reason] = self._unlogged.get(reason, 0) + 1
        now = time.monotonic()
        if now - self._logged.get(reason, -LOG_EVERY_S) >= LOG_EVERY_S:
            number = self._unlogged.pop(reason)
            log.warning("connections ended: %d for %s, the last one of %s", number, reason, client)
            self._logged[reason] = now
