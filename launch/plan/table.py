"""Plans as a terminal shows them."""

from collections.abc import Sequence

from ...train import units
from .plans import Plan

COLUMNS = ("$/T tokens", "tokens/s/GPU", "MFU", "bubble", "exposed", "memory", "time", "dollars", "layout")


def rows(plans: Sequence[Plan]) -> list[str]:
    """The best first, aligned."""
    lines = [COLUMNS, *(row(plan) for plan in plans)]
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    place = lambda i, cell: cell if COLUMNS[i] == "layout" else cell.rjust(widths[i])
    return ["  ".join(place(i, cell) for i, cell in enumerate(line)).rstrip() for line in lines]


def row(plan: Plan) -> tuple[str, ...]:
    run, step = plan.run, plan.step
    share = lambda name: units.percent(step.parts[name] / step.ideal)
    return (
        units.money(run.dollars.likely / run.tokens * 1e12),
        f"{run.tokens_per_second_per_gpu.likely:,.0f}",
        units.percent(run.mfu.likely) if run.mfu else "-",
        share("bubble"),
        share("exposed communication"),
        f"{plan.memory_gb[1.0]:.1f} GB",
        days(run.days.likely),
        units.money(run.dollars.likely),
        str(plan.layout),
    )


def details(plan: Plan) -> list[str]:
    """Of one: where the step's time goes, what it adds up to, what it assumes."""
    run, step, c = plan.run, plan.step, plan.config
    total = step.expected.likely
    lines = [f"one step of {units.count(step.tokens)} tokens: ideal {step.ideal:.3g} s, expected {_interval(step.expected, '.3g')} s"]
    for name, seconds in step.breakdown.items():
        term = step.terms.get(name)
        interval = f"   {term.low:+.3g} to {term.high:+.3g} s: {c.stack.terms[name].source}" if term else ""
        lines.append(f"  {name:<22}{seconds:>10.3g} s {units.percent(seconds / total):>8}{interval}")
    hours = run.gpu_hours_per_trillion_tokens
    kilo = f"{hours.likely / 1e3:.4g} K GPU-hours per trillion tokens ({hours.low / 1e3:.4g} to {hours.high / 1e3:.4g})"
    ideal = f"ideal {run.gpus * step.ideal / 3600 / step.tokens * 1e9:.4g} K"
    lines += [
        f"{kilo}, {ideal}",
        f"{units.count(run.tokens)} tokens on {run.gpus:,} x {c.cluster.device}: {days(run.days.likely)} "
        f"({days(run.days.low)} to {days(run.days.high)}), "
        f"{units.money(run.dollars.likely)} ({units.money(run.dollars.low)} to {units.money(run.dollars.high)}) at "
        f"${c.cluster.price_per_gpu_hour:g} per GPU-hour, {units.count(run.kwh.likely)} kWh",
        f"{units.percent(run.effective)} of the time trains: the rest is work lost to failures, and restarts",
    ]
    if run.mfu and run.mfu_full:
        peak = f"{c.cluster.peak_tflops[c.precision.products]:g} TFLOP/s ({c.precision.products}, dense)"
        lines.append(f"MFU {units.percent(run.mfu.likely)} causal, {units.percent(run.mfu_full.likely)} with all of attention, of {peak}")
    memory = ", ".join(f"{gb:.1f} at imbalance {imbalance:g}" for imbalance, gb in plan.memory_gb.items())
    lines.append(f"memory of the fullest rank, GB of {c.cluster.memory_gb:g}: {memory}; the peak is {plan.peak_at}")
    return lines


def days(value: float) -> str:
    return f"{value:.1f} d" if value >= 1 else units.duration(value * 86400)


def _interval(interval, form: str) -> str:
    return f"{interval.likely:{form}} ({interval.low:{form}} to {interval.high:{form}})"
