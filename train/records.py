"""One step as the run's record of it."""

import time
from typing import Any

from ..conf.phases import Phase, num_tokens
from ..conf.schema import Config
from . import cost, metrics
from .metrics import StepRecord
from .phase_run import Evaluation
from .resume import Progress
from .sentinel import Look, Sentinel
from .signals import Heard
from .step import StepResult


def make_record(
    config: Config, phase: Phase, progress: Progress, result: StepResult, heard: Heard, *, lr: float, step_seconds: float,
    held_out: Evaluation | None, look: Look | None, sentinel: Sentinel | None, **measured: Any,
) -> StepRecord:  # fmt: skip
    """`config`: the run's. `progress`: after the step. `measured`: fields that others know."""
    c, loads = phase.config, result.loads.tolist()
    speed, devices, max_vio = result.tokens / step_seconds, cost.num_devices(c), metrics.max_violation(loads)
    return StepRecord(
        step=progress.step,
        tokens=progress.tokens,
        samples=progress.samples,
        phase=phase.name,
        batch_tokens=result.tokens,
        seq_len=c.data.seq_len,
        loss=result.loss,
        mtp_loss=result.mtp_losses or None,
        mtp_weight=c.optim.mtp_weight if result.mtp_losses else None,
        lr=lr,
        grad_norm=result.grad_norm,
        clip_coef=result.clip_coef,
        step_seconds=step_seconds,
        tokens_per_second=speed,
        tokens_per_second_per_gpu=speed / devices,
        mfu=cost.mfu(speed / devices, c),
        dollars_per_billion_tokens=cost.dollars_per_billion_tokens(speed / devices, c.cluster),
        eta_seconds=max(0, num_tokens(config) - progress.tokens) / speed,
        eval_loss=held_out.loss if held_out else None,
        eval_loss_by_source=held_out.by_source if held_out else None,
        eval_seconds=held_out.seconds if held_out else None,
        eval_bits_per_byte=held_out.bits_per_byte if held_out else None,
        balance_loss=result.balance_loss,
        z_loss=result.z_loss,
        expert_load=loads,
        max_vio=max_vio,
        max_vio_mean=sum(max_vio) / len(max_vio) if max_vio else 0.0,
        rank_overload=result.rank_overload,
        dead_experts=metrics.count_dead(loads),
        bias_norm=result.bias_norm,
        bias_update_speed=c.optim.bias_update_speed,
        router_entropy=result.router_entropy,
        fp8_sentinel=look.over_blocks() if look else None,
        fp8_left_out=sorted(sentinel.left_out) or None if sentinel else None,
        data_seconds=sum(heard.each["busy_data"]) / len(heard.each["busy_data"]),
        memory_gb=max(heard.each["memory"]) / 1e9,
        time_unix=time.time(),
        **measured,
    )
