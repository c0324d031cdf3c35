"""A cut-down DeepSeek-V3, as much of it as the device holds, trained for some steps in BF16 and in FP8 by the ordinary `train` command.

Everything is read from the run's own records. A run is ended by force once they are there: a checkpoint of such a model would take longer
than its training.
"""

import contextlib
import dataclasses
import datetime
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...conf.compose import load
from ...conf.errors import ConfigError
from ...conf.schema import Config
from ...train import cost, metrics

PRECISIONS = ("bf16", "fp8")
STATE_SHARE = 0.7  # of the device's memory, for weights, gradients and optimizer; the rest is for activations
SLOW = 3  # first steps, which compile and allocate
NEVER = 100_000  # more steps than are waited for: a run that reached its end would evaluate, and save
V3 = (
    "model=deepseek_v3", "model.num_dense_layers=1", "model.vocab_size=32768", "data=stdlib", "data.seq_len=4096", "optim.lr=2.2e-4",
    "optim.warmup_steps=5", "optim.decay=none", "train.micro_batch_sequences=1", "train.global_batch_tokens=16384", "launch.compile=true",
)  # fmt: skip
LAYERS, EXPERTS = (9, 8, 7, 6, 5, 4, 3, 2), (64, 32, 16)  # experts: of 8 groups, 8 of them a token


@dataclass(frozen=True, kw_only=True)
class StepRun:
    """`tokens_per_second`, `mfu`: medians without the first steps. `state_gb`: by train/cost.py, in 1e9 bytes as `memory_gb`."""

    precision: str
    tokens_per_second: float | None = None
    mfu: float | None = None
    memory_gb: float | None = None
    state_gb: float | None = None
    losses: list[float]
    error: str = ""


@dataclass(frozen=True, kw_only=True)
class Steps:
    device: str
    date: str
    words: list[str]
    parameters: int
    runs: list[StepRun]

    @property
    def ratio(self) -> float | None:
        """FP8's speed over BF16's."""
        speed = {run.precision: run.tokens_per_second for run in self.runs}
        return speed["fp8"] / speed["bf16"] if speed.get("fp8") and speed.get("bf16") else None


def fit(memory_bytes: float) -> list[str]:
    """Words of the deepest V3 whose state fits, and of the most experts it then can have. ConfigError where none does."""
    whole = _config(V3, "fp8")
    for layers in LAYERS:
        for experts in EXPERTS:
            cut = dataclasses.replace(whole, model=dataclasses.replace(whole.model, num_layers=layers, num_experts=experts))
            need = state_bytes(cut) / STATE_SHARE
            if need <= memory_bytes:
                return [*V3, f"model.num_layers={layers}", f"model.num_experts={experts}"]
    raise ConfigError("device memory", f"{memory_bytes / 1e9:.0f} GB", f"the smallest cut of DeepSeek-V3 wants {need / 1e9:.0f} GB")


def state_bytes(config: Config) -> int:
    return cost.rank_state_bytes(config, layers=range(config.model.num_blocks), embedding=True, head=True).total


def _config(words: Sequence[str], precision: str) -> Config:
    return load([*words, f"precision={precision}", f"train.steps={NEVER}"])


def run(
    words: Sequence[str], folder: Path, device: str, *, steps: int, limit_s: float = 300.0, say: Callable[[str], None] = print
) -> Steps:
    """Both precisions, one after another, each for at most `limit_s` seconds. A run that fails is one that says so."""
    params = cost.num_params(_config(words, PRECISIONS[0]).model).trained
    runs = []
    for precision in PRECISIONS:
        say(f"training {params / 1e9:.3g} B parameters in {precision} for {steps} steps ...")
        runs.append(_train(words, folder, precision, steps, limit_s))
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return Steps(device=device, date=date, words=list(words), parameters=params, runs=runs)


def _train(words: Sequence[str], folder: Path, precision: str, steps: int, limit_s: float) -> StepRun:
    folder.mkdir(parents=True, exist_ok=True)
    name = f"step-{precision}-{time.time_ns()}"
    own = [f"precision={precision}", f"name={name}", f"run_dir={folder.resolve() / name}", f"train.steps={NEVER}"]
    command = [sys.executable, "-m", "shoestring.train", *words, *own, f"checkpoint.interval={NEVER}"]
    with open(folder / f"{name}.log", "w+") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            code = _wait(process, folder / name / "metrics.jsonl", steps, time.monotonic() + limit_s)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its ranks too, where it has started any
            process.wait()
        log.seek(0)
        last = next((line.strip() for line in reversed(log.readlines()) if line.strip()), "it said nothing")
    records = _records(folder / name / "metrics.jsonl")[:steps]
    error = ""
    if len(records) < steps:
        error = (
            f"{len(records)} of {steps} steps in {limit_s:.0f} s"
            if code is None
            else f"ended with {code} after {len(records)} steps: {last}"
        )
    return of_records(records, precision, state_bytes(_config(words, precision)), error)


def _wait(process: subprocess.Popen, path: Path, steps: int, until: float) -> int | None:
    """Until the records are there (None), the time is over (None), or the process has ended: its exit code."""
    while time.monotonic() < until and process.poll() is None and len(_records(path)) < steps:
        time.sleep(0.2)
    return process.poll()


def _records(path: Path) -> list[metrics.StepRecord]:
    return list(metrics.scan_records(path, lambda *_: None)) if path.exists() else []  # a line may be half written


def of_records(records: Sequence[metrics.StepRecord], precision: str, state: int, error: str = "") -> StepRun:
    middle = lambda values: statistics.median(known) if (known := [v for v in values if v is not None]) else None
    steady = records[SLOW:]
    return StepRun(
        precision=precision,
        tokens_per_second=middle(r.tokens_per_second for r in steady),
        mfu=middle(r.mfu for r in steady),
        memory_gb=max((r.memory_gb for r in records if r.memory_gb is not None), default=None),
        state_gb=state / 1e9,
        losses=[r.loss for r in records if math.isfinite(r.loss)],
        error=error,
    )


def write(path: Path, steps: Steps) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    metrics.replace_file(path, json.dumps(dataclasses.asdict(steps) | {"ratio": steps.ratio}, indent=1, allow_nan=False) + "\n")
    return path
