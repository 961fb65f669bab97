"""The dashboard to look at first: a few numbers, and panels of the other dashboards."""

from __future__ import annotations

from deploy.grafana.panels import ADAPTATION, NATS, SERVICE, STATE, Panel, gain, quantiles, rate, share_of_requests


def _named(title: str) -> Panel:
    """Return the panel with a title. Raises ValueError where the title is not unique."""
    (panel,) = [
        panel
        for dashboard in (SERVICE, ADAPTATION, STATE)
        for panels in dashboard.values()
        for panel in panels
        if panel.title == title
    ]
    return panel


OVERVIEW = {
    "Now": [
        Panel("Requests", "HTTP requests answered.", "reqps", {"all routes": rate("imprint_requests_total")}, "number"),
        Panel(
            "First token",
            "One in twenty completions waits longer for its first text.",
            "s",
            quantiles("imprint_time_to_first_token_seconds", 0.95),
            "number",
        ),
        Panel(
            "Tokens a second",
            "Generated, and learned.",
            "short",
            {"generated": rate("imprint_tokens_predicted_total"), "learned": rate("imprint_tokens_learned_total")},
            "number",
        ),
        Panel(
            "Queue", "Turns that wait for the engine.", "short", {"waiting": "sum(imprint_queue_depth{@})"}, "number"
        ),
        Panel("Gain", "What learning is worth, a token.", NATS, {"last hour": gain("[1h]")}, "number"),
        Panel(
            "Sessions",
            "On a device, and only in the store.",
            "short",
            {"hot": "sum(imprint_sessions_hot{@})", "cold": "max(imprint_sessions_cold{@})"},
            "number",
        ),
        Panel("Failures", "Share of all answers.", "percentunit", {"5xx": share_of_requests("5..")}, "number"),
        Panel("Store", "Memory that the store uses.", "bytes", {"used": "max(imprint_store_used_bytes{@})"}, "number"),
    ],
    "Lately": [
        _named("Time to first token"),
        _named("Between tokens"),
        _named("Tokens"),
        _named("In hand"),
        _named("Errors"),
        _named("Gain over time"),
        _named("Gain of sessions"),
        _named("Guards"),
        _named("Store latency"),
    ],
}
