"""What a run says about itself: one record per step, one summary at the end, and the file that keeps the records.

Every reader (console, W&B, report, dashboard) takes these objects; the simulator writes the same ones, so that predicted and
measured runs overlay. Other places to send records to are in `sinks/`.
"""

import dataclasses
import functools
import json
import math
import os
import types
import typing
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..conf import files
from ..conf.outside import parse_json
from ..conf.schema import Config, ParallelConfig

LOST = "metrics_lost.jsonl"
_LARGEST = 1 << 1023  # of whole numbers that are a float, too
# What a line that is no record may raise: JSON of any depth, numbers of any size, and anything under `nonfinite`.
BAD_LINE = (ValueError, KeyError, TypeError, IndexError, AttributeError, OverflowError, RecursionError)


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimizer step, of the whole job (not of one rank). None: not measured at this step.

    Lists run over the model's MoE layers, in order; experts of a layer in global order.
    """

    step: int  # 1 is the first
    tokens: int  # trained so far, including this step
    samples: int  # sequences so far, including this step
    phase: str = "main"
    batch_tokens: int | None = None  # of this step
    seq_len: int | None = None
    loss: float  # mean next-token cross-entropy of the step's tokens, nats; what follows is not in it
    mtp_loss: list[float] | None = None  # of each module of multi-token prediction, nats
    mtp_weight: float | None = None  # of their mean in what is minimised
    lr: float
    grad_norm: float  # of all parameters, before clipping
    clip_coef: float  # what gradients were multiplied by, at most 1
    step_seconds: float  # wall time of the step alone: no evaluation, no checkpoint
    tokens_per_second: float  # of the job, over `step_seconds`
    tokens_per_second_per_gpu: float
    mfu: float | None = None  # 0 to 1; None where the device's peak at this precision is unknown
    seconds: float  # wall time that the devices were held since the run began: restarts, evaluations and lost steps included
    dollars: float  # what those seconds cost
    gpu_hours: float | None = None  # likewise, of all devices
    dollars_per_billion_tokens: float  # at this step's speed
    eta_seconds: float | None = None  # until the run's last step
    eval_loss: float | None = None  # held-out split; None unless evaluated after this step
    eval_loss_by_source: dict[str, float] | None = None
    eval_seconds: float | None = None  # that the evaluation took
    eval_bits_per_byte: float | None = None  # of held-out text; None also where the tokenizer's ids are no whole bytes
    balance_loss: float | None = None  # sequence-wise balance loss as added to the loss
    z_loss: float | None = None
    expert_load: list[list[int]] | None = None  # tokens that each expert received, global batch; at 58 x 256 it is 60 kB a step
    max_vio: list[float] | None = None  # of each layer: (largest load - mean) / mean
    max_vio_mean: float | None = None  # over layers
    rank_overload: list[float] | None = None  # of each layer: the busiest expert-parallel rank's load over the mean, 1 is even
    dead_experts: int | None = None  # experts of all layers that received no token in this step
    bias_norm: float | None = None  # of all layers' selection biases together
    bias_update_speed: float | None = None
    router_entropy: float | None = None  # mean over tokens and layers of the normalised scores' entropy, nats
    fp8_sentinel: dict[str, float] | None = None  # what FP8 costs, the worst block's: `kernels/fp8_probe.py` has the measures
    fp8_left_out: list[int] | None = None  # blocks that the sentinel has taken out of FP8, if any
    bubble: float | None = None  # of a traced step's pipeline: share of ranks' time in which they neither compute nor exchange tokens
    comm_seconds: float | None = None  # a rank's token exchanges are under way, mean over ranks
    exposed_seconds: float | None = None  # part of those in which the rank computes nothing
    hidden_share: float | None = None  # the other part, 0 to 1; None also where nothing is exchanged
    pair_hidden_share: float | None = None  # likewise, inside actions that overlap a forward and a backward
    data_seconds: float | None = None  # that ranks read the step's samples, mean over ranks
    breakdown: dict[str, float] | None = None  # of a traced step: `step_seconds` by part of `parallel/trace_divide.py`, mean over ranks
    checkpoint: str | None = None  # what came of saving since the last record: saved, skipped or failed step N, and why
    checkpoint_seconds: float | None = None  # that training stood still for it
    memory_gb: float | None = None  # peak of the fullest rank, 1e9 bytes
    time_unix: float  # when the step ended
    session: int = 0  # how often the run had been restarted


@dataclass(frozen=True, kw_only=True)
class Summary:
    """A finished (or cleanly stopped) run, as `summary.json`."""

    name: str
    steps: int
    tokens: int
    loss_first: float
    loss_last: float
    eval_loss: float | None  # the last evaluation
    tokens_per_second: float  # all tokens over the time of all steps, the slow first ones included
    mfu: float | None
    dollars: float
    seconds: float  # of wall time that the dollars paid for
    world_size: int
    layout: str
    device: str

    def write(self, path: str | Path) -> None:
        """Whole or not at all; non-finite numbers become null and are named under `nonfinite`."""
        replace_file(Path(path), json.dumps(to_plain(self), indent=2) + "\n")


def layout_name(parallel: ParallelConfig) -> str:
    """Such as "pp 2 x edp 1 x ep 2, 1f1b"."""
    chunks = f" x {parallel.chunks} chunks" if parallel.chunks > 1 else ""
    return f"pp {parallel.pp}{chunks} x edp {parallel.edp} x ep {parallel.ep}" + (f", {parallel.schedule}" if parallel.pp > 1 else "")


def summarize(config: Config, records: Iterable[StepRecord]) -> Summary | None:
    """The summary of a run from its records in step order; None where there is none."""
    first = last = None
    step_seconds, useful, step_tokens, before, eval_loss = 0.0, 0.0, 0, 0, None
    for last in records:
        first = first or last
        step_seconds += last.step_seconds
        useful += math.nan if last.mfu is None else last.mfu * last.step_seconds
        step_tokens += last.tokens - before
        before = last.tokens
        eval_loss = last.eval_loss if last.eval_loss is not None else eval_loss
    if first is None:
        return None
    speed = step_tokens / step_seconds if step_seconds > 0 else 0.0
    mfu = None if math.isnan(useful) else useful / max(step_seconds, 1e-9)
    return Summary(
        name=config.name, steps=last.step, tokens=last.tokens, loss_first=first.loss, loss_last=last.loss, eval_loss=eval_loss,
        tokens_per_second=speed, mfu=mfu, dollars=last.dollars, seconds=last.seconds,
        world_size=config.parallel.world_size, layout=layout_name(config.parallel), device=config.cluster.device,
    )  # fmt: skip


def max_violation(loads: list[list[int]]) -> list[float]:
    """MaxVio of each layer, (largest load - mean) / mean: 0 is perfect balance. A layer that saw no token has 0."""
    return [max(layer) * len(layer) / sum(layer) - 1 if sum(layer) else 0.0 for layer in loads]


def count_dead(loads: list[list[int]]) -> int:
    """Experts, of all layers, without a token."""
    return sum(load == 0 for layer in loads for load in layer)


# ---------------------------------------------------------------- JSON


def to_plain(item: Any) -> dict[str, Any]:
    """A dataclass as JSON-ready values. JSON has no NaN: it becomes null, and `nonfinite` maps its name to what it was."""
    plain, odd = {}, {}
    for f in dataclasses.fields(item):
        plain[f.name] = _finite(getattr(item, f.name), f.name, odd)
    return plain | ({"nonfinite": odd} if odd else {})


def _finite(value: Any, name: str, odd: dict[str, str]) -> Any:
    if isinstance(value, (list, tuple)):
        return [_finite(v, f"{name}[{i}]", odd) for i, v in enumerate(value)]
    if isinstance(value, dict):
        return {key: _finite(v, f"{name}[{key}]", odd) for key, v in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        odd[name] = str(value)
        return None
    return value


def from_plain(cls: type, plain: Any) -> Any:
    """The inverse of `to_plain`. Keys of a future version are ignored; a missing or mistyped one raises ValueError naming it."""
    if not isinstance(plain, dict):
        raise ValueError(f"not an object: {str(plain)[:60]}")
    values = dict(plain)
    for name, text in (values.pop("nonfinite", None) or {}).items():
        key, _, index = name.partition("[")
        if index:
            at = index.removesuffix("]")
            values[key][at if isinstance(values[key], dict) else int(at)] = float(text)
        else:
            values[key] = float(text)
    known = {f.name: f for f in dataclasses.fields(cls)}
    if missing := [n for n, f in known.items() if n not in values and f.default is dataclasses.MISSING]:
        raise ValueError(f"no {', '.join(missing)}")
    for name, annotation in _hints(cls).items():
        if name in values and not _fits(values[name], annotation):
            raise ValueError(f"{name} = {values[name]!r} is not {annotation}")
    return cls(**{n: v for n, v in values.items() if n in known})


_hints = functools.cache(typing.get_type_hints)  # takes longer than to read a short record


def _fits(value: Any, annotation: Any) -> bool:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, a) for a in args)
    if origin is list:
        return isinstance(value, list) and all(_fits(v, args[0]) for v in value)
    if origin is dict:
        return isinstance(value, dict) and all(_fits(v, args[1]) for v in value.values())
    if annotation is float:
        return isinstance(value, float) or (type(value) is int and abs(value) < _LARGEST)
    return isinstance(value, annotation)


# ---------------------------------------------------------------- the file


def to_line(record: StepRecord) -> str:
    """A record as one line of the metrics file."""
    return json.dumps(to_plain(record), separators=(",", ":"), allow_nan=False) + "\n"


def scan_records(path: str | Path, on_bad_line: Callable[[int, str, bool], None], kind: type = StepRecord) -> Iterator:
    """Records of a metrics file, one at a time. A line that is none is passed over and told: (number, what is wrong, torn). `kind`: what
    they are read as, a dataclass with some of a record's fields.

    A torn line is the last of the file without its newline: what a killed process leaves, and no cause for alarm.
    """
    with open(path, encoding="utf-8", errors="replace") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                yield from_plain(kind, parse_json(line))
            except BAD_LINE as error:
                on_bad_line(number, str(error), not line.endswith("\n"))


def read_records(path: str | Path) -> list[StepRecord]:
    """All records of a metrics file. A torn last line is left out in silence; any other unreadable line with a warning."""

    def tell(number, why, torn):
        if not torn:
            warnings.warn(f"{path}:{number} is not a step record and was left out: {why}", stacklevel=3)

    return list(scan_records(path, tell))


@dataclass(frozen=True, kw_only=True)
class Rewound:
    """Where a resumed run goes on."""

    session: int  # the new session's number
    seconds: float  # held so far, for steps kept and lost
    dollars: float  # spent on them
    gpu_hours: float = 0.0  # likewise
    step_seconds: float = 0.0  # the longest of the last steps
    kept: int  # records
    lost: int


def rewind(path: str | Path, step: int) -> Rewound:
    """Move the records after `step` from a metrics file to `metrics_lost.jsonl` beside it, before a resumed run appends to it.

    Both files change whole or not at all, and doing it twice is doing it once. A torn last line is dropped; other unreadable
    lines move with the lost. A missing file is a new run: session 0.
    """
    path = Path(path)
    lost_path = path.with_name(LOST)
    if not path.exists() and not lost_path.exists():
        return Rewound(session=0, seconds=0.0, dollars=0.0, kept=0, lost=0)
    text, before = _read(path), _read(lost_path)
    kept, lost = [], []
    seen = [record for line in before.split("\n") if (record := _parse(line))]
    *lines, rest = text.split("\n")
    for line in lines + [rest] * (_parse(rest) is not None):  # the rest is nothing, or torn, or a record that lost its newline
        record = _parse(line)
        if record:
            seen.append(record)
        (kept if record and record.step <= step else lost).append(line + "\n")
    if lost and not before.endswith("".join(lost)):  # else an earlier rewind was cut short between its two renames
        replace_file(lost_path, before + "".join(lost))
    if "".join(kept) != text:
        replace_file(path, "".join(kept))
    most = lambda name: max((getattr(r, name) or 0.0 for r in seen), default=0.0)
    return Rewound(
        session=1 + max((r.session for r in seen), default=-1), seconds=most("seconds"), dollars=most("dollars"),
        gpu_hours=most("gpu_hours"), step_seconds=max((r.step_seconds for r in seen[-16:]), default=0.0), kept=len(kept), lost=len(lost),
    )  # fmt: skip


def _read(path: Path) -> str:
    return files.read(path).decode(errors="replace") if os.path.lexists(path) else ""


def _parse(line: str) -> StepRecord | None:
    try:
        return from_plain(StepRecord, parse_json(line))
    except BAD_LINE:
        return None


def replace_file(path: Path, text: str) -> None:
    """Write a file whole or not at all, through to the disk."""
    files.replace(path, text)
