"""Builds Grafana's dashboards with Grafana's SDK, and the data of the server's own dashboard, from the panels.

`python -m deploy.grafana.build` writes dashboards/*.json, and dashboard.json among the files of the server's page.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import yaml
from grafana_foundation_sdk.builders import common, dashboard, heatmap, prometheus, stat, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.common import BigValueTextMode, StackingMode
from grafana_foundation_sdk.models.dashboard import (
    DashboardCursorSync,
    DashboardLinkType,
    DataSourceRef,
    GridPos,
    VariableOption,
    VariableRefresh,
)
from grafana_foundation_sdk.models.prometheus import PromQueryFormat

from deploy.grafana.overview import OVERVIEW
from deploy.grafana.panels import ADAPTATION, DEVICE, SERVICE, STATE, Panel

FOLDER = Path(__file__).with_name("dashboards")
RULES = Path(__file__).parents[1] / "prometheus" / "alerts.yml"
PAGE = Path(__file__).parents[2] / "service" / "playground" / "dashboard.json"
SOURCE = DataSourceRef(type_val="prometheus", uid="${source}")
PANEL_HEIGHT, DASHBOARD_WIDTH = 8, 24  # in Grafana's grid units
MAX_PANELS_PER_ROW = 4
INSTANCE_FILTER = 'job=~"$job", instance=~"$instance"'

DASHBOARDS = {
    "overview": ("Imprint: overview", "What to look at first.", OVERVIEW),
    "service": ("Imprint: service", "Latencies, tokens, queue, batch and errors.", SERVICE),
    "adaptation": ("Imprint: adaptation", "Whether learning helps, whom, and how much is written.", ADAPTATION),
    "state": ("Imprint: state", "Sessions, the store and the leases on it.", STATE),
    "device": ("Imprint: device", "What runs where, and how busy it is.", DEVICE),
}


def promql(query: str) -> str:
    """Return the PromQL that Grafana sends, with Grafana's variables in place of `@` and `[]`."""
    return query.replace("@", INSTANCE_FILTER).replace("[]", "[$__rate_interval]")


def build_dashboard(title: str, description: str, rows: Mapping[str, list[Panel]]) -> dashboard.Dashboard:
    """Return a dashboard with choices of the source, the job and the instances at the top."""
    name = title.lower().replace(": ", "-")
    links = dashboard.DashboardLink("Imprint").type(DashboardLinkType.DASHBOARDS).tags(["imprint"]).keep_time(True)
    board = (
        dashboard.Dashboard(title)
        .uid(name)
        .description(description)
        .tags(["imprint"])
        .link(links.include_vars(True))
        .refresh("30s")
        .time("now-1h", "now")
        .tooltip(DashboardCursorSync.CROSSHAIR)
        .with_variable(dashboard.DatasourceVariable("source").label("Source").type("prometheus"))
        .with_variable(_label_variable("job", "imprint_ready_state"))
        .with_variable(_label_variable("instance", 'imprint_ready_state{job=~"$job"}'))
    )
    y, numbers = 0, count(1)
    for row, panels in rows.items():
        row_position = GridPos(h=1, w=DASHBOARD_WIDTH, x=0, y=y)
        board = board.with_row(dashboard.Row(row).id(next(numbers)).grid_pos(row_position))
        width = DASHBOARD_WIDTH // min(len(panels), MAX_PANELS_PER_ROW)
        for number, panel in enumerate(panels):
            line, column = divmod(number, DASHBOARD_WIDTH // width)
            position = GridPos(h=PANEL_HEIGHT, w=width, x=column * width, y=y + 1 + line * PANEL_HEIGHT)
            board = board.with_panel(_panel(panel, next(numbers)).grid_pos(position))
        y += 1 + PANEL_HEIGHT * -(-len(panels) // (DASHBOARD_WIDTH // width))
    return board


def _label_variable(label: str, metric: str) -> dashboard.QueryVariable:
    """Return a variable with the values of a label of a metric."""
    return (
        dashboard.QueryVariable(label)
        .label(label.capitalize())
        .datasource(SOURCE)
        .query(f"label_values({metric}, {label})")
        .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        .include_all(True)
        .multi(True)
        .current(VariableOption(selected=True, text="All", value="$__all"))
    )


def _panel(panel: Panel, number: int) -> timeseries.Panel | stat.Panel | heatmap.Panel:
    """Return the Grafana panel of a panel description."""
    built: timeseries.Panel | stat.Panel | heatmap.Panel
    match panel.kind:
        case "number":
            last = common.ReduceDataOptions().calcs(["lastNotNull"])
            built = stat.Panel().reduce_options(last).text_mode(BigValueTextMode.VALUE_AND_NAME)
        case "distribution":
            built = heatmap.Panel().y_axis(heatmap.YAxisConfig().unit(panel.unit))
        case "graph":
            built = timeseries.Panel()
        case "stack":
            built = timeseries.Panel().stacking(common.StackingConfig().mode(StackingMode.NORMAL)).fill_opacity(20)
    built = built.title(panel.title).description(panel.description).unit(panel.unit).datasource(SOURCE).id(number)
    for letter, (legend, query) in zip(ascii_uppercase, panel.queries.items(), strict=False):
        target = prometheus.Dataquery().ref_id(letter).expr(promql(query)).legend_format(legend)
        if panel.kind == "number":
            target = target.instant()
        if panel.kind == "distribution":
            target = target.format(PromQueryFormat.HEATMAP)
        built = built.with_target(target)
    return built


def page() -> dict[str, Any]:
    """Return the dashboards and the alerts as the server's own page reads them.

    The page knows one server: no query filters instances, and no legend names one.
    """
    return {
        "dashboards": [
            {
                "id": name,
                "title": title.removeprefix("Imprint: ").capitalize(),
                "description": description,
                "rows": [{"title": row, "panels": list(map(_page_panel, panels))} for row, panels in rows.items()],
            }
            for name, (title, description, rows) in DASHBOARDS.items()
        ],
        "alerts": [
            {"name": rule["alert"], "query": rule["expr"], "for": rule.get("for", "0m")}
            | rule["labels"]
            | rule["annotations"]
            for group in yaml.safe_load(RULES.read_text())["groups"]
            for rule in group["rules"]
        ],
    }


def _page_panel(panel: Panel) -> dict[str, Any]:
    return {
        "title": panel.title,
        "description": panel.description,
        "unit": panel.unit,
        "kind": panel.kind,
        "queries": {
            re.sub(r"(, )?\{\{instance\}\}", "", legend): re.sub(r"@(, )?", "", query).replace("{}", "")
            for legend, query in panel.queries.items()
        },
    }


def files() -> dict[Path, str]:
    """Return the content of each generated file."""
    encoder = JSONEncoder(sort_keys=True, indent=2)
    built = {
        FOLDER / f"{name}.json": encoder.encode(build_dashboard(*parts).build()) for name, parts in DASHBOARDS.items()
    }
    return {path: f"{text}\n" for path, text in (built | {PAGE: json.dumps(page(), indent=1)}).items()}


if __name__ == "__main__":
    for path, text in files().items():
        path.write_text(text)
