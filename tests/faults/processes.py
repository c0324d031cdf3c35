"""Faults, on purpose: at one step of one rank, once in a run, through what a rank's `train` is given and nothing else.

    sigkill sigterm sigstop       the rank sends itself that signal
    exception                     raised where forward begins
    skipped_collective            the all-reduce of the step's gradient norm is not taken part in
    slow                          the rank sleeps for `seconds` in `phase`
    clock                         from then on `time.time` is `seconds` ahead (or behind)
    nan flip_gradient             in the midst of backward: a gradient is no number; a bit of one flips
    flip_weight flip_state        where forward begins: a bit of a weight, or of a moment, flips
    zero_tokens                   in that step, no token goes to the experts of that expert-parallel rank; on all ranks
    data_away data_gone           reads of token files fail with EIO: the next three; from then on
    corrupt_samples               what the step reads of token files is no token, this time and the next
    flip_checkpoint truncate      a bit of the newest checkpoint flips, or a file of it is cut; then the rank is killed
    lose_checkpoints              a bit of each checkpoint flips; then the rank is killed
    kill_save                     the rank is killed at a touch of the disk, in the save after that step
    disk_full                     the disk has room for a part of that save, on that rank
    wandb_away                    W&B's server is not there (with `launch.wandb=online`)
    second_job                    another job asks for the run directory; what it is told is kept

What happened when is left in RUN_DIR/faults, in seconds of the monotonic clock: NAME when it was injected, NAME.again when this rank next
begins a step, or has begun one in a later try. `told.jsonl` has what the ranks' loggers said.
"""

import contextlib
import json
import logging
import math
import os
import random
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from shoestring.conf.errors import ConfigError
from shoestring.conf.schema import Config
from shoestring.launch import lease
from shoestring.train import trainer
from shoestring.train.checkpoint.folder import candidates

from . import data, memory, storage

SIGNALS = {"sigkill": signal.SIGKILL, "sigterm": signal.SIGTERM, "sigstop": signal.SIGSTOP}
IN_STEP = ("exception", *memory.KINDS)
IN_SAVE = ("kill_save", "disk_full")
IN_CHECKPOINTS = ("flip_checkpoint", "truncate", "lose_checkpoints")
OTHERS = ("slow", "clock", "zero_tokens", "data_away", "data_gone", "corrupt_samples", "wandb_away", "second_job")
KINDS = (*SIGNALS, "skipped_collective", *IN_STEP, *IN_SAVE, *IN_CHECKPOINTS, *OTHERS)
PHASE = dict.fromkeys(IN_STEP, "forward and backward") | dict.fromkeys(IN_SAVE, "checkpoint") | {"skipped_collective": "reduce"}


@dataclass(frozen=True, kw_only=True)
class Fault:
    """`phase`: of the step ("": the kind's own). `ep`: ranks that share the experts, of `zero_tokens` (0: the layout's). `times`: that
    the step is struck when it is begun again and again in the same try; `always`: each time, in every try."""

    kind: str
    rank: int
    step: int
    phase: str = ""
    seconds: float = 0.0
    ep: int = 0
    times: int = 1
    always: bool = False

    def __post_init__(self):
        assert self.kind in KINDS, self.kind

    @property
    def name(self) -> str:
        return f"{self.kind}-rank{self.rank}-step{self.step}"

    @property
    def at(self) -> str:
        return self.phase or PHASE.get(self.kind, "data")


def twice(kind: str, seed: int, *, world_size: int, steps: int, first: int = 2, every: int = 1, **more) -> list[Fault]:
    """Two faults of a kind, on ranks and at steps that the seed chooses: from `first` on, multiples of `every`."""
    rng = random.Random(f"{kind}/{seed}")
    at = [step for step in range(first, steps + 1) if step % every == 0]
    return [Fault(kind=kind, rank=rng.randrange(world_size), step=step, **more) for step in sorted(rng.sample(at, 2))]


class Faulty:
    """Stands in for `trainer.run` where `worker.run` and `launcher.here` take another `train`."""

    def __init__(self, *faults: Fault):
        self.faults = faults

    def __call__(self, config: Config, device: torch.device, *, beat, **more):
        with contextlib.ExitStack() as stack:
            mine = _Mine(self.faults, config, beat, stack)
            return trainer.run(config, device, watch=mine.watch, beat=mine, **more)


class _Mine:
    """This rank's: a beat that does harm."""

    def __init__(self, faults: Sequence[Fault], config: Config, beat, stack: contextlib.ExitStack):
        self.folder, self.config, self.beat, self.stack = Path(config.run_dir) / "faults", config, beat, stack
        self.folder.mkdir(parents=True, exist_ok=True)
        self.faults = [f for f in faults if f.rank == dist.get_rank()]
        self.struck = [f for f in self.faults if (self.folder / f.name).exists()]
        self.left = {f: math.inf if f.always else 0 if f in self.struck else f.times for f in self.faults}
        self.watch = memory.Looking({f.step: (f.rank, f.ep or config.parallel.ep) for f in faults if f.kind == "zero_tokens"})
        self.step, self.phase, self.ticks, self.hit, self.passing = 0, "", 0, set(), stack.enter_context(contextlib.ExitStack())
        if any(f.kind == "wandb_away" for f in faults):
            stack.enter_context(mock.patch.dict(os.environ, WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY="0" * 40))
        handler = _Kept(self.folder / "told.jsonl")
        logging.getLogger().addHandler(handler)
        stack.callback(logging.getLogger().removeHandler, handler)

    def __call__(self, phase: str, step: int | None = None) -> None:
        self.beat(phase, step)
        self.step = self.step if step is None else step
        self.phase, self.ticks = (phase, 0) if phase else (self.phase, self.ticks + 1)
        self.hit = set() if phase else self.hit
        if phase == "data":
            self.passing.close()
            for f in self.struck:
                self._note(f"{f.name}.again")
            self.struck = []
        for f in self.faults:
            now = (f.step, f.at, f.kind in memory.MID_BACKWARD) == (self.step, self.phase, self.ticks > 0)
            if now and self.left[f] and f not in self.hit:
                rng = random.Random(f.name)
                if f.kind in memory.KINDS and not memory.KINDS[f.kind](self.watch.engine, rng):
                    continue  # not yet
                self.left[f] -= 1
                self.hit.add(f)
                self.struck.append(f)
                self._note(f.name)
                self._do(f, rng)

    def _note(self, name: str) -> None:
        if not (self.folder / name).exists():
            (self.folder / name).write_text(f"{time.monotonic()}\n")

    def _do(self, f: Fault, rng: random.Random) -> None:
        if f.kind in SIGNALS:
            os.kill(os.getpid(), SIGNALS[f.kind])
        elif f.kind == "exception":
            raise RuntimeError(f"injected into the forward pass of step {f.step}")
        elif f.kind == "skipped_collective":
            _skip_norm()
        elif f.kind == "slow":
            time.sleep(f.seconds)
        elif f.kind == "clock":
            now = time.time
            self.stack.enter_context(mock.patch.object(time, "time", lambda: now() + f.seconds))
        elif f.kind in ("data_away", "data_gone"):
            self.stack.enter_context(data.away(3 if f.kind == "data_away" else math.inf))
        elif f.kind == "corrupt_samples":
            self.passing.enter_context(data.garbled())
        elif f.kind in IN_CHECKPOINTS:
            found = candidates(Path(self.config.run_dir) / "checkpoints")
            for checkpoint in found if f.kind == "lose_checkpoints" else found[:1]:
                (storage.truncate if f.kind == "truncate" else storage.flip_bit)(checkpoint, rng.randrange(1 << 30))
            os.kill(os.getpid(), signal.SIGKILL)
        elif f.kind == "kill_save":
            self.passing.enter_context(storage.touching(storage.kill_at(rng.randrange(8), rng.randrange(1 << 30))))
        elif f.kind == "disk_full":
            self.passing.enter_context(storage.touching(storage.full_after(rng.randrange(20_000))))
        elif f.kind == "second_job":
            logging.getLogger("second job").warning(second_job(self.config))


class _Kept(logging.Handler):
    """What loggers say, with its time."""

    def __init__(self, path: Path):
        super().__init__()
        self._path = path

    def emit(self, record: logging.LogRecord) -> None:
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps([time.monotonic(), record.getMessage()]) + "\n")


def _skip_norm() -> None:
    """The next all-reduce of one number. (Gloo ends a process at once that meets another tensor than its peers': here they wait.)"""
    real = dist.all_reduce

    def skipped(tensor: torch.Tensor, *args, **kwargs):
        if tensor.numel() > 1:
            return real(tensor, *args, **kwargs)
        dist.all_reduce = real

    dist.all_reduce = skipped


def second_job(config: Config) -> str:
    """What another job in the run directory is told; "" if it were let in."""
    try:
        with lease.held(Path(config.run_dir), log=lambda line: None):
            return ""
    except ConfigError as error:
        return str(error)
