"""Charts of how fast a run is: against its plan, and against what DeepSeek published."""

from collections.abc import Sequence

from ...train import cost, units
from .chart import Chart, style
from .curves import Axis, curves, line, marks, xaxis
from .planned import Planned
from .run import Run

SECTION = "Speed"
PUBLISHED = 1540.0  # tokens/s of each H800, DeepSeek-V3's pre-training: 14.8 T tokens in 2.664 M GPU-hours (arXiv 2412.19437, section 1)
PUBLISHED_FLOPS = 2.606e11  # of a token of DeepSeek-V3 at a sequence length of 4,096; a test computes it
NEAR = 8.0  # a reference that is further from what was measured would press the curve flat: then it is in words only


def charts(runs: Sequence[Run], over: Axis, planned: Planned | None) -> list[Chart | None]:
    """`planned`: of the first run."""
    speed, mfu = ([], []) if len(runs) > 1 else _levels(runs[0], planned)
    return [
        curves("speed", "Speed", "tokens per second of each device", runs, "tokens_per_second_per_gpu", over, section=SECTION,
        color="@blue",
               hover="%{y:.4s} tokens/s/GPU", median=True, levels=speed),
        curves("mfu", "MFU", "percent of the device's peak in this precision", runs, "mfu", over, section=SECTION, color="@green",
        hover="%{y:.1f} %",
               times=100, suffix=" %", median=True, levels=mfu),
        curves("step-time", "Step time", "seconds of each step, without evaluation and checkpoints", runs, "step_seconds", over,
        section=SECTION,
               color="@blue", hover="%{y:.4~g} s", median=True, suffix=" s"),
        _pipeline(runs, over),
        curves("memory-time", "Peak memory", "of the fullest rank, GB", runs, "memory_gb", over, section="Memory", color="@purple",
        hover="%{y:.4~g} GB"),
    ]  # fmt: skip


def published(run: Run) -> float | None:
    """Tokens/s/GPU at which this model needs as many FLOP/s as DeepSeek-V3's published 1,540 did; for that model, 1,540."""
    if run.config is None:
        return None
    try:
        return PUBLISHED * PUBLISHED_FLOPS / cost.flops_per_token(run.config.model, run.config.data.seq_len).total
    except (ArithmeticError, ValueError):
        return None


def _levels(run: Run, planned: Planned | None) -> tuple[list[tuple], list[tuple]]:
    """Lines across: what was planned, and what others reached."""
    speed, mfu, now = [], [], run.recent("tokens_per_second_per_gpu")
    near = lambda value: now and value and now / NEAR < value < now * NEAR
    if planned and near(planned.tokens_per_second_per_gpu):
        speed.append((planned.tokens_per_second_per_gpu, f"projected {units.count(planned.tokens_per_second_per_gpu)}", "@orange"))
    if planned and planned.mfu and run.recent("mfu"):
        mfu.append((100 * planned.mfu, f"projected {units.percent(planned.mfu)}", "@orange"))
    if near(reference := published(run)):
        speed.append((reference, f"DeepSeek-V3 on H800, published: {units.count(reference)}", "@green"))
    return speed, mfu


def _pipeline(runs: Sequence[Run], over: Axis) -> Chart | None:
    """Of traced steps: what is not compute."""
    run = runs[0]
    names = {"bubble": ("bubble", "of the ranks' time"), "hidden_share": ("exchange hidden", "of exchange time under compute")}
    data = [
        line(
            run, name, over, hover=f"{words[0]} %{{y:.1f}} %", label=f"{words[0]}, {words[1]}", times=100, markers=True, share=2, **style(i)
        )
        for i, (name, words) in enumerate(names.items())
    ]
    data = [trace for trace in data if trace]
    if not data:
        return None
    layout = {"xaxis": xaxis(over), "yaxis": {"ticksuffix": " %", "range": [0, 100]}, "showlegend": True, "shapes": marks(runs[:1], over)}
    whose = f" of {run.label}" if len(runs) > 1 else ""
    return Chart("pipeline", "Bubble and overlap", f"in traced steps{whose}", data, layout, section=SECTION)
