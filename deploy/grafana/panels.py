"""The panels of the dashboards by row: title, description, unit, and queries by legend.

`build` makes of them what Grafana reads and what the server's own dashboard reads, which evaluates the same queries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

NATS = "suffix: nats"


@dataclass(frozen=True)
class Panel:
    """One panel of a dashboard.

    queries: PromQL by legend; `@` stands for the filter of the chosen instances, `[]` for Grafana's rate interval
    unit: Grafana's name of the unit
    """

    title: str
    description: str
    unit: str
    queries: Mapping[str, str]
    kind: Literal["graph", "stack", "number", "distribution"] = "graph"


def rate(metric: str, where: str = "") -> str:
    """Return the query of a counter's rate per second, summed over instances."""
    return f"sum(rate({metric}{{@{where}}}[]))"


def ratio(numerator: str, denominator: str) -> str:
    """Return the query of one counter's rate ÷ another's."""
    return f"{rate(numerator)} / {rate(denominator)}"


def share_of_requests(status: str) -> str:
    """Return the query of the share of all answers with a status of the pattern; 0 without such answers."""
    matching = rate("imprint_requests_total", f', code=~"{status}"')
    return f"({matching} or vector(0)) / {rate('imprint_requests_total')}"


def quantiles(metric: str, *shares: float, by: str = "") -> dict[str, str]:
    """Return the queries of quantiles of a histogram over all instances, optionally by a label."""
    labels = f"le, {by}" if by else "le"
    legend = f" {{{{{by}}}}}" if by else ""
    return {
        f"p{100 * share:g}{legend}": f"histogram_quantile({share}, sum by ({labels}) (rate({metric}_bucket{{@}}[])))"
        for share in shares
    }


def policy_rate(counter: str) -> str:
    """Return the query of a policy counter's rate, by policy and by the number of rewards learned before."""
    return f"sum by (policy, learned) (rate(imprint_policy_{counter}_total{{@}}[]))"


def gain(window: str) -> str:
    """Return the query of the memory's gain in nats per token, over the proof tokens of a range."""
    sums = [
        f"sum(rate(imprint_proof_{name}_total{{@}}{window}))" for name in ("frozen_loss_nats", "loss_nats", "tokens")
    ]
    return f"({sums[0]} - {sums[1]}) / {sums[2]}"


def decided(counter: str, by: str) -> str:
    """Return the query of a counter of decisions over an hour, by policy; by: `policy` or `control`."""
    return f'sum by (policy) (increase(imprint_decision_{counter}_total{{@, decided_by="{by}"}}[1h]))'


def mean_reward(by: str) -> str:
    """Return the query of the mean reward of decisions."""
    return f"(({decided('reward_sum', by)} - {decided('penalty_sum', by)}) / {decided('rewards', by)})"


def squared_error(by: str) -> str:
    """Return the query of the square of the standard error of that mean."""
    mean, number = mean_reward(by), decided("rewards", by)
    return f"(({decided('reward_squares', by)} / {number} - {mean} * {mean}) / {number})"


LIFT = f"({mean_reward('policy')} - {mean_reward('control')})"
LIFT_MARGIN = f"1.96 * sqrt({squared_error('policy')} + {squared_error('control')})"

SERVICE = {
    "Requests": [
        Panel(
            "Requests",
            "HTTP requests answered, by route.",
            "reqps",
            {"{{route}}": "sum by (route) (rate(imprint_requests_total{@}[]))"},
            "stack",
        ),
        Panel(
            "Errors",
            "Errors told to clients, by their code. 429s mean too much load, 503s a store or a server that is away.",
            "reqps",
            {"{{code}}": "sum by (code) (rate(imprint_errors_total{@}[]))"},
            "stack",
        ),
        Panel(
            "Answers that failed",
            "Share of all answers that were a 5xx or a 429.",
            "percentunit",
            {"5xx": share_of_requests("5.."), "429": share_of_requests("429")},
        ),
    ],
    "Latency": [
        Panel(
            "Time to first token",
            "From a request's arrival to the first text of its completion.",
            "s",
            quantiles("imprint_time_to_first_token_seconds", 0.5, 0.95, 0.99),
        ),
        Panel(
            "Between tokens",
            "Between two successive pieces of text of one choice.",
            "s",
            quantiles("imprint_inter_token_latency_seconds", 0.5, 0.95, 0.99),
        ),
        Panel(
            "Whole requests, p95",
            "From arrival to the end of the answer, by route.",
            "s",
            quantiles("imprint_request_latency_seconds", 0.95, by="route"),
        ),
    ],
    "Load": [
        Panel(
            "Tokens",
            "Tokens read, generated and learned. What fails is not counted.",
            "short",
            {
                "read": rate("imprint_tokens_prefilled_total"),
                "generated": rate("imprint_tokens_predicted_total"),
                "learned": rate("imprint_tokens_learned_total"),
            },
        ),
        Panel(
            "In hand",
            "Requests being answered, and those of them that wait for the engine. The autoscaler looks at the first.",
            "short",
            {
                "in flight, {{instance}}": "imprint_requests_in_flight{@}",
                "waiting, {{instance}}": "imprint_queue_depth{@}",
            },
        ),
        Panel(
            "Wait for the engine",
            "From a turn's arrival at the engine to its first step.",
            "s",
            quantiles("imprint_queue_time_seconds", 0.5, 0.95),
        ),
        Panel(
            "Sequences in a step",
            "How many sequences one decoding step serves: the batch.",
            "short",
            quantiles("imprint_batch_size", 0.5, 0.95)
            | {"mean": ratio("imprint_batch_size_sum", "imprint_batch_size_count")},
        ),
    ],
    "Connections": [
        Panel(
            "Connections",
            "Open connections of each server.",
            "short",
            {"{{instance}}": "imprint_connections{@}"},
            "stack",
        ),
        Panel(
            "Connections ended",
            "Connections that the server ended because they broke a limit, or because others needed room, by reason.",
            "ops",
            {"{{reason}}": "sum by (reason) (rate(imprint_connections_ended_total{@}[]))"},
            "stack",
        ),
    ],
}

ADAPTATION = {
    "What learning is worth": [
        Panel(
            "Gain, last hour",
            "By how much sessions predict a token of their text better than the frozen base, each scored before it is "
            "learned. Below zero, learning does harm.",
            NATS,
            {"gain": gain("[1h]")},
            "number",
        ),
        Panel("Gain over time", "The same at each moment: above zero, learning helps.", NATS, {"gain": gain("[]")}),
        Panel(
            "Loss, adapted and frozen",
            "Per proof token, with the sessions' memories and without.",
            NATS,
            {
                "adapted": ratio("imprint_proof_loss_nats_total", "imprint_proof_tokens_total"),
                "frozen": ratio("imprint_proof_frozen_loss_nats_total", "imprint_proof_tokens_total"),
            },
        ),
    ],
    "Over sessions": [
        Panel(
            "Gain of sessions",
            "What sessions' memories have been worth so far, a token; a session counts at each of its learning turns.",
            NATS,
            {"{{le}}": "sum by (le) (increase(imprint_session_gain_nats_per_token_bucket{@}[]))"},
            "distribution",
        ),
        Panel(
            "Quantiles over sessions",
            "The same as lines. The tenth percentile below zero: a tenth of the learning is in sessions that it harms.",
            NATS,
            quantiles("imprint_session_gain_nats_per_token", 0.1, 0.5, 0.9),
        ),
        Panel(
            "Learning in sessions that gain",
            "Share of the learning turns whose session's memory has been worth something so far.",
            "percentunit",
            {
                "gaining": '1 - sum(rate(imprint_session_gain_nats_per_token_bucket{@, le=~"0(.0)?"}[])) '
                "/ sum(rate(imprint_session_gain_nats_per_token_count{@}[]))"
            },
        ),
    ],
    "What is written": [
        Panel(
            "Tokens learned",
            "Tokens learned and committed.",
            "short",
            {"{{instance}}": "sum by (instance) (rate(imprint_tokens_learned_total{@}[]))"},
            "stack",
        ),
        Panel(
            "Rows written", "Memory rows written and committed.", "short", {"rows": rate("imprint_rows_written_total")}
        ),
        Panel(
            "Rows per token",
            "Fewer where more was expected: what the mixture knows is not written.",
            "short",
            {"rows per token": ratio("imprint_rows_written_total", "imprint_tokens_learned_total")},
        ),
        Panel(
            "Guards",
            "Sessions whose read gate was shut, their memory having done harm, and opened again, per hour.",
            "short",
            {
                "shut": rate("imprint_guards_shut_total") + " * 3600",
                "opened": rate("imprint_guards_opened_total") + " * 3600",
            },
        ),
        Panel(
            "Repetitions and refusals",
            "Requests answered with what they were answered before, and turns that a full store could not take.",
            "reqps",
            {"replays": rate("imprint_replays_total"), "store full": rate("imprint_store_full_total")},
        ),
    ],
    "Policies": [
        Panel(
            "Reward",
            "Mean, by how many the session had learned before: a learning curve. Of labels: the share foreseen.",
            "short",
            {
                "{{policy}}, after {{learned}}": f"({policy_rate('reward_sum')} - "
                f"{policy_rate('penalty_sum')}) / {policy_rate('rewards')}"
            },
        ),
        Panel(
            "Regret",
            "Reward missed for each that was had, as far as clients know and tell it.",
            "short",
            {"{{policy}}, after {{learned}}": f"{policy_rate('regret')} / {policy_rate('rewards')}"},
        ),
        Panel(
            "Rewards",
            "Rewards and labels learned.",
            "ops",
            {"{{policy}}, after {{learned}}": policy_rate("rewards")},
        ),
    ],
    "Decisions": [
        Panel(
            "Lift",
            "Mean reward of the policy less that of the control in the holdout, over an hour, with its 95% interval.",
            "short",
            {
                "{{policy}}": LIFT,
                "{{policy}}, at least": f"{LIFT} - {LIFT_MARGIN}",
                "{{policy}}, at most": f"{LIFT} + {LIFT_MARGIN}",
            },
        ),
        Panel(
            "Reward by who decided",
            "Mean reward over an hour: of the policy, and of the control in the holdout.",
            "short",
            {"{{policy}}": mean_reward("policy"), "{{policy}}, control": mean_reward("control")},
        ),
    ],
}

STATE = {
    "Sessions": [
        Panel(
            "Hot sessions",
            "Sessions whose fast weights are on a server's device.",
            "short",
            {"{{instance}}": "imprint_sessions_hot{@}"},
            "stack",
        ),
        Panel(
            "Cold sessions",
            "Sessions that are only in the store, as the server that knows of most sees it.",
            "short",
            {"cold": "max(imprint_sessions_cold{@})"},
        ),
        Panel(
            "Room for fast weights",
            "Share of the rows on each device that is taken.",
            "percentunit",
            {"taken, {{instance}}": "imprint_hot_rows_ratio{@}"},
        ),
        Panel(
            "Evictions and loads",
            "Sessions dropped from devices for others, and sessions read from the store.",
            "ops",
            {"evictions": rate("imprint_session_evictions_total"), "loads": rate("imprint_load_seconds_count")},
        ),
    ],
    "Store": [
        Panel(
            "Commits",
            "Turns committed to the store, and the bytes of rows in them.",
            "ops",
            {"commits": rate("imprint_commit_seconds_count")},
        ),
        Panel(
            "Bytes committed",
            "Bytes of rows, without the log and the answers.",
            "Bps",
            {"rows": rate("imprint_commit_bytes_sum")},
        ),
        Panel(
            "Store latency",
            "Duration of one commit, fsync included where the store does that, and of one load of a session.",
            "s",
            {
                f"{what} {quantile}": query
                for what in ("commit", "load")
                for quantile, query in quantiles(f"imprint_{what}_seconds", 0.5, 0.99).items()
            },
        ),
        Panel(
            "Memory of the store",
            "What the store uses and, where it has a limit, may use. At the limit nothing more is learned.",
            "bytes",
            {"used": "max(imprint_store_used_bytes{@})", "limit": "max(imprint_store_limit_bytes{@}) > 0"},
        ),
        Panel(
            "Store answers", "1 while each server reaches the store.", "short", {"{{instance}}": "imprint_store_up{@}"}
        ),
        Panel(
            "Store at fault",
            "1 if the store may evict keys; sessions an hour that the list had lost; changes an hour of which a "
            "later step failed.",
            "short",
            {
                "may evict, {{instance}}": "imprint_store_evicts{@}",
                "listed again": rate("imprint_sessions_relisted_total") + " * 3600",
                "{{fault}}": "sum by (fault) (rate(imprint_store_faults_total{@}[])) * 3600",
            },
        ),
        Panel(
            "Archive",
            "Idle sessions in the archive; sessions an hour that went there and came back; steps an hour that failed.",
            "short",
            {
                "archived": "max(imprint_sessions_archived{@})",
                "to the archive": rate("imprint_archived_total") + " * 3600",
                "back": rate("imprint_archive_returns_total") + " * 3600",
                "failed: {{step}}": "sum by (step) (rate(imprint_archive_failures_total{@}[])) * 3600",
            },
        ),
    ],
    "Leases": [
        Panel(
            "Leases held",
            "Sessions that each server is teaching at this moment. An embedded store needs no leases.",
            "short",
            {"{{instance}}": "imprint_leases_held{@}"},
            "stack",
        ),
        Panel(
            "Wait for a lease",
            "Long where another server teaches the same session.",
            "s",
            quantiles("imprint_lease_wait_seconds", 0.5, 0.99),
        ),
        Panel(
            "Overtaken turns",
            "Commits refused because another server had taken the session over. They were run again or told as 409.",
            "ops",
            {"overtaken": rate("imprint_turns_overtaken_total")},
        ),
    ],
}

DEVICE = {
    "What runs": [
        Panel(
            "Versions and fingerprints",
            "Servers by what they run. Those of one store must have the same base and memory.",
            "short",
            {
                "{{version}} · {{model}} · base {{base}} · memory {{memory}}": (
                    "count by (version, model, base, memory) (imprint_build_info{@})"
                )
            },
            "number",
        ),
        Panel(
            "Devices",
            "Servers by where the model runs.",
            "short",
            {"{{kind}} {{name}}": "count by (kind, name) (imprint_device_info{@})"},
            "number",
        ),
        Panel(
            "Ready",
            "1 while a server takes requests, 0 while it loads or drains.",
            "short",
            {"{{instance}}": "imprint_ready_state{@}"},
        ),
        Panel(
            "Background tasks started again",
            "Restarts an hour, by task. Each has a traceback in the log.",
            "short",
            {"{{task}}": "sum by (task) (rate(imprint_background_restarts_total{@}[])) * 3600"},
        ),
    ],
    "Engine": [
        Panel(
            "Time at work",
            "Share of the time that the engine spends on blocks (reading and learning) and on decoding.",
            "percentunit",
            {"{{kind}}, {{instance}}": "sum by (instance, kind) (rate(imprint_engine_step_seconds_sum{@}[]))"},
            "stack",
        ),
        Panel(
            "Steps", "Duration of one engine step.", "s", quantiles("imprint_engine_step_seconds", 0.5, 0.99, by="kind")
        ),
        Panel(
            "Key-value caches",
            "Share of the caches' tokens that is reserved. At 1 new requests wait.",
            "percentunit",
            {"{{instance}}": "imprint_kv_tokens_reserved{@} / imprint_kv_tokens_capacity{@}"},
        ),
    ],
    "Machine": [
        Panel(
            "Device memory",
            "In use by whatever process: of the GPU, or of the machine where the model runs on CPUs.",
            "bytes",
            {
                "used, {{instance}}": "imprint_device_memory_used_bytes{@}",
                "all, {{instance}}": "imprint_device_memory_bytes{@}",
            },
        ),
        Panel(
            "Process memory",
            "Resident memory of each server.",
            "bytes",
            {"{{instance}}": "imprint_process_resident_memory_bytes{@}"},
        ),
        Panel(
            "CPU",
            "CPU seconds per second: cores at work.",
            "short",
            {"{{instance}}": "rate(imprint_process_cpu_seconds_total{@}[])"},
        ),
        Panel(
            "Files and connections",
            "Share of those that may be open.",
            "percentunit",
            {"{{instance}}": "imprint_process_open_fds{@} / imprint_process_max_fds{@}"},
        ),
    ],
}
