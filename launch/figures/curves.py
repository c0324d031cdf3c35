"""Curves of one run or several over steps, tokens, time or dollars: with their peaks however long they are, and events marked."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ...train import units
from .chart import Chart, level, plain, style, text, word
from .history import AXES, Curve
from .run import Run

MOST_POINTS = 2000  # of a chart's curves together: more is slower to draw than to read
LEAST_POINTS = 150  # of each of them


@dataclass(frozen=True, kw_only=True)
class Axis:
    """What curves are drawn over. `unit`: by which the values are divided."""

    name: str  # step | tokens | seconds | dollars
    label: str
    unit: float = 1.0
    layout: dict = field(default_factory=dict)

    def of(self, curve: Curve) -> list[float | None]:
        return plain(curve.at[self.name] / self.unit)


def axis(name: str, runs: Sequence[Run] = ()) -> Axis:
    """Time in the unit that suits the longest of the runs. Raises KeyError for another name."""
    layout = {"rangemode": "tozero", "exponentformat": "B"}
    if name == "seconds":
        longest = max((run.seconds or 0.0 for run in runs), default=0.0)
        unit, label = (86400.0, "days") if longest > 3 * 86400 else (3600.0, "hours") if longest > 2 * 3600 else (60.0, "minutes")
        return Axis(name=name, label=f"{label} held", unit=unit, layout=layout)
    label, more = {"step": ("step", {}), "tokens": ("tokens", {}), "dollars": ("dollars spent", {"tickprefix": "$"})}[name]
    return Axis(name=name, label=label, layout=layout | more)


def thinned(curve: Curve, most: int) -> Curve:
    """Of about `most` points, with the least and the greatest of each stretch among them."""
    n = len(curve)
    if n <= most:
        return curve
    size = math.ceil(2 * n / most)
    stretches = np.append(curve.values, np.full(-n % size, np.nan)).reshape(-1, size)
    low = np.where(np.isnan(stretches), np.inf, stretches).argmin(axis=1)
    high = np.where(np.isnan(stretches), -np.inf, stretches).argmax(axis=1)
    starts = size * np.arange(len(stretches))
    gaps = np.flatnonzero(np.isnan(curve.values))
    keep = np.unique(np.concatenate([[0, n - 1], starts + low, starts + high, gaps[: most // 4]]))
    keep = keep[keep < n]
    return Curve(values=curve.values[keep], at={name: array[keep] for name, array in curve.at.items()})


HOVER = "<br>step %{customdata[0]:,} · %{customdata[1]:.4s} tokens · %{customdata[2]:$.4~s}"


def line(
    run: Run, name: str, over: Axis, *, color: str, hover: str, label: str = "", dash: str = "solid", share: int = 1, times: float = 1.0,
    markers: bool = False,
) -> dict | None:  # fmt: skip
    """A run's field over an axis; None where it was never recorded. `share`: of how many curves in the chart this is one."""
    whole = of_axis(run, name) if name in AXES else run.history.curve(name, gaps=not markers)
    curve = thinned(whole, max(LEAST_POINTS, MOST_POINTS // max(1, share)))
    if not np.isfinite(curve.values).any():
        return None
    trace = {
        "type": "scatter", "mode": "lines+markers" if markers or len(curve) == 1 else "lines", "name": text(label), "x": over.of(curve),
        "y": plain(curve.values * times), "line": {"color": color, "width": 1.8, "dash": dash}, "connectgaps": False,
        "customdata": list(zip(*(plain(curve.at[at]) for at in ("step", "tokens", "dollars")))),
        "hovertemplate": hover + HOVER + (f"<extra>{text(label)}</extra>" if label else "<extra></extra>").replace("%{", "% {"),
    }  # fmt: skip
    if trace["mode"] != "lines":
        trace["marker"] = {"color": color, "size": 7, "symbol": "diamond"}
    return trace


def of_axis(run: Run, name: str) -> Curve:
    """An axis itself as a curve, such as dollars: where the loss was recorded."""
    loss = run.history.curve("loss")
    known = np.isfinite(loss.at[name])
    return Curve(values=loss.at[name][known], at={axis: array[known] for axis, array in loss.at.items()})


EVENT_COLORS = {"restart": "@muted", "not a number": "@red", "alert": "@orange", "checkpoint": "@purple"}
MOST_MARKS = 60  # on an axis: of more, the last


def marks(runs: Sequence[Run], over: Axis) -> list[dict]:
    """Restarts and faults, as vertical lines on a time axis."""
    found = [event for run in runs for event in run.events if event.kind in EVENT_COLORS and event.at.get(over.name) is not None]
    return [
        {"type": "line", "x0": at, "x1": at, "y0": 0, "y1": 1, "yref": "paper", "layer": "below",
         "line": {"color": EVENT_COLORS[event.kind], "width": 1, "dash": "dot"}}
        for event in found[-MOST_MARKS:]
        for at in [event.at[over.name] / over.unit]
    ]  # fmt: skip


def curves(
    key: str, title: str, subtitle: str, runs: Sequence[Run], name: str, over: Axis, *, section: str, color: str, hover: str,
    prefix: str = "", suffix: str = "", times: float = 1.0, median: bool = False, wide: bool = False, levels: Sequence[tuple] = (),
    zero: bool = True,
) -> Chart | None:  # fmt: skip
    """One field: of one run in `color`, of several in a colour for each. `levels`: (value, words, colour) of lines across.
    None where nobody has recorded it."""
    several = len(runs) > 1
    data = []
    for i, run in enumerate(runs):
        look = style(i) if several else {"color": color}
        data.append(line(run, name, over, hover=hover, label=run.label if several else "", share=len(runs), times=times, **look))
    data = [trace for trace in data if trace]
    if not data:
        return None
    shapes, words = marks(runs, over), []
    if median and not several and (known := sorted(v for v in data[0]["y"] if v is not None)):
        middle = known[len(known) // 2]
        shapes.append(level(middle, dash="dot"))
        shown = units.significant(middle) if abs(middle) < 1000 else units.count(middle)
        subtitle += f"; dotted: median {prefix}{shown}{suffix}"
    for value, said, line_color in levels:
        shapes.append(level(value, line_color))
        words.append(word(value, said, line_color))
    y = {"tickprefix": prefix, "ticksuffix": suffix, "exponentformat": "B"} | ({"rangemode": "tozero"} if zero else {})
    layout = {"xaxis": xaxis(over), "yaxis": y, "shapes": shapes, "annotations": words, "showlegend": several}
    return Chart(key, title, subtitle, data, layout, wide=wide, section=section)


def xaxis(over: Axis) -> dict:
    return {"title": {"text": over.label}, **over.layout}
