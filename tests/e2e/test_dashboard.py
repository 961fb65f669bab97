"""The dashboard in a real browser: it shows the server's metrics, and judges them by the rules that Prometheus has.

With IMPRINT_SHOTS=FOLDER the last test takes pictures of a busy server on the default base; docs/img has one of them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml
from playwright.sync_api import Locator, Page, Route, expect

from service.tenants import OPERATOR, new_key
from tests.browser import OpenPage, assert_accessible, button, shoot
from tests.conftest import Server
from tests.live import Client
from tests.tiny import TEXT

pytestmark = [pytest.mark.e2e, pytest.mark.refusals]
SHOT_S = 150  # for which a server is watched before its pictures are taken

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy" / "prometheus" / "alerts.yml"
DESCRIPTION = json.loads((files("service") / "playground" / "dashboard.json").read_text())
DAYS = yaml.safe_load((ROOT / "tests" / "deploy" / "alerts.yml").read_text())["tests"]
MINUTES = 120  # of a day in that file, one sample a minute
# Counters that grow evenly, gauges and a histogram, in promtool's notation, and what queries give after two hours.
SERIES = {
    'c_total{a="1", b="x"}': "0+60x120",
    'c_total{a="2", b="x"}': "0+30x120",
    'c_total{a="2", b="yy"}': "0+6x120",
    'd_total{a="1", b="x"}': "0+120x120",
    'gauge{a="1"}': "4x120",
    'gauge{a="2"}': "10x120",
    'limit{a="1"}': "0x120",
    'limit{a="2"}': "20x120",
    'h_bucket{le="0.5"}': "0+30x120",
    'h_bucket{le="1"}': "0+60x120",
    'h_bucket{le="2"}': "0+90x120",
    'h_bucket{le="+Inf"}': "0+120x120",
}
EXPECTED: dict[str, dict[str, float]] = {
    "sum(rate(c_total[5m]))": {"{}": 1.6},
    "sum by (b) (rate(c_total[1h]))": {'{b="x"}': 1.5, '{b="yy"}': 0.1},
    'sum by (a) (increase(c_total{b=~"y.*", a!="1"}[10m]))': {'{a="2"}': 60},
    'sum(rate(c_total{b!~"y+"}[5m])) * 60 - 30': {"{}": 60},
    "rate(c_total[5m]) / rate(d_total[5m])": {'{a="1", b="x"}': 0.5},
    '1 - sum(rate(c_total{a="1"}[5m])) / sum(rate(d_total[5m])) * 0.5': {"{}": 0.75},
    'sum(rate(c_total{b="none"}[5m])) or vector(0)': {"{}": 0},
    "gauge": {'gauge{a="1"}': 4, 'gauge{a="2"}': 10},
    "gauge > 5": {'gauge{a="2"}': 10},
    "gauge / (limit > 0) > 0.4": {'{a="2"}': 0.5},
    "gauge == 4 and limit == 0": {'gauge{a="1"}': 4},
    "gauge <= 4 or limit >= 20": {'gauge{a="1"}': 4, 'limit{a="2"}': 20},
    "max(gauge) + -1": {"{}": 9},
    "count by (a) (count by (a, b) (c_total)) > 1": {'{a="2"}': 2},
    "histogram_quantile(0.5, sum by (le) (rate(h_bucket[5m])))": {"{}": 1},
    "histogram_quantile(0.625, rate(h_bucket[5m]))": {"{}": 1.5},
    "histogram_quantile(0.125, rate(h_bucket[5m]))": {"{}": 0.25},
    "histogram_quantile(0.99, rate(h_bucket[5m]))": {"{}": 2},
}
EVALUATE = """async ([expositions, queries, limits]) => {
  const { Samples } = await import("/playground/samples.js");
  const { parse } = await import("/playground/promql.js");
  const names = expositions.flatMap((text) => text.match(/^\\w+/gm));
  const samples = new Samples({ names, shared: {}, maxSamples: 100, maxSeries: 100, ...limits });
  expositions.forEach((text, minute) => samples.add(60 * minute, text));
  const found = queries.map((query) => parse(query)(samples, 60).map(({ labels, value }) => [labels, value]));
  return { found, samples: samples.times.length, leftOut: samples.leftOut };
}"""
JUDGE = """async ([expositions, rules]) => {
  const { Samples } = await import("/playground/samples.js");
  const { Alerts } = await import("/playground/alerts.js");
  const place = document.createElement("div");
  const names = expositions.flatMap((text) => text.match(/^\\w+/gm));
  const samples = new Samples({ names, shared: {}, maxSamples: 100, maxSeries: 100 });
  const alerts = new Alerts(rules, place);
  expositions.forEach((text, minute) => {
    samples.add(60 * minute, text);
    alerts.sample(samples);
  });
  alerts.draw();
  return [...place.querySelectorAll(".alert.firing summary")].map((summary) => summary.textContent);
}"""


def values(notation: str) -> list[str]:
    """Return the values of a series in promtool's notation: `a+bxn` and `axn`."""
    found: list[str] = []
    for part in notation.split():
        start, step, repeats = re.fullmatch(r"(\d+)(?:\+(\d+))?x(\d+)", part).groups()  # type: ignore[union-attr]
        found += [str(int(start) + int(step or 0) * i) for i in range(int(repeats) + 1)]
    return found


def expositions(series: dict[str, str]) -> list[str]:
    """Return what a server with these series would answer, minute by minute."""
    columns = {name.replace(", ", ","): values(notation) for name, notation in series.items()}
    return [
        "\n".join(f"{name} {column[minute]}" for name, column in columns.items() if minute < len(column))
        for minute in range(MINUTES + 1)
    ]


def panel(page: Page, title: str) -> Locator:
    return page.get_by_role("figure", name=title, exact=True).locator("visible=true")


def alert(page: Page, name: str) -> Locator:
    return page.locator(".alert").filter(has=page.locator(".name").get_by_text(name, exact=True))


def teach(server: Server, session: str, key: str | None = None) -> None:
    """Send a request of each kind that the panels of the overview show, and one that fails."""
    with Client(server.url, key=key) as client:
        for _ in range(2):
            client.observe(session, TEXT)
            with client.stream(prompt=TEXT[:60], max_tokens=8, session=session) as chunks:
                list(chunks)
        assert client.post("completions", {"model": "tiny"}).status_code == 400


@pytest.fixture
def dashboard(open_page: OpenPage, server: Server) -> Page:
    """Return the dashboard of a server that has had requests since the page was opened."""
    page = open_page(server.url, "dashboard")
    expect(page.locator("#watch")).to_be_visible()
    teach(server, "watched")
    return page


def test_every_panel_shows_what_happened_since_the_page_was_opened(dashboard: Page) -> None:
    for title in ("Requests", "Tokens a second", "Gain", "Sessions", "Store"):
        expect(panel(dashboard, title)).to_contain_text(re.compile(r"[1-9]"))
    for title in ("Time to first token", "Errors", "Gain over time", "Store latency"):
        expect(panel(dashboard, title).locator("canvas")).to_have_count(1)
        expect(panel(dashboard, title).locator(".values")).to_contain_text(re.compile(r"\d"))
    expect(panel(dashboard, "Errors")).to_contain_text("invalid_request_error")
    expect(panel(dashboard, "Gain of sessions")).to_contain_text(re.compile(r"at or below 0, .* above"))
    for described in DESCRIPTION["dashboards"]:
        dashboard.get_by_role("link", name=described["title"], exact=True).click()
        for row in described["rows"]:
            for each in row["panels"]:
                expect(panel(dashboard, each["title"])).to_contain_text(each["description"])
    expect(panel(dashboard, "Devices")).to_contain_text(re.compile(r"^Devices1 cpu"))


def test_the_values_of_a_moment_are_read_with_the_keyboard(dashboard: Page) -> None:
    figure = panel(dashboard, "Tokens")
    chart = figure.locator(".chart")
    expect(figure.locator(".values b").first).to_have_text(re.compile(r"\d"))
    chart.focus()
    dashboard.keyboard.press("ArrowLeft")
    expect(figure.locator(".moment")).to_have_text(re.compile(r"^at \d\d:\d\d:\d\d$"))
    dashboard.keyboard.press("Escape")
    expect(figure.locator(".moment")).to_have_text("")


def test_the_dashboard_is_readable_in_the_dark_and_on_a_phone(dashboard: Page) -> None:
    expect(panel(dashboard, "Errors").locator("canvas")).to_have_count(1)
    dashboard.set_viewport_size({"width": 320, "height": 640})
    for scheme in ("dark", "light"):
        dashboard.get_by_label("Theme").select_option(scheme)
        dashboard.locator("#rules").evaluate("(rules, open) => { rules.open = open; }", scheme == "dark")
        assert_accessible(dashboard)
        for described in DESCRIPTION["dashboards"]:
            dashboard.get_by_role("link", name=described["title"], exact=True).click()
            assert dashboard.evaluate("document.documentElement.scrollWidth") == 320, described["title"]


def test_an_alert_shows_its_rule_and_what_to_do(dashboard: Page) -> None:
    expect(dashboard.locator("#verdict")).to_have_text("No alert fires.")
    dashboard.get_by_text("All rules, and what to do about each").click()
    assert dashboard.locator(".alert").count() == len(DESCRIPTION["alerts"])
    alert(dashboard, "Overloaded").locator("summary").click()
    expect(alert(dashboard, "Overloaded").get_by_text("What to do.")).to_be_visible()
    shown = dashboard.locator(".alert").all_text_contents()
    for rule, text in zip(DESCRIPTION["alerts"], shown, strict=True):
        for part in (rule["name"], f"severity {rule['severity']}", rule["query"], rule["runbook"]):
            assert part in text
    assert_accessible(dashboard)


def test_an_alert_that_fires_stands_open_before_all_others(dashboard: Page, server: Server) -> None:
    """A proxy tells the page of a store that is full, then of a server that is away."""

    def full(route: Route) -> None:
        text = route.fetch().text()
        route.fulfill(body=text.replace("imprint_store_full_total 0.0", "imprint_store_full_total 2.0"))

    dashboard.route("**/metrics", full)
    expect(dashboard.locator("#verdict")).to_have_text(f"1 of {len(DESCRIPTION['alerts'])} alerts fire.")
    place = dashboard.locator(".urgent .alert")
    expect(place).to_contain_text("Turns learn nothing because the session store is full.")
    expect(place).to_contain_text("Erase sessions")
    expect(place).to_have_attribute("open", "")
    assert_accessible(dashboard)
    dashboard.unroute("**/metrics")
    dashboard.route("**/metrics", lambda route: route.fulfill(status=503, body="away"))
    expect(dashboard.locator("#state")).to_contain_text("This page tries again by itself.")
    expect(alert(dashboard, "Down")).to_contain_text("does not answer Prometheus. For 0 min of 1 min.")
    dashboard.unroute("**/metrics")
    expect(dashboard.locator("#state")).to_have_text("")


def test_a_server_with_keys_is_watched_with_the_key_of_the_metrics(
    open_page: OpenPage, make_server: Callable[..., Server]
) -> None:
    (key, line), (metrics_key, metrics_line) = map(new_key, ("acme", OPERATOR))
    server = make_server(api_keys=f"{line},{metrics_line}").start()
    page = open_page(server.url, "dashboard")
    door = page.get_by_label("The key of the metrics")
    for wrong in ("", key):
        if wrong:
            door.fill(wrong)
            door.press("Enter")
        expect(page.locator("#state")).to_contain_text(re.compile("key", re.IGNORECASE))
        expect(page.locator("#watch")).to_be_hidden()
    assert_accessible(page)
    door.fill(metrics_key)
    door.press("Enter")
    expect(page.locator("#watch")).to_be_visible()
    expect(door).to_be_hidden()
    teach(server, "secret", key)
    expect(panel(page, "Gain")).to_contain_text(re.compile(r"\d"))
    page.reload()
    expect(page.locator("#watch")).to_be_visible()  # this tab remembers the key, and not as the key of the other pages
    page.goto(f"{server.url}/laboratory")
    expect(page.get_by_label("API key")).to_have_value("")


def test_a_paused_page_stands_still(dashboard: Page, server: Server) -> None:
    figure = panel(dashboard, "Tokens")
    expect(figure.locator(".values b").first).to_be_visible()
    button(dashboard, "Pause").click()
    with dashboard.expect_response("**/metrics"):
        pass
    shown = figure.locator(".values").text_content()
    teach(server, "paused")
    with dashboard.expect_response("**/metrics"):
        pass
    assert figure.locator(".values").text_content() == shown
    button(dashboard, "Go on").click()
    expect(figure.locator(".values")).not_to_have_text(shown or "")


def test_queries_give_what_prometheus_gives(open_page: OpenPage, server: Server, tmp_path: Path) -> None:
    page = open_page(server.url, "dashboard")
    result = page.evaluate(EVALUATE, [expositions(SERIES), list(EXPECTED), {}])
    for (query, wanted), found in zip(EXPECTED.items(), result["found"], strict=True):
        plain = {identity(labels): pytest.approx(value) for labels, value in wanted.items()}
        assert {json.dumps(labels, sort_keys=True): value for labels, value in found} == plain, query
    if shutil.which("promtool") is None:
        pytest.skip("promtool (Debian's package prometheus) is not installed")
    expressions = [
        {
            "expr": query,
            "eval_time": f"{MINUTES}m",
            "exp_samples": [{"labels": labels, "value": value} for labels, value in wanted.items()],
        }
        for query, wanted in EXPECTED.items()
    ]
    series = [{"series": name, "values": notation} for name, notation in SERIES.items()]
    tests = [{"interval": "1m", "input_series": series, "promql_expr_test": expressions}]
    (tmp_path / "tests.yml").write_text(yaml.safe_dump({"evaluation_interval": "1m", "tests": tests}))
    done = subprocess.run(["promtool", "test", "rules", tmp_path / "tests.yml"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def identity(labels: str) -> str:
    """Return labels as sorted JSON."""
    return json.dumps(dict(re.findall(r'(\w+)="([^"]*)"', labels)), sort_keys=True)


@pytest.mark.parametrize("day", DAYS, ids=["bad", "good"])
def test_the_page_judges_the_days_of_the_alerts_as_prometheus_does(
    open_page: OpenPage, server: Server, day: dict[str, Any]
) -> None:
    page = open_page(server.url, "dashboard")
    series = {each["series"]: str(each["values"]) for each in day["input_series"]}
    firing = page.evaluate(JUDGE, [expositions(series), DESCRIPTION["alerts"]])
    wanted = re.findall(r'alertname="Imprint(\w+)"', json.dumps(day["promql_expr_test"]).replace("\\", ""))
    assert len(firing) == len(wanted)
    for name in wanted:
        words = re.sub(r"(?<!^)([A-Z])", lambda letter: f" {letter[1].lower()}", name)
        (told,) = [text for text in firing if text.startswith(f"firing{words}")]
        assert "{{" not in told and len(told) > len(f"firing{words}")


def test_the_window_and_the_series_have_limits(open_page: OpenPage, server: Server) -> None:
    page = open_page(server.url, "dashboard")
    limits = {"maxSamples": 3, "maxSeries": 2}
    result = page.evaluate(EVALUATE, [expositions(SERIES), ["c_total", "rate(c_total[1h])"], limits])
    assert result["samples"] == 3 and result["leftOut"] == len(SERIES) - 2
    assert [[round(value, 3) for _, value in found] for found in result["found"]] == [[7200, 3600], [1, 0.5]]


@pytest.mark.parametrize(
    ("counts", "growth"),
    [
        (["c_total 5", "c_total 9", "c_total 2"], 6),  # the server was started again
        (["other 0", "c_total 3", "c_total 4"], 4),  # the first event makes a counter appear
        (["c_total 3"], None),
        (["other 0"], None),
    ],
)
def test_growth_counts_what_happened_while_the_page_looked(
    open_page: OpenPage, server: Server, counts: list[str], growth: float | None
) -> None:
    page = open_page(server.url, "dashboard")
    found = page.evaluate(EVALUATE, [counts, ["increase(c_total[1h])"], {}])["found"]
    assert found == [[] if growth is None else [[{}, growth]]]


@pytest.mark.real
@pytest.mark.skipif("IMPRINT_SHOTS" not in os.environ, reason="takes pictures only")
def test_pictures_are_taken_of_a_busy_server(open_page: OpenPage, real_server: Server) -> None:
    page = open_page(real_server.url, "dashboard")
    page.set_viewport_size({"width": 1280, "height": 960})
    page.emulate_media(color_scheme="light")
    paragraphs = (ROOT / "examples" / "keeper-1.txt").read_text().split("\n\n")
    end = time.monotonic() + SHOT_S
    with Client(real_server.url, model=real_server.model) as client:
        for turn in range(10_000):
            text = paragraphs[turn % len(paragraphs)]
            client.observe(f"reader-{turn % 5}", text)
            with client.stream(prompt=text[:200], max_tokens=24, session=f"reader-{turn % 5}") as chunks:
                list(chunks)
            if turn % 7 == 0:
                client.post("completions", {"model": "unknown"})
            page.wait_for_timeout(200)  # the page goes on reading meanwhile
            if time.monotonic() > end:
                break
    for name in ("overview", "adaptation"):
        page.goto(f"{real_server.url}/dashboard#{name}")
        page.wait_for_timeout(500)
        shoot(page, f"dashboard-{name}", whole=True)
    page.goto(f"{real_server.url}/dashboard#overview")
    shoot(page, "dashboard")
    page.emulate_media(color_scheme="dark")
    page.get_by_text("All rules, and what to do about each").click()
    alert(page, "Overloaded").locator("summary").click()
    shoot(page, "dashboard-dark")
    page.get_by_text("All rules, and what to do about each").click()
    page.set_viewport_size({"width": 390, "height": 844})
    page.wait_for_timeout(500)
    shoot(page, "dashboard-phone")
