"""A whole run, projected: steps, checkpoints, failures; days, dollars and kilowatt-hours."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from ...conf.errors import ConfigError
from ...conf.schema import Config
from ...train import cost
from .step import Interval, StepEstimate

MOST_LOST = 0.9  # of the time, to failures


@dataclass(frozen=True, kw_only=True)
class RunEstimate:
    """Of `tokens`. Every interval is the step's. From `effective` on, failures are in it."""

    tokens: float
    gpus: int
    tokens_per_second_per_gpu: Interval
    mfu: Interval | None  # causal attention, useful FLOPs: cost.mfu's
    mfu_full: Interval | None  # all S x S of attention counted, as some papers do
    gpu_hours_per_trillion_tokens: Interval
    effective: float  # share of time that trains: the rest is checkpoints, lost work and restarts
    gpu_hours: Interval
    days: Interval
    dollars: Interval
    kwh: Interval


def project_run(config: Config, step: StepEstimate, tokens: float, *, seconds: Interval | None = None) -> RunEstimate:
    """`seconds`: of all steps together, where not all are of the full batch, which `step` is of. Raises ConfigError where failures come
    before checkpoints."""
    gpus, m, seq_len = cost.num_devices(config), config.model, config.data.seq_len
    speed = step.expected.map(lambda seconds: step.tokens / seconds / gpus)
    effective = effective_share(config, step.expected.likely)
    hours = (seconds or step.expected.map(lambda s: s / step.tokens * tokens)).map(lambda s: s / 3600 / effective)
    known = cost.mfu(1.0, config) is not None
    flops = cost.flops_per_token(m, seq_len)
    full = 1 + 3 * flops.attention * (2 * seq_len / (seq_len + 1) - 1) / flops.total
    return RunEstimate(
        tokens=tokens,
        gpus=gpus,
        tokens_per_second_per_gpu=speed,
        mfu=speed.map(lambda s: cost.mfu(s, config)) if known else None,
        mfu_full=speed.map(lambda s: cost.mfu(s, config) * full) if known else None,
        gpu_hours_per_trillion_tokens=step.expected.map(lambda seconds: seconds / step.tokens * 1e12 / 3600 * gpus),
        effective=effective,
        gpu_hours=hours.map(lambda h: h * gpus),
        days=hours.map(lambda h: h / 24),
        dollars=hours.map(lambda h: cost.dollars(h * 3600, gpus, config.cluster)),
        kwh=hours.map(lambda h: h * gpus * config.cluster.kw_per_gpu),
    )


def in_all(runs: Sequence[RunEstimate], main: RunEstimate) -> RunEstimate:
    """Of stretches one after another: tokens, hours, days, dollars and energy added up; devices and speeds are those of `main`. What makes
    one slower than expected makes all: ends of intervals add up, too."""

    def added(name: str) -> Interval:
        ends = ([getattr(getattr(run, name), end) for run in runs] for end in ("low", "likely", "high"))
        return Interval(**dict(zip(("low", "likely", "high"), map(sum, ends))))

    hours = added("gpu_hours")
    return replace(
        main, tokens=sum(run.tokens for run in runs), gpu_hours=hours, days=added("days"), dollars=added("dollars"), kwh=added("kwh"),
        effective=sum(run.effective * run.gpu_hours.likely for run in runs) / hours.likely,
    )  # fmt: skip


def effective_share(config: Config, step_seconds: float) -> float:
    """Of the time that devices are held: half an interval between checkpoints is lost with each failure, and a restart; and what a
    checkpoint keeps waiting (none where it is written beside the next steps). Raises ConfigError where nearly nothing is left."""
    c, steps = config.cluster, config.checkpoint.interval
    mttf = c.mttf_gpu_hours * 3600 / cost.num_devices(config)
    interval = steps * step_seconds if steps else 0.0
    lost = (interval / 2 + c.restart_minutes * 60) / mttf
    if lost >= MOST_LOST:
        often = int(2 * (MOST_LOST / 2 * mttf - c.restart_minutes * 60) / step_seconds)
        every = f"{cost.num_devices(config):,} devices stop every {mttf / 3600:.2g} hours"
        rule = f"{every}, and {steps} steps of {step_seconds:.3g} s are hardly done by then"
        raise ConfigError("checkpoint.interval", steps, rule, often if often > 0 else None)
    return (1 - lost) / (1 + checkpoint_seconds(config) / interval if interval else 1)


def checkpoint_seconds(config: Config) -> float:
    """That a step waits for one."""
    if config.checkpoint.async_save:
        return 0.0
    return cost.checkpoint_bytes(config) / cost.num_devices(config) / (config.cluster.checkpoint_gb_s * 1e9)
