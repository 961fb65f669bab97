"""The server's Prometheus metrics. `python -m service.metrics` prints docs/metrics.md.

Labels hold routes, statuses, error codes and fingerprints, never a session: there may be millions of those.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
)

if TYPE_CHECKING:
    from service.engine.types import JobStats, PolicyRequest

PREFIX = "imprint_"
LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 600)
STEP_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
BYTE_BUCKETS = tuple(float(4**power) for power in range(5, 14))
EXPERIENCE_BUCKETS = (
    (1000, "1000+"),
    (100, "100-999"),
    (10, "10-99"),
    (0, "0-9"),
)  # rewards a session has learned, from
SEQUENCE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PROCESS_METRICS = (  # what prometheus_client tells of the process where there is a /proc
    ("cpu_seconds_total", "counter", "CPU time of the server's process."),
    ("resident_memory_bytes", "gauge", "Resident memory of the server's process."),
    ("virtual_memory_bytes", "gauge", "Virtual memory of the server's process."),
    ("start_time_seconds", "gauge", "When the process began, in seconds since 1970."),
    ("open_fds", "gauge", "Open files and connections."),
    ("max_fds", "gauge", "Files and connections that may be open."),
)
GAIN_BUCKETS = (-1.0, -0.5, -0.2, -0.1, -0.05, -0.02, 0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0)


@dataclass(frozen=True)
class MetricDescription:
    """One row of docs/metrics.md; `name` as it is exposed, without a histogram's endings."""

    name: str
    kind: str
    labels: tuple[str, ...]
    meaning: str


class Metrics:
    """All metrics of one server, in their own registry. Units: seconds, bytes, nats."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self.described: list[MetricDescription] = []
        self._requests()
        self._engine()
        self._learning()
        self._store()
        self._server()
        self._process()

    def _requests(self) -> None:
        self.requests_total = self._counter("requests_total", "HTTP requests answered.", ("route", "code"))
        self.errors_total = self._counter("errors_total", "Errors told to clients, by their code.", ("code",))
        self.requests_in_flight = self._gauge("requests_in_flight", "Requests under /v1 that are being answered.")
        self.request_latency_seconds = self._histogram(
            "request_latency_seconds",
            "From a request's arrival to the end of its answer.",
            LATENCY_BUCKETS_S,
            ("route",),
        )
        self.time_to_first_token_seconds = self._histogram(
            "time_to_first_token_seconds",
            "From a request's arrival to the first text of its completion.",
            LATENCY_BUCKETS_S,
        )
        self.inter_token_latency_seconds = self._histogram(
            "inter_token_latency_seconds", "Between two successive pieces of text of one choice.", STEP_BUCKETS_S
        )

    def _engine(self) -> None:
        self.queue_time_seconds = self._histogram(
            "queue_time_seconds", "From a turn's arrival at the engine to its first step.", LATENCY_BUCKETS_S
        )
        self.queue_depth = self._gauge("queue_depth", "Turns that wait for the engine.")
        self.batch_size = self._histogram("batch_size", "Sequences decoded in one step.", SEQUENCE_BUCKETS)
        self.guessed_tokens_total = self._counter(
            "guessed_tokens_total",
            "Tokens that were guessed from what the sequence said before, to decode several at once.",
        )
        self.guessed_rightly_total = self._counter("guessed_rightly_total", "Guessed tokens that were then drawn.")
        self.decisions_batch = self._histogram(
            "decisions_batch", "Sessions that a policy decides for in one step.", SEQUENCE_BUCKETS
        )
        self.engine_step_seconds = self._histogram(
            "engine_step_seconds",
            "Duration of one engine step: prefill, decode or (policies) decide.",
            STEP_BUCKETS_S,
            ("kind",),
        )
        self.kv_tokens_reserved = self._gauge("kv_tokens_reserved", "Tokens reserved in key/value caches.")
        self.kv_tokens_capacity = self._gauge("kv_tokens_capacity", "Tokens that the key/value caches may hold.")
        self.tokens_predicted_total = self._counter("tokens_predicted_total", "Tokens generated.")
        self.tokens_prefilled_total = self._counter("tokens_prefilled_total", "Prompt tokens read.")

    def _learning(self) -> None:
        self.tokens_learned_total = self._counter("tokens_learned_total", "Tokens learned and committed.")
        self.rows_written_total = self._counter("rows_written_total", "Memory rows written and committed.")
        self.guards_shut_total = self._counter(
            "guards_shut_total", "Sessions whose read gate shut, their memory having done harm."
        )
        self.guards_opened_total = self._counter("guards_opened_total", "Sessions whose read gate opened again.")
        self.proof_tokens_total = self._counter(
            "proof_tokens_total", "Tokens that the frozen model scored too, before they were learned."
        )
        self.proof_loss_nats_total = self._counter(
            "proof_loss_nats_total", "Loss of the adapted model, summed over the proof tokens."
        )
        self.proof_frozen_loss_nats_total = self._counter(
            "proof_frozen_loss_nats_total", "Loss of the frozen model, summed over the proof tokens."
        )
        self.session_gain_nats_per_token = self._histogram(
            "session_gain_nats_per_token",
            "What a session's memory has been worth so far; observed at each of its turns with proof tokens.",
            GAIN_BUCKETS,
        )

    def _store(self) -> None:
        self.commit_seconds = self._histogram("commit_seconds", "Duration of one commit to the store.", STEP_BUCKETS_S)
        self.commit_bytes = self._histogram("commit_bytes", "Bytes of rows in one commit.", BYTE_BUCKETS)
        self.policy_rewards_total = self._counter(
            "policy_rewards_total",
            "Rewards and labels learned, by how many the session had learned before.",
            ("policy", "learned"),
        )
        self.policy_reward_sum_total = self._counter(
            "policy_reward_sum_total",
            "The sum of positive rewards; a label counts 1 if the policy would have said it.",
            ("policy", "learned"),
        )
        self.policy_penalty_sum_total = self._counter(
            "policy_penalty_sum_total", "The sum of negative rewards, without their sign.", ("policy", "learned")
        )
        self.policy_regret_total = self._counter(
            "policy_regret_total", "Reward missed, where the client knows it and tells.", ("policy", "learned")
        )
        self.store_full_total = self._counter(
            "store_full_total", "Turns that learned nothing because the store had no room for it."
        )
        self.replays_total = self._counter("replays_total", "Requests answered with what they were answered before.")
        self.load_seconds = self._histogram(
            "load_seconds", "Duration of one load of a session from the store.", STEP_BUCKETS_S
        )
        self.sessions_hot = self._gauge("sessions_hot", "Sessions whose fast weights are in memory.")
        self.sessions_cold = self._gauge("sessions_cold", "Sessions that are only in the store.")
        self.session_evictions_total = self._counter(
            "session_evictions_total", "Sessions dropped from memory for others."
        )
        self.hot_rows_ratio = self._gauge(
            "hot_rows_ratio", "Share of the room for fast weights that is taken, of the fullest site."
        )
        self.lease_wait_seconds = self._histogram(
            "lease_wait_seconds",
            "From asking for a session's lease to having it; replicas on one Redis only.",
            STEP_BUCKETS_S,
        )
        self.leases_held = self._gauge("leases_held", "Sessions that this server is teaching, by lease.")
        self.turns_overtaken_total = self._counter(
            "turns_overtaken_total", "Commits refused because another replica had changed the session meanwhile."
        )
        self.store_up = self._gauge("store_up", "1 while the session store answers.")
        self.store_used_bytes = self._gauge("store_used_bytes", "Memory that the session store uses.")
        self.store_limit_bytes = self._gauge(
            "store_limit_bytes", "Memory that the session store may use; 0 = no limit."
        )

    def observe_rewards(self, policy_request: PolicyRequest, learned: int, stats: JobStats) -> None:
        """Counts what a deed taught a session; learned: rewards that it has learned, with those."""
        count = stats.tokens_learned
        labels = (policy_request.policy, next(name for least, name in EXPERIENCE_BUCKETS if learned - count >= least))
        self.policy_rewards_total.labels(*labels).inc(count)
        self.policy_reward_sum_total.labels(*labels).inc(max(0.0, stats.rewards))
        self.policy_penalty_sum_total.labels(*labels).inc(max(0.0, -stats.rewards))
        self.policy_regret_total.labels(*labels).inc(policy_request.regret)

    def _server(self) -> None:
        self.ready_state = self._gauge("ready_state", "1 while the server takes requests, 0 while it loads or drains.")
        self.connections = self._gauge("connections", "Open connections.")
        self.connections_ended_total = self._counter(
            "connections_ended_total",
            "Connections that the server ended: requests too large, too slow or invalid, clients that do not read, and"
            " those that waited while others needed room.",
            ("reason",),
        )
        self.build_info = self._info("build", ("version", "model", "base", "memory"), "What runs, with fingerprints.")
        self.device_info = self._info("device", ("kind", "name"), "Where the model runs.")
        self.device_memory_used_bytes = self._gauge(
            "device_memory_used_bytes", "Memory of that device in use, by whatever process."
        )
        self.device_memory_bytes = self._gauge("device_memory_bytes", "Memory of that device.")

    def _process(self) -> None:
        ProcessCollector(namespace=PREFIX.rstrip("_"), registry=self.registry)
        for name, kind, meaning in PROCESS_METRICS:
            self._describe(f"process_{name}", kind, (), meaning)

    def _counter(self, name: str, meaning: str, labels: tuple[str, ...] = ()) -> Counter:
        self._describe(name, "counter", labels, meaning)
        return Counter(PREFIX + name, meaning, labels, registry=self.registry)

    def _gauge(self, name: str, meaning: str) -> Gauge:
        self._describe(name, "gauge", (), meaning)
        return Gauge(PREFIX + name, meaning, registry=self.registry)

    def _info(self, name: str, labels: tuple[str, ...], meaning: str) -> Info:
        self._describe(f"{name}_info", "info", labels, meaning)
        return Info(PREFIX + name, meaning, registry=self.registry)

    def _histogram(self, name: str, meaning: str, buckets: Sequence[float], labels: tuple[str, ...] = ()) -> Histogram:
        self._describe(name, "histogram", labels, meaning)
        return Histogram(PREFIX + name, meaning, labels, buckets=buckets, registry=self.registry)

    def _describe(self, name: str, kind: str, labels: tuple[str, ...], meaning: str) -> None:
        self.described.append(MetricDescription(PREFIX + name, kind, labels, meaning))


def markdown() -> str:
    """The page docs/metrics.md."""
    rows = "\n".join(
        f"| `{one.name}` | {one.kind} | {', '.join(f'`{label}`' for label in one.labels)} | {one.meaning} |"
        for one in Metrics().described
    )
    return f"""\
# Metrics

Printed by `python -m service.metrics`; edit `service/metrics.py` instead of this page.

`GET /metrics` serves these to Prometheus. Durations are in seconds, sizes in bytes, losses in nats.
No label names a session.

| name | kind | labels | meaning |
| --- | --- | --- | --- |
{rows}

What learning is worth, in nats per token, over the last hour:

    (rate(imprint_proof_frozen_loss_nats_total[1h]) - rate(imprint_proof_loss_nats_total[1h]))
      / rate(imprint_proof_tokens_total[1h])
"""


if __name__ == "__main__":
    print(markdown(), end="")
