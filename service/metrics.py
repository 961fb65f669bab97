"""The server's Prometheus metrics.

Labels hold routes, statuses, error codes and fingerprints. No label names a session: there may be millions of sessions.
The meanings here are the page docs/metrics.md: `.venv/bin/python -m service.metrics` prints it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
)

PREFIX = "imprint_"
LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 600)
STEP_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
BYTE_BUCKETS = tuple(float(4**power) for power in range(5, 14))
EXPERIENCE_BUCKETS = (  # values of the label `learned`, each with the lowest number of learned rewards that it covers
    (1000, "1000+"),
    (100, "100-999"),
    (10, "10-99"),
    (0, "0-9"),
)
SEQUENCE_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
PROCESS_METRICS = (  # of prometheus_client, on systems that have /proc
    ("cpu_seconds_total", "counter", "CPU time of the server's process, in seconds."),
    ("resident_memory_bytes", "gauge", "Resident memory of the server's process."),
    ("virtual_memory_bytes", "gauge", "Virtual memory of the server's process."),
    ("start_time_seconds", "gauge", "Start time of the process, in seconds since 1970."),
    ("open_fds", "gauge", "Open file descriptors (files and connections)."),
    ("max_fds", "gauge", "File descriptors that the process may open."),
)
GAIN_BUCKETS = (-1.0, -0.5, -0.2, -0.1, -0.05, -0.02, 0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1.0, 1.5, 2.0)


@dataclass(frozen=True)
class MetricDescription:
    """One row of docs/metrics.md. A histogram's `name` has no ending such as `_bucket`."""

    name: str
    kind: str
    labels: tuple[str, ...]
    meaning: str


class Metrics:
    """All metrics of one server, in a registry of their own. Units: seconds, bytes, nats."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self.described: list[MetricDescription] = []
        self._requests()
        self._engine()
        self._learning()
        self._commits()
        self._policies()
        self._sessions()
        self._store()
        self._archive()
        self._server()
        self._process()

    def observe_rewards(
        self, policy: str, *, num_before: int, num_learned: int, reward_sum: float, regret: float
    ) -> None:
        """Count the rewards and labels that a policy turn learned.

        Args:
            policy: name of the policy.
            num_before: number of rewards and labels that the session had learned before the turn.
            num_learned: number of rewards and labels that the turn learned.
            reward_sum: sum of these rewards; a label counts 1 if the policy would have predicted it.
            regret: reward missed by the turn's actions, as far as the client reports it.
        """
        labels = (policy, next(name for low, name in EXPERIENCE_BUCKETS if num_before >= low))
        self.policy_rewards_total.labels(*labels).inc(num_learned)
        self.policy_reward_sum_total.labels(*labels).inc(max(0.0, reward_sum))
        self.policy_penalty_sum_total.labels(*labels).inc(max(0.0, -reward_sum))
        self.policy_regret_total.labels(*labels).inc(regret)

    def observe_decided(self, policy: str, decided: Sequence[tuple[bool, float]]) -> None:
        """Count the rewards of decisions, each with whether the control policy decided."""
        for held_out, reward in decided:
            labels = (policy, "control" if held_out else "policy")
            self.decision_rewards_total.labels(*labels).inc()
            self.decision_reward_sum_total.labels(*labels).inc(max(0.0, reward))
            self.decision_penalty_sum_total.labels(*labels).inc(max(0.0, -reward))
            self.decision_reward_squares_total.labels(*labels).inc(reward * reward)

    def _requests(self) -> None:
        self.requests_total = self._counter("requests_total", "HTTP requests answered.", ("route", "code"))
        self.errors_total = self._counter("errors_total", "Error responses, by error code.", ("code",))
        self.requests_in_flight = self._gauge(
            "requests_in_flight", "Requests under /v1, /api, /infill and /completion that are being answered now."
        )
        self.request_latency_seconds = self._histogram(
            "request_latency_seconds",
            "Time from a request's arrival to the end of its answer.",
            LATENCY_BUCKETS_S,
            ("route",),
        )
        self.time_to_first_token_seconds = self._histogram(
            "time_to_first_token_seconds",
            "Time from a request's arrival to the first text of its completion.",
            LATENCY_BUCKETS_S,
        )
        self.inter_token_latency_seconds = self._histogram(
            "inter_token_latency_seconds", "Time between two successive pieces of text of one choice.", STEP_BUCKETS_S
        )

    def _engine(self) -> None:
        self.queue_time_seconds = self._histogram(
            "queue_time_seconds",
            "Time from a turn's arrival at the engine to its first step. If it grows, the server is overloaded.",
            LATENCY_BUCKETS_S,
        )
        self.turns_in_flight = self._gauge(
            "turns_in_flight", "Turns that run or wait. At `IMPRINT_MAX_QUEUE`, further ones are refused."
        )
        self.queue_depth = self._gauge("queue_depth", "Turns that wait for the engine.")
        self.batch_size = self._histogram("batch_size", "Sequences decoded in one step.", SEQUENCE_BUCKETS)
        self.guessed_tokens_total = self._counter(
            "guessed_tokens_total",
            "Tokens guessed by prompt lookup, so that one step can decode several.",
        )
        self.guessed_rightly_total = self._counter(
            "guessed_rightly_total",
            "Guessed tokens that the model then produced. The share of guessed tokens is the acceptance rate.",
        )
        self.decisions_batch = self._histogram(
            "decisions_batch", "Sessions for which a policy decides in one step.", SEQUENCE_BUCKETS
        )
        self.engine_step_seconds = self._histogram(
            "engine_step_seconds",
            "Duration of one engine step, by kind: `prefill`, `decode`, or `decide` (policies).",
            STEP_BUCKETS_S,
            ("kind",),
        )
        self.kv_tokens_reserved = self._gauge(
            "kv_tokens_reserved", "Tokens reserved in the key/value caches. At the capacity, new turns wait."
        )
        self.kv_tokens_capacity = self._gauge(
            "kv_tokens_capacity", "Tokens that the key/value caches can hold (`IMPRINT_KV_TOKENS`)."
        )
        self.tokens_predicted_total = self._counter("tokens_predicted_total", "Tokens generated.")
        self.tokens_prefilled_total = self._counter("tokens_prefilled_total", "Prompt tokens processed.")
        self.episodes_recalled_total = self._counter(
            "episodes_recalled_total", "Episodes of their sessions that replies have read."
        )

    def _learning(self) -> None:
        self.tokens_learned_total = self._counter("tokens_learned_total", "Text tokens learned and committed.")
        self.rows_written_total = self._counter("rows_written_total", "Memory rows written and committed.")
        self.guards_shut_total = self._counter(
            "guards_shut_total", "Read gates of sessions that shut, because what they read had made predictions worse."
        )
        self.guards_opened_total = self._counter("guards_opened_total", "Read gates of sessions that opened again.")
        self.proof_tokens_total = self._counter(
            "proof_tokens_total", "Learned tokens that the frozen model scored as well (`IMPRINT_PROOF_RATE`)."
        )
        self.proof_loss_nats_total = self._counter(
            "proof_loss_nats_total", "Loss of the adapted model, summed over the proof tokens."
        )
        self.proof_frozen_loss_nats_total = self._counter(
            "proof_frozen_loss_nats_total", "Loss of the frozen model, summed over the proof tokens."
        )
        self.session_gain_nats_per_token = self._histogram(
            "session_gain_nats_per_token",
            "Mean gain of a session's memory since its creation, observed at each of its turns with proof tokens.",
            GAIN_BUCKETS,
        )

    def _commits(self) -> None:
        self.commit_seconds = self._histogram("commit_seconds", "Duration of one commit to the store.", STEP_BUCKETS_S)
        self.commit_bytes = self._histogram("commit_bytes", "Bytes of rows in one commit.", BYTE_BUCKETS)

    def _policies(self) -> None:
        self.policy_rewards_total = self._counter(
            "policy_rewards_total",
            "Rewards and labels learned, by policy and by the number of them that the session had learned before.",
            ("policy", "learned"),
        )
        self.policy_reward_sum_total = self._counter(
            "policy_reward_sum_total",
            "Sum of the positive rewards. A label counts 1 if the policy would have predicted it.",
            ("policy", "learned"),
        )
        self.policy_penalty_sum_total = self._counter(
            "policy_penalty_sum_total", "Sum of the absolute values of the negative rewards.", ("policy", "learned")
        )
        self.policy_regret_total = self._counter(
            "policy_regret_total", "Sum of the reward missed, as far as clients report it.", ("policy", "learned")
        )

        by = ("policy", "decided_by")
        self.decision_rewards_total = self._counter(
            "decision_rewards_total",
            "Rewards of learners' decisions, by who decided: `policy`, or `control` in the session's holdout.",
            by,
        )
        self.decision_reward_sum_total = self._counter(
            "decision_reward_sum_total", "Sum of the positive rewards among them.", by
        )
        self.decision_penalty_sum_total = self._counter(
            "decision_penalty_sum_total", "Sum of the absolute values of the negative rewards among them.", by
        )
        self.decision_reward_squares_total = self._counter(
            "decision_reward_squares_total", "Sum of the squares of the rewards: for intervals of their mean.", by
        )

    def _sessions(self) -> None:
        self.store_full_total = self._counter(
            "store_full_total", "Turns that learned nothing because the store was full. Free or add store memory."
        )
        self.replays_total = self._counter(
            "replays_total", "Requests answered with the remembered answer of an earlier attempt."
        )
        self.load_seconds = self._histogram(
            "load_seconds", "Duration of loading one session from the store.", STEP_BUCKETS_S
        )
        self.sessions_hot = self._gauge("sessions_hot", "Sessions whose fast weights are on the device.")
        self.sessions_cold = self._gauge("sessions_cold", "Sessions that are only in the store, or in the archive.")
        self.session_evictions_total = self._counter(
            "session_evictions_total",
            "Sessions dropped from the device to make room. If it grows steadily, raise `IMPRINT_HOT_ROWS` or"
            " `IMPRINT_HOT_SESSIONS`.",
        )
        self.hot_rows_ratio = self._gauge(
            "hot_rows_ratio", "Share of `IMPRINT_HOT_ROWS` that is in use, at the fullest site (0 to 1)."
        )
        self.lease_wait_seconds = self._histogram(
            "lease_wait_seconds",
            "Time from requesting a session's lease to having it; only with a shared Redis.",
            STEP_BUCKETS_S,
        )
        self.leases_held = self._gauge("leases_held", "Sessions that this server is teaching now, by lease.")
        self.turns_overtaken_total = self._counter(
            "turns_overtaken_total", "Commits refused because another replica had changed the session in the meantime."
        )

    def _store(self) -> None:
        self.store_up = self._gauge("store_up", "1 while the session store answers, else 0.")
        self.store_writable = self._gauge(
            "store_writable", "1 while the session store answers and takes writes, else 0 (its disk may be full)."
        )
        self.store_used_bytes = self._gauge("store_used_bytes", "Memory that the session store uses.")
        self.store_limit_bytes = self._gauge(
            "store_limit_bytes", "Memory that the session store may use; 0 = no limit."
        )
        self.store_evicts = self._gauge(
            "store_evicts",
            "1 if the session store may evict keys of sessions at its memory limit (`IMPRINT_ALLOW_EVICTION`), else 0.",
        )
        self.store_faults_total = self._counter(
            "store_faults_total",
            "Changes of sessions that happened although a later step failed: `unlisted` (a new session may be missing"
            " from the list until the list is restored) or `untold` (other servers were not told of an erasure).",
            ("fault",),
        )
        for fault in ("unlisted", "untold"):
            self.store_faults_total.labels(fault)  # an alert sees no increase of a series that begins with its fault
        self.sessions_relisted_total = self._counter(
            "sessions_relisted_total", "Sessions that the store had lost from the list and that are listed again."
        )

    def _archive(self) -> None:
        self.sessions_archived = self._gauge(
            "sessions_archived",
            "Sessions in the archive, as the server that last looked for idle ones has counted them.",
        )
        self.archived_total = self._counter("archived_total", "Sessions that this server has moved to the archive.")
        self.archive_returns_total = self._counter(
            "archive_returns_total", "Sessions that this server has brought back from the archive."
        )
        self.archive_seconds = self._histogram(
            "archive_seconds",
            "Time to move a session to the archive (`archive`), or to bring it back (`bring`).",
            STEP_BUCKETS_S,
            ("step",),
        )
        self.archive_failures_total = self._counter(
            "archive_failures_total",
            "Steps that failed: a session stays in the store (`archive`), its request is refused (`bring`), or a file"
            " that nobody needs stays until the next sweep (`remove`).",
            ("step",),
        )
        for step in ("archive", "bring", "remove"):
            self.archive_failures_total.labels(step)
        self.archive_orphans_total = self._counter(
            "archive_orphans_total",
            "Files without a session that were removed from the archive: of sessions that had expired, or of steps that"
            " failed.",
        )

    def report_archive(self, step: str, seconds: float) -> None:
        """Note one step of the archive: `archive`, `bring` or `remove`; with `_failed` behind it if the step failed."""
        if step.endswith("_failed"):
            self.archive_failures_total.labels(step.removesuffix("_failed")).inc()
        elif step != "remove":
            (self.archived_total if step == "archive" else self.archive_returns_total).inc()
            self.archive_seconds.labels(step).observe(seconds)

    def _server(self) -> None:
        self.background_restarts_total = self._counter(
            "background_restarts_total", "Background tasks that failed and were started again, by task.", ("task",)
        )
        self.connections = self._gauge("connections", "Open connections.")
        self.connections_ended_total = self._counter(
            "connections_ended_total",
            "Connections that the server ended: requests too large, too slow or invalid, clients that do not read, and"
            " those that waited while others needed room.",
            ("reason",),
        )
        self.ready_state = self._gauge("ready_state", "1 while the server takes requests, 0 while it loads or drains.")
        self.build_info = self._info(
            "build",
            ("version", "model", "base", "memory"),
            "Versions and fingerprints of what is served. Replicas of one store must agree.",
        )
        self.device_info = self._info("device", ("kind", "name"), "Device that runs the model.")
        self.device_memory_used_bytes = self._gauge(
            "device_memory_used_bytes", "Memory of that device in use, by all processes."
        )
        self.device_memory_bytes = self._gauge("device_memory_bytes", "Total memory of that device.")

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
    """Return the page docs/metrics.md."""
    rows = "\n".join(
        f"| `{metric.name}` | {metric.kind} | {', '.join(f'`{label}`' for label in metric.labels)} | {metric.meaning} |"
        for metric in Metrics().described
    )
    return f"""\
# Metrics

Printed by `.venv/bin/python -m service.metrics`; edit `service/metrics.py` instead of this page.

`GET /metrics` serves these metrics to Prometheus. Durations are in seconds, sizes in bytes, losses in nats.
No label names a session. `deploy/prometheus/alerts.yml` has the alerts, with what to do about each;
`/dashboard` shows them in the browser, `deploy/grafana` has the same panels for Grafana.

| name | kind | labels | meaning |
| --- | --- | --- | --- |
{rows}

The gain of learning over the last hour, in nats per token (above 0: the memory helps):

    (rate(imprint_proof_frozen_loss_nats_total[1h]) - rate(imprint_proof_loss_nats_total[1h]))
      / rate(imprint_proof_tokens_total[1h])
"""


if __name__ == "__main__":
    print(markdown(), end="")
