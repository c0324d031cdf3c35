"""A run in words and numbers: what it is, its state, eight tiles, and how the numbers are made."""

import time
from collections.abc import Sequence

from ...train import cost, metrics, units
from .page import Tile
from .planned import Planned
from .run import Run
from .speed import PUBLISHED, published


def status(run: Run) -> str:
    """Such as "running: step 40 of 150"."""
    step, steps, state = run.number("step"), run.steps, run.state
    if step is None:
        return "no step recorded" if state in ("empty", "half-written", "stopped") else state
    at = f"step {step:,.0f}" + (f" of {steps:,}" if steps else "")
    if state == "complete":
        return f"finished: {step:,.0f} steps"
    return at if state in ("half-written", "empty") else f"{state}: {at}"


def facts(run: Run) -> list[str]:
    """Short phrases under the title: what ran, where."""
    found, c = [], run.config
    if c:
        kind = "rank" if cost.num_devices(c) != c.parallel.world_size else c.cluster.device
        params = cost.num_params(c.model)
        found = [
            c.model.name, f"{units.count(params.total)} parameters, {units.count(params.active)} active",
            _times(metrics.layout_name(c.parallel)),
            f"{c.parallel.world_size:,} × {kind}", c.precision.products,
        ]  # fmt: skip
    elif run.summary:
        found = [_times(run.summary.layout), f"{run.summary.world_size:,} × {run.summary.device}"]
    session = run.last.get("session")
    restarts = session if type(session) is int and 0 < session < 10**6 else 0
    return found + ([f"{restarts} restart{'s' * (restarts > 1)}"] if restarts else [])


def _times(layout: str) -> str:
    return layout.replace(" x ", " × ")


def tiles(run: Run, planned: Planned | None = None) -> list[Tile]:
    """The run in eight numbers; those that cannot be known are dashes."""
    c, number = run.config, run.number
    spent, seconds, tokens, total = number("dollars"), number("seconds"), number("tokens"), run.tokens_planned
    held_out, first = run.latest("eval_loss"), (run.history.first or {}).get("loss")
    peak = cost.peak_flops(c.cluster, c.precision.products) if c else None
    speed = run.recent("tokens_per_second_per_gpu")
    of_tokens = f"{units.percent(tokens / total)} of {units.count(total)}" if tokens is not None and total else ""
    return [
        Tile("Loss", _loss(_value(run.last.get("loss"), run)), f"from {_loss(first)}, nats per token" if run.last else ""),
        Tile("Held-out loss", _loss(held_out), "last evaluation" if held_out is not None else "not evaluated"),
        Tile("Tokens/s/GPU", units.count(speed), _beside(run, planned)),
        Tile("MFU", units.percent(run.recent("mfu")), f"of {peak / 1e12:g} TFLOP/s, {c.precision.products}" if peak else "peak unknown"),
        Tile("Spent", units.money(spent), _spent(run, seconds)),
        Tile("Per billion tokens", units.money(spent / tokens * 1e9 if tokens and spent is not None else None), "of all that was paid for"),
        Tile("Tokens", units.count(tokens), of_tokens),
        _to_go(run),
    ]  # fmt: skip


def _value(value, run: Run):
    """Of a loss that is no number, which: JSON has none, so the record says it beside."""
    odd = run.last.get("nonfinite")
    return str(odd["loss"]) if value is None and isinstance(odd, dict) and "loss" in odd else value


def _loss(value) -> str:
    if isinstance(value, str):
        return {"inf": "∞", "-inf": "-∞"}.get(value, "nan")
    if type(value) not in (int, float):
        return "–"
    return f"{value:.3f}" if abs(value) < 1e6 else f"{value:.3g}"


def _beside(run: Run, planned: Planned | None) -> str:
    parts = [f"projected {units.count(planned.tokens_per_second_per_gpu)}"] if planned else []
    if (reference := published(run)) is not None:
        here = "" if abs(reference / PUBLISHED - 1) < 0.02 else f" ({units.count(reference)} at this model's FLOPs)"
        parts.append(f"DeepSeek-V3 published {PUBLISHED:,.0f} on H800{here}")
    return "; ".join(parts)


def _spent(run: Run, seconds: float | None) -> str:
    c = run.config
    if c is None:
        return f"in {units.duration(seconds)}" if seconds is not None else ""
    parts = [f"{cost.num_devices(c):,} × ${c.cluster.price_per_gpu_hour:g}/h for {units.duration(seconds)}"]
    redone = sum(step for record in run.lost if type(step := record.get("step_seconds")) is float and step > 0)
    if redone:
        parts.append(f"{units.money(cost.dollars(redone, cost.num_devices(c), c.cluster))} of it on lost steps")
    if c.budget_usd:
        parts.append(f"of a budget of {units.money(c.budget_usd)}")
    return ", ".join(parts)


def _to_go(run: Run) -> Tile:
    if run.state == "complete":
        return Tile("To go", "done", f"in {units.duration(run.seconds)}")
    ahead = run.projection()
    if ahead is None or ahead.seconds.middle is None:
        return Tile("To go", "–", "")
    s, d = ahead.seconds, ahead.dollars
    spread = f"{units.duration(s.low)} to {units.duration(s.high)}, " if (s.low, s.high) != (s.middle, s.middle) else ""
    parts = [f"projected: {spread}{units.money(d.middle)} more"]
    if run.state == "running":
        parts.append(f"until {_when(ahead.ends_unix.middle)}")
    if (limit := next((limit for limit in ahead.limits if limit.name == ahead.first), None)) is not None:
        parts.append(f"{limit.name} ends it at step {limit.step.middle:,.0f}")
    return Tile("To go", units.duration(s.middle), "; ".join(parts))


def _when(unix: float | None) -> str:
    return time.strftime("%d %b %H:%M UTC", time.gmtime(unix)) if unix is not None and 0 < unix < 1e11 else "–"


def method(run: Run) -> list[str]:
    """How the numbers are made, in sentences."""
    lines = [
        "Loss is the mean next-token cross-entropy of a step, in nats.",
        "MFU counts the FLOPs that the mathematics needs: active parameters, causal attention, the head, forward and backward; no "
        "recomputation. It is relative to the device's dense peak in the run's precision.",
        "Dollars are the seconds that all devices were held, restarts, evaluations and lost steps included, times their price.",
        "MaxVio of a layer is (largest expert load − mean) / mean over the whole global batch: 0 is perfect balance.",
        "Speed, MFU and step time in tiles are medians of the last 16 steps. What is projected is named so.",
    ]
    if run.config:
        flops = cost.flops_per_token(run.config.model, run.config.data.seq_len)
        lines.insert(2, f"This model needs {units.si(flops.total)}FLOPs a token at sequence length {run.config.data.seq_len:,}.")
    return lines


def notes(run: Run) -> list[str]:
    """What is missing or unusual, in sentences."""
    found = run.notes()
    if run.last and run.progress == 1 and run.latest("eval_loss") is None:
        found.append("No evaluation was recorded: the loss is that of training text.")
    if run.num_not_numbers:
        found.append(f"The loss was not a number at {run.num_not_numbers:,} step(s), the first at step {run.first_not_number}.")
    if run.config and run.last and run.recent("mfu") is None:
        c = run.config
        found.append(f"MFU is unknown: the cluster {c.cluster.name} has no peak for {c.precision.products}.")
    if run.summary and run.number("step") is not None and run.summary.steps < run.number("step"):
        found.append(
            f"summary.json ends at step {run.summary.steps}, metrics.jsonl at {run.number('step'):,.0f}: an earlier session wrote it."
        )
    return found


def happened(runs: Sequence[Run], most: int = 100) -> list[tuple[str, str, str]]:
    """Rows, the last first: when, of which run, what."""
    rows = [(event.time_unix or 0.0, run.label, event) for run in runs for event in run.events]
    rows.sort(key=lambda row: row[0], reverse=True)
    when = lambda at: time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(at)) if 0 < at < 1e11 else "–"
    return [(when(at), label, event.text) for at, label, event in rows[:most]]
