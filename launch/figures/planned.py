"""What the plan says of a run, beside what was measured. All of it is projected, from its configuration and its cluster's file."""

from dataclasses import dataclass

from ...conf.phases import num_tokens
from ...conf.schema import Config
from ...train import units
from ...train.memory import Memory, rank_memory
from ..simulate import Interval, project_run, project_step
from .run import Run


@dataclass(frozen=True, kw_only=True)
class Planned:
    """Likely values, and the intervals around some. `parts`: seconds of a step by cause. `memory`: of the fullest rank."""

    step_seconds: Interval
    tokens_per_second_per_gpu: float
    mfu: float | None
    dollars: Interval
    seconds: Interval  # of the whole run, interruptions and checkpoints included
    parts: dict[str, float]
    memory: Memory | None


def plan(config: Config) -> Planned | None:
    """None where this configuration cannot be projected. Takes 20 ms for a small layout and some seconds for thousands of ranks."""
    try:
        step = project_step(config)
        run = project_run(config, step, num_tokens(config))
        return Planned(
            step_seconds=step.expected, tokens_per_second_per_gpu=run.tokens_per_second_per_gpu.likely,
            mfu=run.mfu.likely if run.mfu else None,
            dollars=run.dollars, seconds=run.days.map(lambda days: 86400 * days), parts=dict(step.breakdown), memory=_fullest(config),
        )  # fmt: skip
    except Exception:  # no plan is no reason for no page
        return None


def _fullest(config: Config) -> Memory | None:
    try:
        return max((rank_memory(config, rank) for rank in range(config.parallel.pp)), key=lambda memory: memory.total)
    except Exception:
        return None


def table(run: Run, planned: Planned | None) -> list[tuple[str, str, str]]:
    """Rows: what, projected, measured (medians of the last steps)."""
    if planned is None:
        return []
    p = planned
    memory = p.memory.total / 1e9 if p.memory else None
    return [
        ("Step time", f"{_spread(p.step_seconds)} s", _or_dash(run.recent("step_seconds"), lambda v: f"{units.significant(v)} s")),
        ("Tokens/s/GPU", units.count(p.tokens_per_second_per_gpu), units.count(run.recent("tokens_per_second_per_gpu"))),
        ("MFU", units.percent(p.mfu), units.percent(run.recent("mfu"))),
        ("Memory, fullest rank", f"{units.significant(memory)} GB" if memory else "–", _or_dash(run.number("memory_gb"),
        lambda v: f"{units.significant(v)} GB")),
        ("Whole run", f"{units.money(p.dollars.likely)} ({units.money(p.dollars.low)} to {units.money(p.dollars.high)})",
        f"{units.money(run.number('dollars'))} so far"),
        ("Time", units.duration(p.seconds.likely), f"{units.duration(run.seconds)} so far"),
    ]  # fmt: skip


def _spread(interval: Interval) -> str:
    return f"{units.significant(interval.likely)} ({units.significant(interval.low)} to {units.significant(interval.high)})"


def _or_dash(value: float | None, show) -> str:
    return "–" if value is None else show(value)
