"""The report's charts: Plotly figures as plain data, whose colours are names of the page's theme."""

import itertools
import math
from collections.abc import Callable, Sequence

from ..train import units
from ..train.metrics import StepRecord
from .report_page import Chart

MAX_POINTS = 1500  # of a curve: more is slower to draw than to read
FEW_LAYERS = 8  # as many lines as colours that everyone can tell apart


def make_charts(run: Sequence[StepRecord], loaded: StepRecord | None, *, first_moe_layer: int) -> list[Chart]:
    """The charts of a run's records. `loaded` is the last record with `expert_load`; MoE layers are named from `first_moe_layer` on."""
    if not run:
        return []
    restarts, records = _restarts(run), thin(run)
    charts = [_loss(records)]
    charts += [
        _curve("speed", "Speed", "tokens per second", records, lambda r: r.tokens_per_second, "@blue", "%{y:.4s} tokens/s", median=True),
        _curve("mfu", "MFU", "percent of the device's peak", records, lambda r: r.mfu and 100 * r.mfu, "@green", "%{y:.1f} %", median=True),
    ]
    if loaded:
        charts.append(_load(loaded, first_moe_layer))
    charts += _max_vio([r for r in run if r.max_vio], first_moe_layer)
    dollars, price = lambda r: r.dollars, lambda r: r.dollars_per_billion_tokens
    charts += [
        _curve("dollars", "Dollars spent", "since the run began", records, dollars, "@orange", "$%{y:.4~g}", prefix="$"),
        _curve("price", "Dollars per billion tokens", "at each step's speed", records, price, "@orange", "$%{y:.4~g}", "$", median=True),
        _curve("grad", "Gradient norm", "before clipping", records, lambda r: r.grad_norm, "@purple", "%{y:.3~g}"),
        _curve("lr", "Learning rate", "of the schedule", records, lambda r: r.lr, "@purple", "%{y:.3~g}"),
    ]
    for chart in charts:
        if chart.layout.get("xaxis", {}).get("title") == TOKENS["title"]:
            chart.layout.setdefault("shapes", []).extend(restarts)
    return charts


def thin(records: Sequence[StepRecord], limit: int = MAX_POINTS) -> list[StepRecord]:
    """At most about `limit` records that still show every spike: the lowest and highest loss of each stretch.

    Ends, evaluations, restarts and the first and last loss of a stretch that is not a number are always among them.
    """
    if len(records) <= limit:
        return list(records)
    keep = {0, len(records) - 1}
    finite = [i for i, r in enumerate(records) if math.isfinite(r.loss)]
    size = math.ceil(2 * len(records) / limit)
    for start in range(0, len(finite), size):
        stretch = finite[start : start + size]
        keep |= {min(stretch, key=lambda i: records[i].loss), max(stretch, key=lambda i: records[i].loss)}
    for i, (before, after) in enumerate(itertools.pairwise(records)):
        if before.session != after.session or math.isfinite(before.loss) != math.isfinite(after.loss):
            keep |= {i, i + 1}
        if before.eval_loss is not None:
            keep.add(i)
    return [records[i] for i in sorted(keep)]


def _number(value: float | None) -> float | None:
    """A gap in the curve where there is no number."""
    return value if value is not None and math.isfinite(value) else None


def _at(records: Sequence[StepRecord]) -> dict:
    """Where a record is, on the axis and in words."""
    return {"x": [r.tokens for r in records], "customdata": [[r.step, units.count(r.tokens), units.duration(r.seconds)] for r in records]}


WHERE = "<br>step %{customdata[0]} · %{customdata[1]} tokens · %{customdata[2]}<extra></extra>"
TOKENS = {"title": {"text": "tokens"}, "exponentformat": "B", "rangemode": "tozero"}


def _restarts(records: Sequence[StepRecord]) -> list[dict]:
    line = {"color": "@muted", "width": 1, "dash": "dot"}
    return [
        {"type": "line", "x0": after.tokens, "x1": after.tokens, "y0": 0, "y1": 1, "yref": "paper", "line": line}
        for before, after in itertools.pairwise(records)
        if before.session != after.session
    ]


def _loss(records: list[StepRecord]) -> Chart:
    evaluated = [r for r in records if r.eval_loss is not None]
    diverged = [r for r in records if not math.isfinite(r.loss)]
    data = [
        {"type": "scatter", "mode": "lines", "name": "training", "y": [_number(r.loss) for r in records], **_at(records),
         "line": {"color": "@blue", "width": 1.8}, "hovertemplate": "training loss %{y:.4f}" + WHERE},
        {"type": "scatter", "mode": "lines+markers", "name": "held out", "y": [_number(r.eval_loss) for r in evaluated], **_at(evaluated),
         "line": {"color": "@orange", "width": 1.8}, "marker": {"size": 8, "symbol": "diamond"},
         "hovertemplate": "held-out loss %{y:.4f}" + WHERE},
        {"type": "scatter", "mode": "markers", "name": "not a number", "y": [0.02] * len(diverged), "yaxis": "y2", **_at(diverged),
         "marker": {"color": "@red", "size": 9, "symbol": "x"}, "hovertemplate": "the loss is not a number" + WHERE},
    ]  # fmt: skip
    data = [trace for trace in data if trace["x"]]
    layout = {
        "xaxis": TOKENS, "yaxis": {"title": {"text": "nats per token"}}, "showlegend": len(data) > 1,
        "yaxis2": {"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True},
    }  # fmt: skip
    restarted = "; dotted lines are restarts" if records[-1].session != records[0].session else ""
    return Chart("loss", "Loss", f"training and held-out text, by tokens trained{restarted}", data, layout, wide=True, height=380)


def _curve(
    key: str, title: str, subtitle: str, records: list[StepRecord], value: Callable, color: str, hover: str, prefix: str = "",
    *, median: bool = False,
) -> Chart:  # fmt: skip
    y, line = [_number(value(r)) for r in records], {"color": color, "width": 1.8}
    data = [{"type": "scatter", "mode": "lines", "y": y, **_at(records), "line": line, "hovertemplate": hover + WHERE}]
    layout = {"xaxis": TOKENS, "yaxis": {"tickprefix": prefix, "rangemode": "tozero", "exponentformat": "B"}}
    known = sorted(v for v in y if v is not None)
    if not known:
        return Chart(key, title, "not recorded", [], {})
    if median:
        middle = known[len(known) // 2]
        dashed = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "line": {"color": "@muted", "width": 1, "dash": "dash"}}
        layout["shapes"] = [dashed | {"y0": middle, "y1": middle}]
        subtitle += f"; dashed: median {prefix}{units.significant(middle) if middle < 1000 else units.count(middle)}"
    return Chart(key, title, subtitle, data, layout)


def _layer_names(first: int, num_layers: int) -> list[str]:
    return [f"layer {first + i}" for i in range(num_layers)]


def _load(record: StepRecord, first_moe_layer: int) -> Chart:
    """Each expert's tokens relative to its layer's mean. Colours saturate at nothing and twice the mean; hovering gives the number."""
    loads = record.expert_load
    relative = [[n * len(layer) / sum(layer) if sum(layer) else 0.0 for n in layer] for layer in loads]
    names = _layer_names(first_moe_layer, len(loads))
    few = len(loads) <= 20
    ticks = {"tickvals": [0, 0.5, 1, 1.5, 2], "ticktext": ["0", "½", "1", "1½", "≥ 2"], "thickness": 12, "outlinewidth": 0}
    data = [{
        "type": "heatmap", "z": relative, "y": names, "customdata": loads, "zmin": 0, "zmax": 2, "colorscale": "@balance",
        "xgap": int(few), "ygap": int(few), "colorbar": {"title": {"text": "× mean"}, **ticks},
        "hovertemplate": "%{y}, expert %{x}<br>%{z:.2f} × the mean, %{customdata:,} tokens<extra></extra>",
    }]  # fmt: skip
    dead = [(e, names[i]) for i, layer in enumerate(loads) for e, n in enumerate(layer) if n == 0]
    if dead:
        data.append({
            "type": "scatter", "mode": "markers", "x": [e for e, _ in dead], "y": [name for _, name in dead], "hoverinfo": "skip",
            "marker": {"symbol": "x-thin", "size": 6, "line": {"width": 1.5, "color": "@text"}}, "showlegend": False,
        })  # fmt: skip
    layout = {
        "xaxis": {"title": {"text": "expert"}, "showgrid": False, "zeroline": False, "constrain": "domain"},
        "yaxis": {"autorange": "reversed", "showgrid": False, "nticks": len(loads) if few else 15, "ticksuffix": " "},
    }
    starved = f"; × marks {len(dead)} without a token" if dead else "; every expert is used"
    subtitle = f"tokens of each expert at step {record.step:,}, relative to its layer's mean{starved}"
    return Chart("load", "Expert load", subtitle, data, layout, wide=True, height=max(230, min(640, 130 + (34 if few else 8) * len(loads))))


def _max_vio(known: list[StepRecord], first_moe_layer: int) -> list[Chart]:
    """A line for each of a few layers; of many, the median and the worst, and a map of them all."""
    if not known:
        return []
    num_layers, last = len(known[0].max_vio), known[-1].max_vio
    points = [r for r in thin(known) if len(r.max_vio) == num_layers]
    names = _layer_names(first_moe_layer, num_layers)
    if num_layers <= FEW_LAYERS:
        lines = [(name, f"@series{i}", [r.max_vio[i] for r in points]) for i, name in enumerate(names)]
    else:
        lines = [("worst layer", "@orange", [max(r.max_vio) for r in points]),
                 ("median layer", "@blue", [sorted(r.max_vio)[num_layers // 2] for r in points])]  # fmt: skip
    data = [
        {"type": "scatter", "mode": "lines", "name": name, "y": list(map(_number, y)), **_at(points),
         "line": {"color": color, "width": 1.6}, "hovertemplate": f"{name}: %{{y:.2f}}" + WHERE}
        for name, color, y in lines
    ]  # fmt: skip
    layout = {"xaxis": TOKENS, "yaxis": {"rangemode": "tozero"}, "showlegend": True}
    worst = max(range(len(last)), key=last.__getitem__)
    subtitle = f"MaxVio, 0 is perfect; at the last step the worst is {last[worst]:.2f}, in layer {names[worst].split()[-1]}"
    charts = [Chart("max-vio", "Imbalance", subtitle, data, layout, wide=True, height=320)]
    return charts if num_layers <= FEW_LAYERS else [*charts, _max_vio_map(thin(known, 300), names)]


def _max_vio_map(points: list[StepRecord], names: list[str]) -> Chart:
    columns = [[_number(r.max_vio[i]) if i < len(r.max_vio) else None for r in points] for i in range(len(names))]
    ticks = {"tickvals": [0, 0.5, 1], "ticktext": ["0", "½", "≥ 1"], "thickness": 12, "outlinewidth": 0}
    data = [
        {
            "type": "heatmap",
            "z": columns,
            "x": [r.tokens for r in points],
            "y": names,
            "zmin": 0,
            "zmax": 1,
            "colorscale": "@amount",
            "hovertemplate": "%{y}: %{z:.2f}<br>%{x:.4s} tokens<extra></extra>",
            "colorbar": {"title": {"text": "MaxVio"}, **ticks},
        }
    ]
    layout = {"xaxis": TOKENS | {"showgrid": False}, "yaxis": {"autorange": "reversed", "showgrid": False, "nticks": 15, "ticksuffix": " "}}
    subtitle = "MaxVio of each layer by tokens trained; at 1 its busiest expert has twice the mean"
    return Chart("max-vio-map", "Imbalance by layer", subtitle, data, layout, wide=True, height=max(260, min(480, 130 + 6 * len(names))))
