"""A page as one HTML file that needs nothing from the network, readable light and dark, on a laptop and on a phone.

Text is escaped here, and in `launch/report_layouts.py`, whose HTML is taken as it is. The page has a policy that forbids it every
request, so that a mistake could not make one.
"""

import html
import json
from dataclasses import dataclass, field
from pathlib import Path

from plotly.offline import get_plotlyjs

from .. import report_layouts, secrets
from .chart import Chart

STATIC = Path(__file__).parent / "static"


@dataclass(frozen=True)
class Tile:
    label: str
    value: str
    note: str


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
    """The whole file. Every text of `page` is escaped, and no secret is in it. What there is nothing of is left out."""
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
    charts = _cards(page.charts)
    charts = f'<section class="charts">{charts}</section>' if charts else ""
    method = f"<details><summary>How these numbers are made</summary><ul>{method}</ul></details>" if method else ""
    figures = secrets.hide(_figures(page))
    scripts = "".join(f"<script>{text}</script>\n" for text in (get_plotlyjs(), figures + _static("look.js") + _static("report.js")))
    script = scripts if any(c.data for c in page.charts) else ""
    style = _static("look.css") + (report_layouts.STYLE if page.sections else "")
    shown = f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{e(page.title)} · Shoestring</title>
<style>{style}</style>
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
"""
    return f"{secrets.hide(shown)}{script}\n</body>\n</html>\n"


def _cards(charts: list[Chart]) -> str:
    """Under their headings, where they have any."""
    parts, section = [], ""
    for chart in charts:
        if chart.section != section:
            section = chart.section
            parts.append(f'<h2 class="section">{html.escape(section)}</h2>')
        parts.append(_card(chart))
    return "".join(parts)


def _card(chart: Chart) -> str:
    e, wide = html.escape, " wide" if chart.wide else ""
    plot = f'<div class="plot" id="{e(chart.key)}" style="height:{chart.height}px"></div>' if chart.data else ""
    name = e(chart.title)
    buttons = "".join(
        f'<button type="button" data-save="{kind}" data-file="{e(chart.key)}" aria-label="Save {name} as {kind.upper()}">'
        f"{kind.upper()}</button>"
        for kind in ("csv", "png")
    )
    save = f'<div class="save">{buttons}</div>' if chart.data else ""
    return f'<section class="card{wide}"><h2>{name}</h2><p class="sub">{e(chart.subtitle)}</p>{save}{plot}</section>'


def _static(name: str) -> str:
    return (STATIC / name).read_text(encoding="utf-8")


def _figures(page: Page) -> str:
    """Figures for the script. A `<` inside a script could end it: it is written as an escape."""
    figures = [{"id": c.key, "data": c.data, "layout": c.layout} for c in page.charts if c.data]
    return "const FIGURES = " + json.dumps(figures, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c") + ";\n"


POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
