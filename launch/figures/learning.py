"""Charts of what a run learns: losses, held-out text, gradients, the schedule, and what FP8 costs."""

from collections.abc import Sequence

import numpy as np

from .chart import Chart, plain, style, text
from .curves import Axis, axis, curves, line, marks, xaxis
from .run import Run

SECTION = "Learning"


def charts(runs: Sequence[Run], over: Axis) -> list[Chart | None]:
    """Of one run, or of several side by side. None where there is nothing to draw."""
    return [
        loss(runs, over),
        *(loss(runs, axis(name, runs), key=f"loss-by-{name}", wide=False) for name in ("seconds", "dollars") if name != over.name),
        _several_fields("mtp", "Multi-token prediction", "loss of each module, nats", runs, "mtp_loss[", over),
        _several_fields("sources", "Held-out loss by source", "nats per token", runs, "eval_loss_by_source[", over, markers=True),
        curves("bits", "Bits per byte", "of held-out text", runs, "eval_bits_per_byte", over, section=SECTION, color="@orange",
               hover="%{y:.4f} bits per byte", zero=False),
        curves("grad", "Gradient norm", "before clipping", runs, "grad_norm", over, section=SECTION, color="@purple",
        hover="norm %{y:.3~g}"),
        curves("lr", "Learning rate", "of the schedule", runs, "lr", over, section=SECTION, color="@purple", hover="%{y:.3~g}"),
        _several_fields("fp8", "FP8 sentinel", "what FP8 costs, in the worst block; see docs/fp8.md", runs, "fp8_sentinel[", over),
    ]  # fmt: skip


def loss(runs: Sequence[Run], over: Axis, *, key: str = "loss", wide: bool = True) -> Chart | None:
    """Training (lines), held-out text (diamonds), and where a loss was not a number (crosses on the floor)."""
    data, several = [], len(runs) > 1
    for i, run in enumerate(runs):
        look = style(i) if several else {"color": "@blue", "dash": "solid"}
        held_out = look["color"] if several else "@orange"
        data.append(
            line(run, "loss", over, hover="training loss %{y:.4f}", label=run.label if several else "training", share=len(runs), **look)
        )
        found = line(run, "eval_loss", over, color=held_out, dash=look["dash"], hover="held-out loss %{y:.4f}", markers=True,
        share=4 * len(runs),
                     label=f"{run.label}, held out" if several else "held out")  # fmt: skip
        if found and several:
            found |= {"showlegend": False, "mode": "markers"}
        data += [found, _not_numbers(run, over)]
    data = [trace for trace in data if trace]
    if not data:
        return None
    shapes = marks(runs, over)
    subtitle = "training and held-out text" + ("; dotted: restarts and faults, listed below" if shapes else "")
    layout = {
        "xaxis": xaxis(over), "yaxis": {"title": {"text": "nats per token"}}, "showlegend": len(data) > 1, "shapes": shapes,
        "yaxis2": {"overlaying": "y", "range": [0, 1], "visible": False, "fixedrange": True},
    }  # fmt: skip
    title = "Loss" if key == "loss" else f"Loss by {'time' if over.name == 'seconds' else over.name}"
    return Chart(key, title, subtitle, data, layout, wide=wide, height=380 if wide else 280, section=SECTION)


def _not_numbers(run: Run, over: Axis) -> dict | None:
    found = [event for event in run.events if event.kind == "not a number" and event.at.get(over.name) is not None]
    if not found:
        return None
    return {
        "type": "scatter", "mode": "markers", "name": "not a number", "x": plain(np.array([e.at[over.name] for e in found]) / over.unit),
        "y": [0.02] * len(found), "yaxis": "y2", "marker": {"color": "@red", "size": 9, "symbol": "x"},
        "text": [text(e.text) for e in found], "hovertemplate": "%{text}<extra></extra>", "showlegend": True,
    }  # fmt: skip


def _several_fields(
    key: str, title: str, subtitle: str, runs: Sequence[Run], prefix: str, over: Axis, *, markers: bool = False
) -> Chart | None:
    """A line for each item of a list or dictionary that records have, of the first of the runs."""
    run = runs[0]
    names = [name for name in run.history.fields if name.startswith(prefix)][:16]
    data = []
    for i, name in enumerate(names):
        item = name[len(prefix) : -1]
        label = f"module {int(item) + 1}" if prefix == "mtp_loss[" and item.isdigit() else item.replace("_", " ")
        data.append(line(run, name, over, hover="%{y:.4~g}", label=label, share=len(names), markers=markers, **style(i)))
    data = [trace for trace in data if trace]
    if not data:
        return None
    whose = f"{subtitle}; of {run.label}" if len(runs) > 1 else subtitle
    layout = {"xaxis": xaxis(over), "yaxis": {"exponentformat": "B"}, "showlegend": True, "shapes": marks(runs[:1], over)}
    return Chart(key, title, whose, data, layout, section=SECTION)
