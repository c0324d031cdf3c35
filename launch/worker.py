"""One rank: its device, its process group, the trainer, and an exit code for whatever came of it."""

import json
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from ..conf import files
from ..conf.schema import Config, LaunchConfig
from ..parallel import world
from ..parallel.flight import FOLDER, answer_when_asked, last_begun, tidy, write_flight
from ..train import trainer
from ..train.replay import WrongGradients
from . import device, environment, exit_codes, pinning, secrets
from .environment import Place
from .finish import conclude
from .heartbeats import Heartbeat
from .rank_log import Tell

Train = Callable[..., trainer.Outcome]


class Stop:
    """Asked by the trainer between steps: has SIGTERM or SIGINT come? Calling it tells.

    Further signals change nothing, as a terminal's Ctrl-C reaches a rank both directly and from its launcher. A process that is its own
    launcher (`alone`) takes a second one as the wish to end at once: KeyboardInterrupt.
    """

    def __init__(self, *, alone: bool):
        self._alone, self._asked = alone, False

    def __call__(self) -> bool:
        return self._asked

    def install(self) -> "Stop":
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)
        return self

    def _on_signal(self, number, frame) -> None:
        if self._alone and self._asked:
            raise KeyboardInterrupt
        self._asked = True


def run(
    config: Config,
    place: Place,
    command: Sequence[str],
    train: Train = trainer.run,
    *,
    failures: Path | None = None,
    tell: Tell | None = None,
) -> int:
    """Train as one rank; the exit code (`launch/exit_codes.py`). Rank 0 ends with what `command` has made and how to go on.

    An error is one line on stderr (and to `tell`, of a rank without the console), or a file in the folder `failures`, from which a launcher
    can tell which rank's came first.
    """
    webhook = environment.named(config.launch.alerts.webhook)
    secrets.install(webhook)
    stop = Stop(alone=place.world_size == 1).install()
    flight = flight_folder(Path(config.run_dir), failures)
    try:
        cpus = pinning.pin(config.cluster.pin, place.local_rank, place.local_world_size, device.choose_type(config))
        chosen = device.start(config, place)
        beat = _join(config, place, chosen, flight)
        if place.rank == 0 and (told := [*environment.told(config.cluster), *([cpus] if cpus else [])]):
            _say(f"rank 0 runs with {'; '.join(told)}; the others likewise")
        outcome = train(config, chosen, stop=stop, log=_say, beat=beat, job=_job(place), webhook=webhook, hide=secrets.hide)
        world.leave()
        tidy(flight, place.rank)
        if place.rank == 0:
            _say(conclude(config, outcome, command))
    except BaseException as error:
        return _report(error, place, flight, failures, tell)
    if outcome.spent:
        return exit_codes.BUDGET
    if outcome.stopped:
        return exit_codes.PREEMPTED
    return exit_codes.OTHER_SIZE if outcome.wants else exit_codes.OK


def run_launched(config: Config, failures: Path, command: Sequence[str], train: Train = trainer.run) -> int:
    """`run` in a process that our launcher started. A failed rank leaves at once: its peers are gone or stuck, so nothing can be closed."""
    code = run(config, Place.from_environment(), command, train, failures=failures)
    if code not in exit_codes.AGREED:
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)
    return code


def flight_folder(run_dir: Path, failures: Path | None = None) -> Path:
    """Where the ranks of one try leave what they were at when they lost each other; each has its own, so that they stay."""
    part = failures.name if failures else environment.restart()
    return run_dir / FOLDER / part if part else run_dir / FOLDER


def _job(place: Place) -> str:
    """A name that all sessions of one job share: torchrun's, or the process of our launcher."""
    return environment.session() or str(os.getppid() if place.world_size > 1 else os.getpid())


def _join(config: Config, place: Place, on: torch.device, flight: Path) -> Heartbeat:
    """Into the world, with which this rank's files in the run directory are its own."""
    alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if place.world_size == 1 else {}
    if on.type == "cuda":
        environment.record_flight(flight)
    world.join(on, timeout_s=config.launch.timeout_s, **alone)
    if place.rank == 0 and config.launch.timeout_s != LaunchConfig.timeout_s:
        _say(f"collectives are given up after {config.launch.timeout_s:g} s (launch.timeout_s)")
    (flight / f"rank_{place.rank}.json").unlink(missing_ok=True)  # an earlier session's
    answer_when_asked(flight, place.rank)
    return Heartbeat(Path(config.run_dir), place.rank)


def _say(text: str) -> None:
    print(text, flush=True)


def _report(error: BaseException, place: Place, flight: Path, failures: Path | None, tell: Tell | None) -> int:
    at, code = time.monotonic(), exit_codes.of(error)
    message = (f"rank {place.rank}: " if place.world_size > 1 else "") + exit_codes.sentence(error)
    if code == exit_codes.LOST and dist.is_initialized() and not isinstance(error, WrongGradients):  # which waited for nobody
        message += f"; begun last: {last_begun()}; more in {write_flight(flight, error, hide=secrets.hide)}"
    trace = secrets.hide(traceback.format_exc()) if code == exit_codes.FAILED else ""
    if failures is None:
        print(f"{trace}error: {message}", file=sys.stderr, flush=True)
        if tell:
            tell(message, code)
    else:
        record = {"time": at, "rank": place.rank, "code": code, "message": message, "traceback": trace}
        files.replace(failures / f"failure-{place.rank}.json", json.dumps(record))
    return code
