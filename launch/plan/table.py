"""Plans as a terminal shows them."""

from collections.abc import Sequence

from ...train import units
from .phases import PhasePlan
from .plans import Plan

COLUMNS = ("$/T tokens", "tokens/s/GPU", "MFU", "bubble", "exposed", "memory", "time", "dollars", "layout")

PHASE_COLUMNS = ("phase", "tokens", "steps", "sequences x length", "GPUs", "step", "memory", "GPU-hours", "time", "dollars", "layout")
WORDS = ("phase", "layout")


def rows(plans: Sequence[Plan]) -> list[str]:
    """The best first, aligned."""
    return _aligned([COLUMNS, *(row(plan) for plan in plans)])


def _aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Columns to the right, but those of words."""
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    place = lambda i, cell: cell.ljust(widths[i]) if lines[0][i] in WORDS else cell.rjust(widths[i])
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


def _phase(phase: PhasePlan) -> tuple[str, ...]:
    run, c = phase.run, phase.config
    return (
        phase.name,
        units.count(run.tokens),
        f"{phase.num_steps:,}",
        f"{c.sequences_per_step:,} x {c.data.seq_len:,}",
        f"{run.gpus:,}",
        f"{phase.step.expected.likely:.3g} s",
        f"{phase.memory_gb:.1f} GB",
        f"{run.gpu_hours.likely:,.0f}",
        days(run.days.likely),
        units.money(run.dollars.likely),
        str(phase.layout),
    )


def details(plan: Plan) -> list[str]:
    """Of one: where the step's time goes, what it adds up to, what it assumes."""
    run, step, c = plan.run, plan.step, plan.config
    total = step.expected.likely
    several = len(plan.phases) > 1
    lines = [*_aligned([PHASE_COLUMNS, *map(_phase, plan.phases)]), ""] if several else []
    of_main = f" of phase {plan.main}" * several
    lines.append(
        f"one step{of_main}, {units.count(step.tokens)} tokens: ideal {step.ideal:.3g} s, expected {_interval(step.expected, '.3g')} s"
    )
    for name, seconds in step.breakdown.items():
        term = step.terms.get(name)
        interval = f"   {term.low:+.3g} to {term.high:+.3g} s: {c.stack.terms[name].source}" if term else ""
        lines.append(f"  {name:<22}{seconds:>10.3g} s {units.percent(seconds / total):>8}{interval}")
    hours = run.gpu_hours_per_trillion_tokens
    trillion = f"{hours.likely / 1e3:.4g} K GPU-hours per trillion tokens{of_main} ({hours.low / 1e3:.4g} to {hours.high / 1e3:.4g})"
    in_all = f"all {len(plan.phases)} phases: {run.gpu_hours.likely / 1e3:,.4g} K GPU-hours, " * several
    lines += [
        f"{trillion}, ideal {run.gpus * step.ideal / 3600 / step.tokens * 1e9:.4g} K",
        f"{in_all}{units.count(run.tokens)} tokens on {run.gpus:,} x {c.cluster.device}: {days(run.days.likely)} "
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
