"""Everything there is to see of a run, or of several side by side, as charts in the order of a page."""

import contextlib
from collections.abc import Sequence

import numpy as np

from . import experts, learning, memory, money, speed
from .chart import Chart
from .curves import axis
from .gantt import make_gantt
from .planned import Planned
from .run import Run

AXES = ("tokens", "seconds", "dollars", "step")


def make_charts(
    runs: Sequence[Run], *, over: str = "tokens", planned: Planned | None = None, load_step: int | None = None,
    trace_step: int | None = None,
    notes: list[str] | None = None,
) -> list[Chart]:  # fmt: skip
    """Of at least one run. What is of one run only is of the first: `planned`, loads at `load_step`, the Gantt of `trace_step`
    (None: the last).

    What cannot be drawn is told in `notes`. Raises KeyError for an `over` that is not in `AXES`.
    """
    with contextlib.ExitStack() as stack, np.errstate(over="ignore", invalid="ignore"):  # of what no run measures
        for run in runs:
            stack.enter_context(run.lock)
        x = axis(over, runs)
        charts = [
            *learning.charts(runs, x),
            *speed.charts(runs, x, planned if len(runs) == 1 else None),
            make_gantt(runs[0].path / "traces", [] if notes is None else notes, trace_step),
            *money.charts(runs, x),
            *experts.charts(runs, x, load_step),
            memory.chart(runs[0], planned) if len(runs) == 1 else None,
        ]
    order = {name: i for i, name in enumerate((learning.SECTION, speed.SECTION, money.SECTION, experts.SECTION, "Memory"))}
    return sorted((chart for chart in charts if chart), key=lambda chart: order[chart.section])
