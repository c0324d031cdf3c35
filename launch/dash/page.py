"""The live page: what stands on it, and the callbacks that fill it. Charts are drawn by static/page.js from what `page` sends."""

import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import parse_qs, urlencode

from dash import Dash, Input, Output, State, ctx, dcc, html, no_update
from dash.development.base_component import Component

from ..figures import facts, planned
from ..figures.make import AXES, make_charts
from ..figures.page import STATIC
from ..figures.run import Run
from .watch import Watch

MOST_RUNS = 10
TICK_MS = 1000
_OVER = {"tokens": "Tokens", "seconds": "Time", "dollars": "Dollars", "step": "Steps"}
_THEMES = {"auto": "Auto", "light": "Light", "dark": "Dark"}
_INDEX = """<!doctype html>
<html lang="en">
<head>
{%metas%}
<meta name="color-scheme" content="light dark">
<title>{%title%}</title>
{%favicon%}
{%css%}
</head>
<body>
{%app_entry%}
<footer class="dash-footer">
<script src="/plotly.min.js"></script>
{%config%}
{%scripts%}
{%renderer%}
</footer>
</body>
</html>
"""


def make_app(watch: Watch) -> Dash:
    """Without a server of its own: `serve.py` has that."""
    app = Dash(
        __name__, assets_folder=str(STATIC), assets_ignore=r"report\.js", title="Shoestring", update_title=None, index_string=_INDEX,
        meta_tags=[{"name": "viewport", "content": "width=device-width, initial-scale=1"}],
    )  # fmt: skip
    app.layout = lambda: _layout(watch)
    app.callback(
        Output("runs", "value"), Input("url", "search"), Input("runs", "options"), State("runs", "value"),
    )(lambda search, _, value: _asked_for(watch, search, value))  # fmt: skip
    app.callback(Output("runs", "options"), Input("search", "n_intervals"))(lambda _: _options(watch))
    app.callback(Output("url", "search"), Input("runs", "value"), State("url", "search"), prevent_initial_call=True)(_link)
    outputs = ("page.data", "seen.data", "head.children", "tiles.children", "notes.children", "tables.children", "trace-step.options")
    app.callback(
        *(Output(*name.split(".")) for name in outputs),
        Input("clock", "n_intervals"), Input("runs", "value"), Input("over", "value"), Input("load-step", "value"),
        Input("trace-step", "value"), State("seen", "data"),
    )(lambda _, names, over, load, trace, seen: _update(watch, names, over, load, trace, seen))  # fmt: skip
    app.clientside_callback("dash_clientside.shoestring.draw", Output("drawn", "data"), Input("page", "data"), Input("theme", "value"))
    return app


def _layout(watch: Watch) -> Component:
    return html.Main(
        [
            dcc.Location(id="url", refresh=False), dcc.Interval(id="clock", interval=TICK_MS), dcc.Interval(id="search", interval=5000),
            dcc.Store(id="page"), dcc.Store(id="seen"), dcc.Store(id="drawn"),
            html.Header(
                [
                    html.Div(
                        [html.P("Shoestring dashboard", className="brand"), _choice("theme", "Theme", _THEMES, "auto", persistence=True)],
                        className="topline",
                    ),
                    html.Div(id="head"),
                ]
            ),
            html.Div(
                [
                    html.Div([html.Label("Runs", htmlFor="runs"), dcc.Dropdown(
                        _options(watch), None, multi=True, id="runs", placeholder="choose one, or several to compare")],
                        className="control grow"),
                    _choice("over", "Over", _OVER, AXES[0], persistence=True),
                    html.Div([html.Label("Expert load at step", htmlFor="load-step"), dcc.Input(
                        id="load-step", type="number", min=1, step=1, placeholder="last", debounce=True)], className="control"),
                    html.Div([html.Label("Timeline of step", htmlFor="trace-step"), dcc.Dropdown(
                        [], None, id="trace-step", placeholder="last traced")], className="control narrow"),
                ],
                className="controls",
            ),
            html.Div(id="tiles"), html.Div(id="notes"), html.Div(id="charts", className="charts"),
            html.Div(id="tables", className="charts tables"),
        ]
    )  # fmt: skip


def _choice(key: str, label: str, values: dict[str, str], value: str, **more: Any) -> Component:
    options = [{"label": words, "value": name} for name, words in values.items()]
    return html.Div([html.Span(label, id=f"{key}-label", className="label"), dcc.RadioItems(options, value, id=key, inline=True, **more)],
                    className="control choice", role="group", **{"aria-labelledby": f"{key}-label"})  # fmt: skip


def _options(watch: Watch) -> list[dict[str, str]]:
    return [{"label": name[-80:], "value": name} for name in watch.names()]


def _asked_for(watch: Watch, search: str | None, value: list[str] | None):
    """At first, the runs that the address names; without one, as soon as there is any, the run that was written to last."""
    if value is not None and ctx.triggered_id == "runs":
        return no_update
    names = [name for name in parse_qs((search or "").removeprefix("?")).get("run", []) if name in watch.names()]
    if names:
        return names if names != value else no_update
    newest = watch.newest()
    return no_update if value is not None or newest is None else [newest]


def _link(names: list[str] | None, search: str | None):
    """So that an address can be kept and passed on."""
    wanted = "?" + urlencode([("run", name) for name in names or []])
    return no_update if wanted == search or not names else wanted


# ---------------------------------------------------------------- one update


def _update(watch: Watch, names: Any, over: Any, load: Any, trace: Any, seen: Any) -> tuple:
    """What has changed since `seen`; nothing, if nothing has. Inputs come from a browser: whatever they are, there is a page."""
    began = time.monotonic()
    names = [name for name in names if isinstance(name, str)][:MOST_RUNS] if isinstance(names, list) else []
    over = over if over in AXES else AXES[0]
    step, traced = (value if type(value) is int and value > 0 else None for value in (load, trace))
    runs, seen = watch.runs(names), seen if isinstance(seen, dict) else {}
    plan = watch.plan(runs[0]) if len(runs) == 1 else None
    version = repr([names, over, step, traced, plan is not None, [run.version for run in runs]])
    # What takes long to make is not made at every tick; another server's clock is another.
    hasty = ctx.triggered_id == "clock" and seen.get("server") == id(watch) and began - seen.get("at", 0.0) < 8 * seen.get("took", 0.0)
    if seen.get("version") == version or hasty:
        return (no_update,) * 7
    if not runs:
        return {"charts": [], "key": "", "version": version}, {"version": version}, _nothing(watch), [], [], [], []
    notes: list[str] = []
    charts = (
        make_charts(runs, over=over, planned=plan, load_step=step, trace_step=traced, notes=notes) if any(run.last for run in runs) else []
    )
    key = repr([names, over])
    page = {
        "key": key,  # of what zooms belong to
        "version": version,
        "charts": [
            {"id": c.key, "title": c.title, "subtitle": c.subtitle, "section": c.section, "wide": c.wide, "height": c.height,
             "data": c.data, "layout": c.layout} for c in charts
        ],
    }  # fmt: skip
    told = {"version": version, "at": time.monotonic(), "took": time.monotonic() - began, "server": id(watch)}
    options = [{"label": f"{n:,}", "value": n} for n in reversed(runs[0].traces[-200:])]
    return page, told, _head(runs), _tiles(runs, plan), _notes(runs, notes), _tables(runs, plan), options


def _nothing(watch: Watch) -> Component:
    where = ", ".join(str(root) for root in watch.roots)
    words = (
        "Choose a run above."
        if watch.names()
        else f"No runs in {where} yet. `shoestring train experiment=tiny` makes one; this page will show it."
    )
    return html.H1(words)


def _head(runs: Sequence[Run]) -> list[Component]:
    if len(runs) > 1:
        return [html.H1([f"{len(runs)} runs ", html.Span("side by side", className="status")])]
    run = runs[0]
    status = html.Span(facts.status(run), className=f"status {run.state.split()[0]}", id="status", **{"aria-live": "polite"})
    return [html.H1([run.name + " ", status]), html.Ul([html.Li(fact) for fact in facts.facts(run)], className="facts")]


def _tiles(runs: Sequence[Run], plan: planned.Planned | None) -> Component:
    if len(runs) == 1:
        boxes = [
            html.Div([html.Div(getattr(t, part), className=part) for part in ("label", "value", "note")], className="tile")
            for t in facts.tiles(runs[0], plan)
        ]
        return html.Section(boxes, className="tiles")
    head = ["Run", "State", *(t.label for t in facts.tiles(runs[0]))]
    rows = [[run.label, facts.status(run), *(t.value for t in facts.tiles(run))] for run in runs]
    return html.Section(_table(head, rows), className="card wide side")


def _notes(runs: Sequence[Run], drawn: Sequence[str]) -> list[Component]:
    several = len(runs) > 1
    notes = [f"{run.label}: {note}" if several else note for run in runs for note in facts.notes(run)] + list(drawn)
    if not notes:
        return []
    return [html.Section([html.H2("Missing or unusual"), html.Ul([html.Li(note) for note in notes])], className="notes")]


def _tables(runs: Sequence[Run], plan: planned.Planned | None) -> list[Component]:
    parts = []
    if plan and (rows := planned.table(runs[0], plan)):
        parts.append(_card("Planned beside measured", _table(["", "projected", "measured, last steps"], rows)))
    if rows := facts.happened(runs):
        parts.append(_card("Restarts and faults", _table(["when (UTC)", "run", "what"], rows)))
    records = [html.A(run.label, href="/records.csv?" + urlencode({"run": run.label}), download=True) for run in runs]
    files = [html.Li(link) for link in records]
    parts.append(_card("All steps as CSV", html.Ul(files, className="files")))
    method = html.Details(
        [html.Summary("How these numbers are made"), html.Ul([html.Li(text) for text in facts.method(runs[0])])], className="wide"
    )
    config = html.Details([html.Summary("Configuration"), html.Pre(runs[0].config_text[:200_000])], className="wide")
    return [*parts, method, *([config] if len(runs) == 1 and runs[0].config_text else [])]


def _card(title: str, body: Component) -> Component:
    return html.Section([html.H2(title), body], className="card")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> Component:
    cells = lambda row, tag: html.Tr([tag(cell) for cell in row])
    return html.Div(html.Table([html.Thead(cells(head, html.Th)), html.Tbody([cells(row, html.Td) for row in rows])], className="table"),
                    className="scroll", tabIndex=0)  # fmt: skip
