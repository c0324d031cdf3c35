"""The chart of what memory holds: projected by category for the fullest rank, beside the measured peak."""

from ...train import units
from .chart import SERIES, Chart
from .planned import Planned
from .run import Run

CATEGORIES = {
    "weights": "weights", "main_grads": "gradients", "optimizer": "optimizer", "casts": "FP8 casts", "activations": "activations",
    "working": "working", "exchange": "exchanges", "pipeline": "pipeline", "fragmentation": "fragmentation",
}  # fmt: skip


def chart(run: Run, planned: Planned | None) -> Chart | None:
    """None where nothing is projected."""
    if planned is None or planned.memory is None:
        return None
    m, peak = planned.memory, run.number("memory_gb")
    data = [
        {"type": "bar", "orientation": "h", "name": name, "y": ["projected"], "x": [getattr(m, key) / 1e9],
         "marker": {"color": f"@series{i}" if i < SERIES else "@muted"},
         "hovertemplate": f"{name}: %{{x:.4~g}} GB<extra>projected</extra>"}
        for i, (key, name) in enumerate(CATEGORIES.items()) if getattr(m, key)
    ]  # fmt: skip
    if peak is not None:
        data.append({"type": "bar", "orientation": "h", "name": "measured peak", "y": ["measured"], "x": [peak],
                     "marker": {"color": "@text"}, "hovertemplate": "measured peak: %{x:.4~g} GB<extra></extra>"})  # fmt: skip
    layout = {
        "barmode": "stack",
        "xaxis": {"title": {"text": "GB"}, "rangemode": "tozero"},
        "yaxis": {"autorange": "reversed"},
        "showlegend": True,
    }
    measured = f"; measured peak {units.significant(peak)} GB" if peak is not None else ""
    note = ", of the process with its libraries" if run.config and run.config.cluster.name == "cpu" else ""
    subtitle = f"fullest rank, projected {units.significant(m.total / 1e9)} GB at {m.peak_at}{measured}{note if measured else ''}"
    return Chart("memory", "Memory by category", subtitle, data, layout, wide=True, height=230, section="Memory")
