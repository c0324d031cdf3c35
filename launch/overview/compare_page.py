"""Two runs as one HTML page: both losses by tokens and by dollars, and what differs in their settings. Needs nothing from the network."""

import html
import math
from collections.abc import Callable, Sequence

from ...train import units
from ...train.metrics import StepRecord
from ..report_charts import TOKENS, WHERE, thin
from ..report_page import Chart, Page, Tile, render
from . import compare
from .compare import Reached, Side
from .table import loss

_COLORS = ("@blue", "@orange")
_DOLLARS = {"title": {"text": "dollars"}, "tickprefix": "$", "rangemode": "tozero"}


def page(a: Side, b: Side) -> str:
    """The whole file. Text of the runs is escaped."""
    known = [side for side in (a, b) if side.records]
    charts = [
        _losses("tokens", "Loss by tokens", "training (lines) and held-out text (diamonds)", TOKENS, a, b, lambda r: r.tokens),
        _losses("dollars", "Loss by dollars", "what each had cost by then, restarts and lost work included", _DOLLARS, a, b, _dollars),
    ]
    whole = Page(
        title=f"{a.path} and {b.path}", facts=[], status="two runs", kind="comparison", tiles=_tiles(a, b),
        notes=[f"{side.path}: no step has been recorded." for side in (a, b) if not side.records],
        charts=charts if known else [], sections=[_settings(a, b)], config_text="", method=_method(),
    )  # fmt: skip
    return render(whole)


def _dollars(record: StepRecord) -> float | None:
    return _number(record.dollars)


def _number(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _losses(key: str, title: str, subtitle: str, axis: dict, a: Side, b: Side, x: Callable[[StepRecord], float | None]) -> Chart:
    data = []
    for side, color in zip((a, b), _COLORS):
        records = thin(side.records)
        evaluated = [r for r in records if r.eval_loss is not None]
        line = {"color": color, "width": 1.8}
        data.append({"type": "scatter", "mode": "lines", "name": _text(side.path), "y": [_number(r.loss) for r in records], "line": line,
                     "hovertemplate": "loss %{y:.4f}" + WHERE, **_at(records, x)})  # fmt: skip
        data.append({"type": "scatter", "mode": "markers", "name": f"{_text(side.path)}, held out", "showlegend": False,
                     "y": [_number(r.eval_loss) for r in evaluated], "marker": {"color": color, "size": 8, "symbol": "diamond"},
                     "hovertemplate": "held-out loss %{y:.4f}" + WHERE, **_at(evaluated, x)})  # fmt: skip
    layout = {"xaxis": axis, "yaxis": {"title": {"text": "nats per token"}}, "showlegend": True}
    return Chart(key, title, subtitle, [trace for trace in data if trace["x"]], layout, wide=True, height=380)


def _text(text: str) -> str:
    """Plotly takes tags in a legend for its own."""
    return html.escape(text, quote=False)


def _at(records: Sequence[StepRecord], x: Callable[[StepRecord], float | None]) -> dict:
    return {"x": [x(r) for r in records], "customdata": [[r.step, units.count(r.tokens), units.duration(r.seconds)] for r in records]}


def _tiles(a: Side, b: Side) -> list[Tile]:
    target = compare.target(a, b)
    tiles = []
    for letter, side in zip("AB", (a, b)):
        last, found = side.records[-1] if side.records else None, None if target is None else compare.reached(side, target)
        tiles += [
            Tile(f"{letter}: loss", loss(last.loss if last else None), side.path),
            Tile(f"{letter}: to {loss(target)}", units.money(found.dollars if found else None), _where(found)),
        ]
    return tiles


def _where(found: Reached | None) -> str:
    return f"{units.count(found.tokens)} tokens, {units.duration(found.seconds)}" if found else "not reached"


def _settings(a: Side, b: Side) -> str:
    e = html.escape
    rows = "".join(f"<tr><td>{e(name)}</td><td>{e(left)}</td><td>{e(right)}</td></tr>" for name, left, right in compare.differing(a, b))
    head = f"<thead><tr><th>Setting</th><th>{e(a.path)}</th><th>{e(b.path)}</th></tr></thead>"
    table = f'<div class="scroll"><table>{head}<tbody>{rows}</tbody></table></div>' if rows else '<p class="sub">None.</p>'
    return f'<section class="card wide layouts"><h2>Settings that differ</h2>{table}</section>'


def _method() -> list[str]:
    return [
        "Loss is the mean next-token cross-entropy of a step, in nats.",
        f"A loss is reached when the median of the last {compare.SMOOTH} steps' losses is not above it (of fewer in a short run); the one "
        "named here is the lowest that both runs have reached.",
        "Dollars are the seconds that all devices were held, restarts, evaluations and lost steps included, times their price.",
    ]
