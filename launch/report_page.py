"""The report's look: one HTML file that needs nothing from the network, readable light and dark, on a laptop and on a phone.

Text is escaped here, and in `report_layouts.py`, whose HTML is taken as it is. A policy in the page forbids it every request, so that a
mistake could not make one.
"""

import html
import json
from dataclasses import dataclass, field

from plotly.offline import get_plotlyjs

from . import report_layouts


@dataclass(frozen=True)
class Tile:
    label: str
    value: str
    note: str


@dataclass(frozen=True)
class Chart:
    """A Plotly figure as plain data. Strings that begin with @ are colours of the theme (see `THEMES` in the script)."""

    key: str  # id of its element
    title: str
    subtitle: str
    data: list[dict]
    layout: dict
    wide: bool = False  # both columns
    height: int = 280


@dataclass(frozen=True, kw_only=True)
class Page:
    title: str
    facts: list[str]
    status: str
    notes: list[str]
    tiles: list[Tile]
    charts: list[Chart]
    config_text: str
    method: list[str] = field(default_factory=list)
    sections: list[str] = field(default_factory=list)  # HTML, after the charts
    kind: str = "run report"
    notes_title: str = "Missing or unusual"


def render(page: Page) -> str:
    """The whole file. Every text of `page` is escaped. What there is nothing of is left out."""
    e = html.escape
    facts = "".join(f"<li>{e(fact)}</li>" for fact in page.facts)
    tiles = "".join(
        f'<div class="tile"><div class="label">{e(t.label)}</div><div class="value">{e(t.value)}</div>'
        f'<div class="note">{e(t.note)}</div></div>'
        for t in page.tiles
    )
    notes = "".join(f"<li>{e(note)}</li>" for note in page.notes)
    notes = f'<section class="notes"><h2>{e(page.notes_title)}</h2><ul>{notes}</ul></section>' if page.notes else ""
    config = f"<details><summary>Configuration</summary><pre>{e(page.config_text)}</pre></details>" if page.config_text else ""
    method = "".join(f"<li>{e(line)}</li>" for line in page.method)
    tiles = f'<section class="tiles">{tiles}</section>' if tiles else ""
    charts = "".join(_card(chart) for chart in page.charts)
    charts = f'<section class="charts">{charts}</section>' if charts else ""
    method = f"<details><summary>How these numbers are made</summary><ul>{method}</ul></details>" if method else ""
    script = f"<script>{get_plotlyjs()}</script>\n<script>{_figures(page)}{SCRIPT}</script>" if any(c.data for c in page.charts) else ""
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{e(page.title)} · Shoestring</title>
<style>{STYLE}{report_layouts.STYLE if page.sections else ""}</style>
</head>
<body>
<main>
<header>
<p class="brand">Shoestring {e(page.kind)}</p>
<h1>{e(page.title)} <span class="status">{e(page.status)}</span></h1>
<ul class="facts">{facts}</ul>
</header>
{tiles}
{notes}
{charts}
{"".join(page.sections)}
<footer>
{method}
{config}
</footer>
</main>
{script}
</body>
</html>
"""


def _card(chart: Chart) -> str:
    wide = " wide" if chart.wide else ""
    plot = f'<div class="plot" id="{html.escape(chart.key)}" style="height:{chart.height}px"></div>' if chart.data else ""
    title, subtitle = html.escape(chart.title), html.escape(chart.subtitle)
    return f'<section class="card{wide}"><h2>{title}</h2><p class="sub">{subtitle}</p>{plot}</section>'


def _figures(page: Page) -> str:
    """Figures for the script. A `<` inside a script could end it: it is written as an escape."""
    figures = [{"id": c.key, "data": c.data, "layout": c.layout} for c in page.charts if c.data]
    return "const FIGURES = " + json.dumps(figures, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c") + ";\n"


POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"

STYLE = """
:root {
  --page: #f6f6f4; --card: #ffffff; --line: #e3e2de; --text: #1b1d21; --soft: #4c5058; --muted: #6a6e76;
  --accent: #0067a8; --warn: #7a4a00; --warn-card: #fff6e5; --warn-line: #f0d9ad;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #121417; --card: #1a1d21; --line: #2b2f36; --text: #eceef1; --soft: #b9bec7; --muted: #9096a1;
    --accent: #6cb8f0; --warn: #f3c675; --warn-card: #2a2316; --warn-line: #4d3f22;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 32px 24px 48px; }
.brand { margin: 0; color: var(--muted); font-size: 13px; letter-spacing: .02em; }
h1 { margin: 2px 0 8px; font-size: 30px; line-height: 1.2; font-weight: 650; overflow-wrap: anywhere; }
h2 { margin: 0; font-size: 16px; font-weight: 620; }
.status { font-size: 13px; font-weight: 500; color: var(--accent); border: 1px solid currentColor; border-radius: 99px; padding: 2px 10px;
  vertical-align: 5px; white-space: nowrap; }
.facts { list-style: none; display: flex; flex-wrap: wrap; margin: 0 0 22px; padding: 0; color: var(--soft); }
.facts li:not(:last-child)::after { content: "·"; margin: 0 8px; color: var(--muted); }
.tiles { display: grid; grid-template-columns: repeat(4, 1fr); gap: 12px; margin-bottom: 16px; }
.tile, .card, .notes, details { background: var(--card); border: 1px solid var(--line); border-radius: 10px; }
.tile { padding: 13px 16px 14px; min-width: 0; }
.tile .label { color: var(--soft); font-size: 13px; }
.tile .value { font-size: 26px; font-weight: 620; line-height: 1.25; white-space: nowrap; font-variant-numeric: tabular-nums; }
.tile .note { color: var(--muted); font-size: 12.5px; line-height: 1.35; }
.notes { background: var(--warn-card); border-color: var(--warn-line); padding: 13px 18px; margin-bottom: 16px; }
.notes h2 { color: var(--warn); font-size: 14px; }
.notes ul { margin: 4px 0 0; padding-left: 18px; }
.charts { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 16px; }
.card { padding: 16px 18px 10px; min-width: 0; }
.wide { grid-column: 1 / -1; }
.sub { margin: 1px 0 4px; color: var(--muted); font-size: 13px; }
footer { margin-top: 16px; display: grid; gap: 12px; }
details { padding: 11px 18px; }
summary { cursor: pointer; font-weight: 560; }
details ul { margin: 8px 0 4px; padding-left: 18px; color: var(--soft); }
pre { overflow-x: auto; font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; color: var(--soft); }
@media (max-width: 900px) { .tiles { grid-template-columns: repeat(2, 1fr); } .charts { grid-template-columns: minmax(0, 1fr); } }
@media (max-width: 520px) {
  main { padding: 20px 12px 32px; } h1 { font-size: 24px; } .card { padding: 13px 10px 6px; border-radius: 8px; } .tiles { gap: 8px; }
  .tile { padding: 10px 12px; } .tile .value { font-size: 21px; }
}
@media print { body { background: #fff; } .card, .tile { break-inside: avoid; } }
"""

# Series colours are Okabe and Ito's, apart under every common colour blindness; on dark ground the darkest are lifted.
SCRIPT = """
const THEMES = {
  light: {
    text: "#1b1d21", soft: "#4c5058", muted: "#85898f", grid: "#ecebe7", line: "#cfcdc7", card: "#ffffff",
    blue: "#0067a8", orange: "#d55e00", green: "#007e5c", purple: "#8f4a80", red: "#c2185b",
    series: ["#0067a8", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#1b1d21", "#9a8c00"],
    amount: [[0, "#f7f6f2"], [0.5, "#f0a25c"], [1, "#8a2f00"]],
    balance: [[0, "#0a4f8c"], [0.25, "#7fb2db"], [0.5, "#f1f0ec"], [0.75, "#f0a25c"], [1, "#b34700"]],
  },
  dark: {
    text: "#eceef1", soft: "#b9bec7", muted: "#7d838e", grid: "#262a30", line: "#3b4048", card: "#1a1d21",
    blue: "#6cb8f0", orange: "#f39a4a", green: "#3ecfa0", purple: "#d79bc6", red: "#ff6f9c",
    series: ["#6cb8f0", "#f39a4a", "#3ecfa0", "#e6a3cb", "#a8d8ff", "#ffd166", "#eceef1", "#d6d04a"],
    amount: [[0, "#1f2226"], [0.5, "#a55a1c"], [1, "#ffd08a"]],
    balance: [[0, "#63b3f5"], [0.25, "#2f6396"], [0.5, "#24272c"], [0.75, "#96551d"], [1, "#ff9f4a"]],
  },
};
const dark = matchMedia("(prefers-color-scheme: dark)");
const narrow = matchMedia("(max-width: 520px)");

function paint(value, theme) {
  if (typeof value === "string" && value[0] === "@") {
    const name = value.slice(1);
    if (name.startsWith("series")) return theme.series[Number(name.slice(6))];
    return theme[name];
  }
  if (Array.isArray(value)) return typeof value[0] === "number" ? value : value.map(v => paint(v, theme));
  if (value && typeof value === "object") return Object.fromEntries(Object.entries(value).map(([k, v]) => [k, paint(v, theme)]));
  return value;
}
function axis(own, theme) {
  const small = { size: 12, color: theme.soft };
  return { gridcolor: theme.grid, linecolor: theme.line, zeroline: false, automargin: true, tickfont: small, ...own,
    title: own.title ? { ...own.title, font: small, standoff: 10 } : undefined };
}
function draw() {
  const theme = dark.matches ? THEMES.dark : THEMES.light;
  for (const figure of FIGURES) {
    const own = paint(figure.layout, theme), data = paint(figure.data, theme);
    for (const trace of data) if (trace.colorbar) {
      Object.assign(trace.colorbar, { tickfont: { color: theme.soft, size: 12 } });
      trace.colorbar.title.font = { color: theme.soft, size: 12 };
      if (narrow.matches) Object.assign(trace.colorbar, { orientation: "h", y: -0.35, yanchor: "top", thickness: 9, title: undefined });
    }
    const layout = { paper_bgcolor: theme.card, plot_bgcolor: theme.card, font: { family: "system-ui, sans-serif", color: theme.text },
      margin: { l: narrow.matches ? 40 : 56, r: 14, t: own.showlegend ? 34 : 12, b: 44 }, hovermode: "closest", dragmode: "zoom",
      legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", font: { color: theme.soft, size: 12 } },
      hoverlabel: { bgcolor: theme.card, bordercolor: theme.line, font: { color: theme.text, size: 13 }, align: "left" },
      showlegend: false, ...own, xaxis: axis(own.xaxis, theme), yaxis: axis(own.yaxis, theme) };
    Plotly.react(figure.id, data, layout, { responsive: true, displaylogo: false, displayModeBar: false, showLink: false });
  }
}
dark.addEventListener("change", draw);
narrow.addEventListener("change", draw);
draw();
"""
