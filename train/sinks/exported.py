"""What is exported of a run to Prometheus: the one table that the exporter, the Grafana dashboard and their tests read.

Names end in their unit, as Prometheus wants them; what only grows is a counter and ends in `_total`. Steps and tokens are none: a restart
takes them back to its checkpoint. A series is absent where its value is not known. Labels are bounded: the run's name; beside it a layer, a
source of text or a measure, at most `MOST` of each; never a step.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...conf.phases import num_steps, num_tokens
from ...conf.schema import Config
from .. import cost
from ..metrics import StepRecord

MOST = 64  # values of a label beside the run's


@dataclass(frozen=True, kw_only=True)
class Metric:
    """`value(record)`: a number, numbers by `label`, or None. A constant of the run has `constant(config)` instead."""

    name: str
    help: str
    row: str  # of the dashboard
    unit: str  # Grafana's name of it
    value: Callable[[StepRecord], Any] | None = None
    constant: Callable[[Config], float | None] | None = None
    label: str = ""
    title: str = ""  # of its panel; none: it is drawn in another's, or not at all

    @property
    def counts(self) -> bool:
        return self.name.endswith("_total")


def _get(field: str) -> Callable[[StepRecord], Any]:
    return lambda record: getattr(record, field)


def _by_number(field: str) -> Callable[[StepRecord], Any]:
    return lambda record: None if (items := getattr(record, field)) is None else {str(i): item for i, item in enumerate(items)}


def _worst(field: str) -> Callable[[StepRecord], Any]:
    return lambda record: max(getattr(record, field) or [], default=None)


def _metric(name: str, help: str, row: str, unit: str, title: str = "", **more: Any) -> Metric:
    return Metric(name=f"shoestring_{name}", help=help, row=row, unit=unit, title=title, **more)


METRICS: Sequence[Metric] = (
    _metric("steps", "Optimizer steps taken; a restart goes back to its checkpoint.", "Health", "short", "Steps", value=_get("step")),
    _metric("last_step_timestamp_seconds", "When the last step ended, seconds since 1970.", "Health", "s", value=_get("time_unix")),
    _metric("restarts_total", "How often the run was started again.", "Health", "short", "Restarts", value=_get("session")),
    _metric("tokens", "Tokens trained, each once.", "Health", "short", "Tokens", value=_get("tokens")),
    _metric("planned_tokens", "Tokens of the whole run.", "Health", "short", constant=num_tokens),
    _metric("planned_steps", "Optimizer steps of the whole run.", "Health", "short", constant=num_steps),
    _metric("eta_seconds", "Until the last step, at the last one's speed.", "Health", "s", "Time to go", value=_get("eta_seconds")),
    _metric("loss_nats", "Mean next-token cross-entropy of a step.", "Loss", "none", "Training loss", value=_get("loss")),
    _metric("eval_loss_nats", "Held-out loss, of the last evaluation.", "Loss", "none", "Held-out loss", value=_get("eval_loss")),
    _metric("eval_source_loss_nats", "Held-out loss by source.", "Loss", "none", "Held-out loss by source", label="source",
            value=_get("eval_loss_by_source")),
    _metric("eval_bpb", "Bits per byte of held-out text.", "Loss", "none", "Bits per byte", value=_get("eval_bits_per_byte")),
    _metric("mtp_loss_nats", "Loss of each module of multi-token prediction.", "Loss", "none", "Multi-token prediction", label="module",
            value=_by_number("mtp_loss")),
    _metric("gradient_norm", "Before clipping.", "Loss", "none", "Gradient norm", value=_get("grad_norm")),
    _metric("learning_rate", "Of the schedule.", "Loss", "none", "Learning rate", value=_get("lr")),
    _metric("device_tokens_per_second", "Tokens of each device and second, of the last step.", "Speed", "short", "Tokens/s/GPU",
            value=_get("tokens_per_second_per_gpu")),
    _metric("mfu_ratio", "Model FLOPs utilisation, 0 to 1.", "Speed", "percentunit", "MFU", value=_get("mfu")),
    _metric("step_seconds", "Of the last step, without evaluation and checkpoint.", "Speed", "s", "Step time", value=_get("step_seconds")),
    _metric("data_seconds", "That ranks read the step's samples.", "Speed", "s", "Reading samples", value=_get("data_seconds")),
    _metric("bubble_ratio", "Of ranks' time in a traced step: neither computing nor exchanging.", "Speed", "percentunit", "Pipeline bubble",
            value=_get("bubble")),
    _metric("exchange_exposed_seconds", "Token exchanges of a traced step under which nothing is computed.", "Speed", "s",
            "Exposed exchange", value=_get("exposed_seconds")),
    _metric("exchange_hidden_ratio", "Share of exchange time under compute, in a traced step.", "Speed", "percentunit", "Hidden exchange",
            value=_get("hidden_share")),
    _metric("devices", "That the run holds.", "Cost", "short", constant=cost.num_devices),
    _metric("device_hour_dollars", "What an hour of one device costs.", "Cost", "currencyUSD",
            constant=lambda c: c.cluster.price_per_gpu_hour),
    _metric("spent_dollars_total", "All time that the devices were held, restarts and lost work included.", "Cost", "currencyUSD", "Spent",
            value=_get("dollars")),
    _metric("budget_dollars", "What the run may cost; absent without a limit.", "Cost", "currencyUSD",
            constant=lambda c: c.budget_usd or None),
    _metric("device_seconds_total", "Time that the devices were held, all together.", "Cost", "s", "Device time",
            value=lambda r: None if r.gpu_hours is None else 3600 * r.gpu_hours),
    _metric("billion_tokens_dollars", "Price of a billion tokens at the last step's speed.", "Cost", "currencyUSD",
            "Dollars per billion tokens", value=_get("dollars_per_billion_tokens")),
    _metric("max_vio_mean", "MaxVio, mean over layers: (largest load - mean) / mean.", "Experts", "none", "MaxVio, mean over layers",
            value=_get("max_vio_mean")),
    _metric("max_vio_worst", "MaxVio of the worst layer.", "Experts", "none", "MaxVio, worst layer", value=_worst("max_vio")),
    _metric("layer_max_vio", "MaxVio of each MoE layer.", "Experts", "none", "MaxVio by layer", label="layer", value=_by_number("max_vio")),
    _metric("rank_overload_worst", "The busiest expert-parallel rank's load over the mean, in the worst layer.", "Experts", "none",
            "Busiest rank", value=_worst("rank_overload")),
    _metric("dead_experts", "Without a token in the last step, of all layers.", "Experts", "short", "Dead experts",
            value=_get("dead_experts")),
    _metric("router_entropy_nats", "Mean over tokens and layers.", "Experts", "none", "Router entropy", value=_get("router_entropy")),
    _metric("router_bias_norm", "Of all layers' selection biases together.", "Experts", "none", "Selection biases",
            value=_get("bias_norm")),
    _metric("fp8_sentinel", "What FP8 costs, the worst block's, by measure.", "FP8 and memory", "none", "FP8 sentinel", label="measure",
            value=_get("fp8_sentinel")),
    _metric("memory_peak_bytes", "Peak of the fullest rank.", "FP8 and memory", "decbytes", "Peak memory",
            value=lambda r: None if r.memory_gb is None else 1e9 * r.memory_gb),
    _metric("checkpoint_stall_seconds", "That training stood still for the last save.", "FP8 and memory", "s", "Checkpoint stall",
            value=_get("checkpoint_seconds")),
)  # fmt: skip


def values(metric: Metric, found: Any) -> Mapping[str, float]:
    """By the label's value, "" without a label; what is not known is left out, and so are items beyond `MOST`."""
    if found is None:
        return {}
    items = found if isinstance(found, Mapping) else {"": found}
    return {str(key): float(value) for key, value in list(items.items())[:MOST] if value is not None}
