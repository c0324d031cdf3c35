"""Charts of where tokens go: the load of each expert in one step, the imbalance of each layer over the run, and what balances it."""

import re
from collections.abc import Sequence

import numpy as np

from .chart import Chart, plain, style
from .curves import Axis, curves, line, marks, xaxis
from .run import Run

SECTION = "Experts"
FEW_LAYERS = 8  # as many lines as colours that everyone can tell apart
COLUMNS = 240  # of a map over steps
_LAYER = re.compile(r"max_vio\[(\d+)\]")


def charts(runs: Sequence[Run], over: Axis, step: int | None = None) -> list[Chart | None]:
    """`step`: whose loads are shown; None: the last that has any. Maps are of the first run."""
    run = runs[0]
    whose = f" of {run.label}" if len(runs) > 1 else ""
    return [
        load(run, step, whose),
        *_max_vio(run, over, whose),
        curves("max-vio-mean", "Imbalance, mean over layers", "MaxVio: (largest load − mean) / mean; 0 is perfect", runs, "max_vio_mean",
        over,
               section=SECTION, color="@blue", hover="MaxVio %{y:.3f}") if len(runs) > 1 else None,
        curves("overload", "Busiest rank", "its load over the mean, in the worst layer; 1 is even", runs, "rank_overload_worst", over,
        section=SECTION,
               color="@orange", hover="%{y:.3f} × the mean", zero=False),
        curves("dead", "Dead experts", "without a token in the step, of all layers", runs, "dead_experts", over, section=SECTION,
        color="@red",
               hover="%{y:,} experts"),
        curves("entropy", "Router entropy", "mean over tokens and layers, nats", runs, "router_entropy", over, section=SECTION,
        color="@green",
               hover="%{y:.4f} nats", zero=False),
        curves("bias", "Selection biases", "norm, all layers together", runs, "bias_norm", over, section=SECTION, color="@purple",
        hover="norm %{y:.3~g}"),
    ]  # fmt: skip


def layer_names(run: Run, num: int) -> list[str]:
    first = run.config.model.num_dense_layers if run.config else 0
    return [f"layer {first + i}" for i in range(num)]


def load(run: Run, step: int | None, whose: str = "") -> Chart | None:
    """Each expert's tokens relative to its layer's mean. Colours saturate at nothing and twice the mean; hovering gives the number."""
    found = run.expert_load(step)
    if found is None:
        return None
    at, loads = found
    relative = [[n * len(layer) / sum(layer) if sum(layer) else 0.0 for n in layer] for layer in loads]
    names, few = layer_names(run, len(loads)), len(loads) <= 20
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
    subtitle = f"tokens of each expert at step {at:,.0f}{whose}, relative to its layer's mean{starved}"
    height = max(230, min(640, 130 + (34 if few else 8) * len(loads)))
    return Chart("load", "Expert load", subtitle, data, layout, wide=True, height=height, section=SECTION)


def _max_vio(run: Run, over: Axis, whose: str) -> list[Chart | None]:
    """A line for each of a few layers; of many, the worst and the mean, and a map of them all."""
    fields = [name for name in run.history.fields if _LAYER.fullmatch(name)]
    fields.sort(key=lambda name: int(_LAYER.fullmatch(name)[1]))
    if not fields:
        return [None]
    names = layer_names(run, len(fields))
    lines = (
        list(zip(fields, names)) if len(fields) <= FEW_LAYERS else [("max_vio_worst", "worst layer"), ("max_vio_mean", "mean over layers")]
    )
    data = [
        line(run, field, over, hover="MaxVio %{y:.2f}", label=name, share=len(lines), **style(i)) for i, (field, name) in enumerate(lines)
    ]
    layout = {"xaxis": xaxis(over), "yaxis": {"rangemode": "tozero"}, "showlegend": True, "shapes": marks([run], over)}
    last = [run.last.get("max_vio")] if isinstance(run.last.get("max_vio"), list) else []
    known = [(value, i) for i, value in enumerate(last[0]) if type(value) in (int, float)] if last else []
    worst = max(known, default=None)
    said = f"; at the last step the worst is {worst[0]:.2f}, in {names[worst[1]]}" if worst and worst[1] < len(names) else ""
    subtitle = f"MaxVio of each layer{whose}: (largest load − mean) / mean, 0 is perfect{said}"
    chart = Chart("max-vio", "Imbalance", subtitle, [trace for trace in data if trace], layout, wide=True, height=320, section=SECTION)
    return [chart, _map(run, fields, names, over, whose)]


def _map(run: Run, fields: Sequence[str], names: Sequence[str], over: Axis, whose: str) -> Chart | None:
    """Layers by steps: each cell the worst of its stretch."""
    curves = [run.history.curve(field) for field in fields]
    every = np.concatenate([curve.at[over.name] for curve in curves]) / over.unit
    every = every[np.isfinite(every)]
    if len(every) < 2 or not every.max() > every.min():
        return None
    edges = np.linspace(every.min(), every.max(), min(COLUMNS, max(2, len(curves[0]))) + 1)
    rows = []
    for curve in curves:
        cells = np.full(len(edges) - 1, -np.inf)
        at = curve.at[over.name] / over.unit
        known = np.isfinite(at)
        np.maximum.at(cells, np.clip(np.searchsorted(edges, at[known], side="right") - 1, 0, len(cells) - 1), curve.values[known])
        rows.append(plain(np.where(np.isfinite(cells), cells, np.nan)))
    ticks = {"tickvals": [0, 0.5, 1], "ticktext": ["0", "½", "≥ 1"], "thickness": 12, "outlinewidth": 0}
    data = [{
        "type": "heatmap", "z": rows, "x": plain(edges[1:] / 2 + edges[:-1] / 2), "y": list(names), "zmin": 0, "zmax": 1,
        "colorscale": "@amount",
        "hovertemplate": "%{y}: %{z:.2f}<br>at %{x:.4s}<extra></extra>", "colorbar": {"title": {"text": "MaxVio"}, **ticks},
    }]  # fmt: skip
    layout = {"xaxis": xaxis(over) | {"showgrid": False, "rangemode": "normal"},
              "yaxis": {"autorange": "reversed", "showgrid": False, "nticks": 15, "ticksuffix": " "}}  # fmt: skip
    subtitle = f"MaxVio of each layer{whose} over the run, the worst of each stretch; at 1 a layer's busiest expert has twice the mean"
    height = max(230, min(480, 130 + (26 if len(names) <= 20 else 6) * len(names)))
    return Chart("max-vio-map", "Imbalance by layer", subtitle, data, layout, wide=True, height=height, section=SECTION)
