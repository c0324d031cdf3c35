"""`shoestring grafana`: the Grafana dashboard of what `launch.prometheus_port` exports, made from the exporter's own table of metrics."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..train.metrics import replace_file
from ..train.sinks.exported import METRICS, Metric

SCHEMA = 39  # of Grafana 11
UID = "shoestring-runs"
COLUMNS, HEIGHT = 24, 8
PUBLISHED = 1540  # tokens/s of each H800, DeepSeek-V3's pre-training (arXiv 2412.19437)
_RUN = '{run=~"$run"}'
_SOURCE = {"type": "prometheus", "uid": "${datasource}"}

# What several metrics say together: (row, title, unit, [(query, legend)]).
STATS = (
    ("Health", "Since the last step", "s", [(f"time() - shoestring_last_step_timestamp_seconds{_RUN}", "{{run}}")]),
    ("Health", "Progress", "percentunit", [(f"shoestring_tokens{_RUN} / shoestring_planned_tokens{_RUN}", "{{run}}")]),
    ("Health", "Time to go", "s", [(f"shoestring_eta_seconds{_RUN}", "{{run}}")]),
    ("Health", "Spent", "currencyUSD", [(f"shoestring_spent_dollars_total{_RUN}", "{{run}}")]),
)
DERIVED = (
    ("Health", "Tokens per second", "short", [(f"clamp_min(deriv(shoestring_tokens{_RUN}[$__rate_interval]), 0)", "{{run}}")]),
    ("Cost", "Dollars per hour", "currencyUSD", [(f"3600 * rate(shoestring_spent_dollars_total{_RUN}[$__rate_interval])", "{{run}}")]),
    ("Cost", "What the devices cost per hour", "currencyUSD", [
        (f"shoestring_devices{_RUN} * shoestring_device_hour_dollars{_RUN}", "{{run}}")]),
    ("Cost", "Share of the budget", "percentunit", [
        (f"shoestring_spent_dollars_total{_RUN} / shoestring_budget_dollars{_RUN}", "{{run}}")]),
    ("Cost", "Everything paid for, per billion tokens", "currencyUSD", [
        (f"1e9 * shoestring_spent_dollars_total{_RUN} / shoestring_tokens{_RUN}", "{{run}}")]),
)  # fmt: skip


def dashboard() -> dict[str, Any]:
    """As Grafana imports it."""
    panels: list[dict] = []
    rows = list(dict.fromkeys(metric.row for metric in METRICS))
    for row in rows:
        drawn = [_stat(*stat[1:]) for stat in STATS if stat[0] == row]
        drawn += [_graph(m.title, m.unit, [(m.name + _RUN, _legend(m))], m.help) for m in METRICS if m.row == row and m.title]
        drawn += [_graph(title, unit, queries) for of, title, unit, queries in DERIVED if of == row]
        panels += [{"type": "row", "title": row, "collapsed": False, "panels": []}, *drawn]
    _place(panels)
    return {
        "uid": UID,
        "title": "Shoestring runs",
        "description": "Health, loss, speed, cost, experts and memory of training runs.",
        "tags": ["shoestring", "training"],
        "schemaVersion": SCHEMA,
        "version": 1,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-6h", "to": "now"},
        "timezone": "browser",
        "templating": {"list": [_choice_of_source(), _choice_of_runs()]},
        "annotations": {"list": [_restarts()]},
        "panels": panels,
    }


def write(path: Path) -> Path:
    replace_file(path, text())
    return path


def text() -> str:
    return json.dumps(dashboard(), indent=1, ensure_ascii=False) + "\n"


def _legend(metric: Metric) -> str:
    return f"{{{{run}}}} {metric.label} {{{{{metric.label}}}}}" if metric.label else "{{run}}"


def _targets(queries: Sequence[tuple[str, str]]) -> list[dict]:
    return [
        {"refId": chr(ord("A") + i), "expr": query, "legendFormat": legend, "datasource": _SOURCE}
        for i, (query, legend) in enumerate(queries)
    ]


def _graph(title: str, unit: str, queries: Sequence[tuple[str, str]], description: str = "") -> dict:
    custom = {"lineWidth": 2, "fillOpacity": 0, "showPoints": "auto", "spanNulls": True}
    steps: list[dict] = [{"color": "green", "value": None}]
    if title == "Tokens/s/GPU":
        custom |= {"thresholdsStyle": {"mode": "dashed"}}
        steps.append({"color": "blue", "value": PUBLISHED})
        description += f" Dashed: {PUBLISHED:,}, which DeepSeek-V3's pre-training reached on H800."
    return {
        "type": "timeseries", "title": title, "description": description, "datasource": _SOURCE, "targets": _targets(queries),
        "fieldConfig": {"defaults": {"unit": unit, "custom": custom, "thresholds": {"mode": "absolute", "steps": steps}}, "overrides": []},
        "options": {"legend": {"displayMode": "list", "placement": "bottom"}, "tooltip": {"mode": "multi", "sort": "desc"}},
    }  # fmt: skip


def _stat(title: str, unit: str, queries: Sequence[tuple[str, str]]) -> dict:
    return {
        "type": "stat", "title": title, "datasource": _SOURCE, "targets": _targets(queries),
        "fieldConfig": {"defaults": {"unit": unit}, "overrides": []},
        "options": {"reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False}, "colorMode": "none", "textMode": "auto"},
    }  # fmt: skip


def _place(panels: list[dict]) -> None:
    """Rows over the whole width; numbers four beside each other, graphs three."""
    x = y = height = 0
    for i, panel in enumerate(panels):
        panel["id"] = i + 1
        width, tall = {"row": (COLUMNS, 1), "stat": (COLUMNS // 4, 4)}.get(panel["type"], (COLUMNS // 3, HEIGHT))
        if x + width > COLUMNS or (height and tall != height):
            x, y, height = 0, y + height, 0
        panel["gridPos"] = {"x": x, "y": y, "w": width, "h": tall}
        x, height = x + width, tall


def _choice_of_source() -> dict:
    return {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus", "refresh": 1, "hide": 0}


def _choice_of_runs() -> dict:
    query = "label_values(shoestring_steps, run)"
    return {
        "name": "run", "label": "Run", "type": "query", "datasource": _SOURCE, "query": {"query": query, "refId": "runs"},
        "definition": query,
        "multi": True, "includeAll": True, "allValue": ".*", "current": {"text": "All", "value": "$__all"}, "refresh": 2, "sort": 1,
    }  # fmt: skip


def _restarts() -> dict:
    return {
        "name": "Restarts", "enable": True, "iconColor": "orange", "datasource": _SOURCE, "titleFormat": "{{run}} was started again",
        "expr": f"changes(shoestring_restarts_total{_RUN}[$__interval]) > 0", "step": "60s",
    }  # fmt: skip
