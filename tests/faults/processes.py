"""Faults of processes, on purpose: at one step of one rank, once in a run, through what a rank's `train` is given and nothing else.

    sigkill sigterm sigstop       the rank sends itself that signal
    exception                     raised where forward begins
    skipped_collective            the all-reduce of the step's gradient norm is not taken part in
    slow                          the rank sleeps for `seconds` in `phase`
    clock                         from then on `time.time` is `seconds` ahead (or behind)
    zero_tokens                   in that step, no token goes to the experts of that expert-parallel rank; on all ranks
    data_away, data_gone          reads of token files fail with EIO: the next three; from then on
    wandb_away                    W&B's server is not there (with `launch.wandb=online`)
    second_job                    another job asks for the run directory; what it is told is kept

What happened when is left in RUN_DIR/faults, in seconds of the monotonic clock: NAME when it was injected, NAME.again when this rank has
begun the first step of a later try; RUN_DIR/restarts.jsonl has when the launcher saw it.
"""

import contextlib
import errno
import json
import os
import random
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from shoestring.conf.errors import ConfigError
from shoestring.conf.rules import replaced
from shoestring.conf.schema import Config
from shoestring.launch import elastic, launcher, lease
from shoestring.train import trainer
from shoestring.train.data import patience, token_cache
from shoestring.train.engine import Watch

SIGNALS = {"sigkill": signal.SIGKILL, "sigterm": signal.SIGTERM, "sigstop": signal.SIGSTOP}
PHASE = {"exception": "forward and backward", "skipped_collective": "reduce"}  # of the others: data
KINDS = (*SIGNALS, *PHASE, "slow", "clock", "zero_tokens", "data_away", "data_gone", "wandb_away", "second_job")


@dataclass(frozen=True, kw_only=True)
class Fault:
    """`phase`: of the step ("": the kind's own). `always`: each time that the step is begun, not only the first."""

    kind: str
    rank: int
    step: int
    phase: str = ""
    seconds: float = 0.0
    always: bool = False

    def __post_init__(self):
        assert self.kind in KINDS, self.kind

    @property
    def name(self) -> str:
        return f"{self.kind}-rank{self.rank}-step{self.step}"

    @property
    def at(self) -> str:
        return self.phase or PHASE.get(self.kind, "data")


def twice(kind: str, seed: int, *, world_size: int, steps: int, **more) -> list[Fault]:
    """Two faults of a kind, at different steps of a run of so many and on ranks that the seed chooses; none in the first step."""
    rng = random.Random(f"{kind}/{seed}")
    return [Fault(kind=kind, rank=rng.randrange(world_size), step=step, **more) for step in sorted(rng.sample(range(2, steps + 1), 2))]


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
        self.before = [f for f in self.faults if (self.folder / f.name).exists()]  # of earlier tries
        starved = [f for f in faults if f.kind == "zero_tokens"]
        self.watch = Starved(starved, config) if starved else None
        self.step = 0
        if any(f.kind == "wandb_away" for f in faults):
            stack.enter_context(mock.patch.dict(os.environ, WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY="0" * 40))

    def __call__(self, phase: str, step: int | None = None) -> None:
        self.beat(phase, step)
        self.step = self.step if step is None else step
        if phase == "data":
            for f in self.before:
                self._note(f"{f.name}.again")
            self.before = []
        for f in self.faults:
            if (f.step, f.at) == (self.step, phase) and (f.always or not (self.folder / f.name).exists()):
                self._note(f.name)
                self._do(f)

    def _note(self, name: str) -> None:
        if not (self.folder / name).exists():
            (self.folder / name).write_text(f"{time.monotonic()}\n")

    def _do(self, f: Fault) -> None:
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
            self.stack.enter_context(data_away(3 if f.kind == "data_away" else sys.maxsize))
        elif f.kind == "second_job":
            (self.folder / f"{f.name}.told").write_text(second_job(self.config))


def _skip_norm() -> None:
    """The next all-reduce of one number. (Gloo ends a process at once that meets another tensor than its peers': here they wait.)"""
    real = dist.all_reduce

    def skipped(tensor: torch.Tensor, *args, **kwargs):
        if tensor.numel() > 1:
            return real(tensor, *args, **kwargs)
        dist.all_reduce = real

    dist.all_reduce = skipped


@contextlib.contextmanager
def data_away(times: int) -> Iterator[None]:
    """So many reads of token files in this process fail. Pauses between tries are short meanwhile."""
    left = [times]

    def away(path, *args, **kwargs):
        if left[0] and str(path).endswith(".bin"):
            left[0] -= 1
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return open(path, *args, **kwargs)

    with mock.patch.object(token_cache, "open", away, create=True), mock.patch.object(patience, "PAUSES_S", (0.05, 0.1, 0.2, 0.4)):
        yield


def second_job(config: Config) -> str:
    """What another job in the run directory is told; "" if it were let in."""
    try:
        with lease.held(Path(config.run_dir), log=lambda line: None):
            return ""
    except ConfigError as error:
        return str(error)


class Starved(Watch):
    """In the steps of the faults, an expert-parallel rank's experts get no token, whoever sends them."""

    def __init__(self, faults: Sequence[Fault], config: Config):
        self._rank_of = {f.step: f.rank % config.parallel.ep for f in faults}
        self._experts = config.model.num_experts // config.parallel.ep

    def routing(self, step: int, samples: Sequence[int]):
        if step + 1 not in self._rank_of or self._rank_of[step + 1] is None:
            return None
        first = self._rank_of[step + 1] * self._experts

        def choose(layer, select, score_TE):
            away_E = torch.zeros(score_TE.shape[1], dtype=score_TE.dtype)
            away_E[first : first + self._experts] = 10.0  # below any score
            return select(score_TE - away_E)

        return choose


# ---------------------------------------------------------------- runs


@dataclass(frozen=True, kw_only=True)
class Ran:
    """A launch that is over: its exit code, what it printed, and the times of its faults (monotonic seconds), by name."""

    code: int
    text: str
    injected: dict[str, float]
    again: dict[str, float]
    restarts: list[dict]


def launch(config: Config, *faults: Fault, timeout_s: float = 120.0) -> Ran:
    """As `shoestring train` on this machine would, in a process of its own; with all that it has started, it is gone afterwards."""
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    output = run_dir / "output.txt"
    sys.stdout.flush(), sys.stderr.flush()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.setsid()
            with open(output, "ab") as file:
                for target in {1, 2, sys.stdout.fileno(), sys.stderr.fileno()}:
                    os.dup2(file.fileno(), target)
            with lease.held(run_dir):
                code = launcher.here(config, "cpu", ["shoestring", "train"], Faulty(*faults))
            sys.stdout.flush(), sys.stderr.flush()
        finally:
            os._exit(code)
    code = _wait(child, timeout_s)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    return _ran(run_dir, code, output.read_text(errors="replace"))


def node_loss(config: Config, fault: Fault, survivors: int, *, timeout_s: float = 120.0) -> tuple[Ran, Ran]:
    """A rank is killed and not replaced: the first job ends, and one of `survivors` ranks goes on, as torchrun's elastic ranks would."""
    lost = launch(replaced(config, "launch.max_restarts", 0), fault, timeout_s=timeout_s)
    return lost, launch(elastic.fitting(config, survivors), timeout_s=timeout_s)


def _wait(child: int, timeout_s: float) -> int:
    until = time.monotonic() + timeout_s
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0:
        if time.monotonic() > until:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise TimeoutError(f"the launch was not over after {timeout_s:g} s")
        time.sleep(0.02)
    return os.waitstatus_to_exitcode(ended[1])


def _ran(run_dir: Path, code: int, text: str) -> Ran:
    times = {path.name: float(path.read_text()) for path in (run_dir / "faults").glob("*") if path.suffix != ".told"}
    restarts = run_dir / "restarts.jsonl"
    return Ran(
        code=code,
        text=text,
        injected={name: at for name, at in times.items() if not name.endswith(".again")},
        again={name.removesuffix(".again"): at for name, at in times.items() if name.endswith(".again")},
        restarts=[json.loads(line) for line in restarts.read_text().splitlines()] if restarts.exists() else [],
    )
