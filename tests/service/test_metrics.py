"""The metrics: Prometheus can read them, docs/metrics.md is up to date, and no label names a session."""

from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from service import metrics

PAGE = Path(__file__).parents[2] / "docs" / "metrics.md"


def samples(server: Any) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    exposition = httpx.get(f"{server.url}/metrics").text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(exposition)
        for sample in family.samples
    }


def test_the_page_is_what_the_module_prints() -> None:
    assert PAGE.read_text() == metrics.markdown(), "run: python -m service.metrics > docs/metrics.md"


def test_the_page_lists_what_the_registry_holds() -> None:
    described = {metric.name.removesuffix("_total").removesuffix("_info") for metric in metrics.Metrics().described}
    registered = {family.name for family in metrics.Metrics().registry.collect()}
    assert described == registered
    assert all(name.startswith("imprint_") for name in registered)


def test_the_exposition_has_prometheus_content_types(server: Any) -> None:
    plain = httpx.get(f"{server.url}/metrics")
    assert plain.headers["content-type"].startswith("text/plain; version=0.0.4")
    openmetrics = httpx.get(f"{server.url}/metrics", headers={"Accept": "application/openmetrics-text"})
    assert openmetrics.headers["content-type"].startswith("application/openmetrics-text")
    assert openmetrics.text.endswith("# EOF\n")


def test_requests_are_counted_by_route_and_status(server: Any) -> None:
    before = samples(server)
    body = {"model": server.model, "prompt": "hi", "max_tokens": 4, "session": "metrics-session"}
    assert httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).status_code == 200
    assert httpx.post(f"{server.url}/v1/completions", json=body | {"n": 0}).status_code == 400
    assert httpx.get(f"{server.url}/v1/sessions/metrics-session").status_code == 200
    assert httpx.get(f"{server.url}/no/such/metrics-session").status_code == 404
    after = samples(server)

    def increase(name: str, **labels: str) -> float:
        key = (f"imprint_{name}", tuple(sorted(labels.items())))
        return after[key] - before.get(key, 0.0)

    assert increase("requests_total", route="/v1/completions", code="200") == 1
    assert increase("requests_total", route="/v1/completions", code="400") == 1
    assert increase("requests_total", route="/v1/sessions/{id}", code="200") == 1
    assert increase("requests_total", route="unmatched", code="404") == 1
    assert increase("errors_total", code="invalid_request_error") == 1
    assert increase("request_latency_seconds_count", route="/v1/completions") == 2
    assert increase("time_to_first_token_seconds_count") == 1
    assert after["imprint_requests_in_flight", ()] == 0
    assert after["imprint_ready_state", ()] == 1
    assert not [labels for _, labels in after if "metrics-session" in str(labels)]
