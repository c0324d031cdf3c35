"""Training from one command: as a rank where torchrun has started us, in this process for a world of one, else by starting the ranks.

Ranks that we start are started again when one is lost, and go on from the newest checkpoint: up to `launch.max_restarts` times in a row
without a new one between them.
"""

import contextlib
import functools
import json
import os
import pkgutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..conf import files
from ..conf.phases import phase_at
from ..conf.rules import replaced
from ..conf.schema import Config, ConfigError
from . import device, elastic, environment, exit_codes, last_try, lease, pinning, rank_log
from .cause import Ending
from .ranks import Ranks, Try
from .validate import validate

# By name: it imports deepspeed, which looks for its device when it is imported, so that must be settled first.
_WORKER = "shoestring.launch.worker"

_BACK_OFF_S = (0.5, 2.0, 8.0, 30.0)  # before the first restart in a row, the second, ...
_SLACK_S = 0.5  # ranks that wait for one that does not come say more about it than its silence does: they are first


def train(config: Config, command: Sequence[str]) -> int:
    """Train, however this process was started; the exit code. Raises ConfigError before any process starts.

    `command`: the words that asked for it, to be shown again.
    """
    place = environment.Place.from_environment()
    try:
        if place:
            config = elastic.fitted(config, place)
        validate(config, place.world_size if place else None)
        kind = device.choose_type(config)
    except ConfigError:
        if place and place.rank:
            return exit_codes.CONFIG  # every rank finds the same: rank 0 says it
        raise
    environment.tell_deepspeed(kind)
    if place:
        with rank_log.heard(Path(config.run_dir), place) as tell:
            run = functools.partial(pkgutil.resolve_name(f"{_WORKER}:run"), tell=tell)
            return elastic.run_rank(config, place, run, command)
    run_dir = Path(config.run_dir)
    with lease.held(run_dir):
        return last_try.recorded(run_dir, lambda: here(config, kind, command))


def here(config: Config, kind: str, command: Sequence[str], *args: Any) -> int:
    """Train on this machine: phase by phase, as far as their numbers of ranks differ, and again after a loss; the last try's exit code.

    `kind`: cpu or cuda. `args` go to `worker.run_launched` beside `command`, such as another `train`.
    """
    in_a_row, run_dir = 0, Path(config.run_dir)
    with _forwarding() as state:
        while True:
            last_try.clear(run_dir)
            done = _steps_done(config)
            world_size = phase_at(config, done).config.parallel.world_size
            if world_size == 1:
                with state.mine(), pinning.kept():
                    code = pkgutil.resolve_name(f"{_WORKER}:run")(config, environment.Place(), command, *args)
                ending = Ending(code=code)
            else:
                ending = _try(config, kind, state, pkgutil.resolve_name(f"{_WORKER}:run_launched"), command, *args, world_size=world_size)
            if state.killed:
                return exit_codes.INTERRUPTED
            if ending.code != exit_codes.OTHER_SIZE and (world_size == 1 or state.asked or not _worth_another(ending)):
                _say(ending)
                last_try.note(run_dir, ending.code, ending.what)
                return ending.code
            if config.checkpoint.resume == "never":
                config = replaced(config, "checkpoint.resume", "auto")  # from what this session has saved
            now = _steps_done(config)
            in_a_row = 0 if now > done else in_a_row + 1
            if ending.code != exit_codes.OTHER_SIZE:
                most = config.launch.max_restarts
                if not most or in_a_row > most or (config.train.stop_after and now - done >= config.train.stop_after):
                    _say(ending)
                    last_try.note(run_dir, ending.code, ending.what)
                    return ending.code
                last_try.note(run_dir, ending.code, ending.what, again=True)
                _say_restart(config, ending, in_a_row, now)
                state.sleep(_BACK_OFF_S[min(max(in_a_row, 1), len(_BACK_OFF_S)) - 1])
            if config.train.stop_after:
                config = replaced(config, "train.stop_after", config.train.stop_after - (now - done))
            if state.asked:
                return exit_codes.PREEMPTED


def start(config: Config, kind: str, target: Callable[..., int], *args: Any, world_size: int) -> int:
    """Run `target(config, logs, *args)` in `world_size` ranks on this machine, once; the exit code of the whole."""
    with _forwarding() as state:
        ending = _try(config, kind, state, target, *args, world_size=world_size)
    _say(ending)
    return exit_codes.INTERRUPTED if state.killed else ending.code


def _try(config: Config, kind: str, state: "_Forwarding", target: Callable[..., int], *args: Any, world_size: int) -> Ending:
    run_dir = Path(config.run_dir)
    what = Try(
        run_dir=run_dir,
        logs=(logs := _new_folder(run_dir / "logs")),
        flight=pkgutil.resolve_name(f"{_WORKER}:flight_folder")(run_dir, logs),
        target=target,
        args=(config, logs, *args),
        world_size=world_size,
        device_type=kind,
        patience_s=config.launch.hang_s or config.launch.timeout_s + _SLACK_S,
    )
    with Ranks(what) as ranks, state.to(ranks):
        return ranks.watch()


def _steps_done(config: Config) -> int:
    return pkgutil.resolve_name("shoestring.train.resume:steps_done")(config)


def _worth_another(ending: Ending) -> bool:
    """A loss is. An error of no known kind is where it came in a step: one that comes at the start will come again."""
    return ending.code == exit_codes.LOST or (ending.code == exit_codes.FAILED and ending.stepped)


class _Forwarding:
    """Passes the first SIGTERM or SIGINT to the ranks, which save and end; the second kills them."""

    def __init__(self):
        self.asked = self.killed = False
        self._launcher, self._ranks = os.getpid(), None

    def __call__(self, number, frame) -> None:
        if os.getpid() != self._launcher:  # a rank that was forked a moment ago and has no handler of its own yet
            os._exit(128 + number)
        self.killed = self.asked
        if not self.asked:
            print("\nstopping: the ranks end this step and save; once more ends them at once", file=sys.stderr, flush=True)
        self.asked = True
        if self._ranks:
            self._ranks.signal(signal.SIGKILL if self.killed else signal.SIGTERM)

    @contextlib.contextmanager
    def to(self, ranks: Ranks):
        self._ranks = ranks
        if self.asked:  # just before
            ranks.signal(signal.SIGTERM)
        try:
            yield
        finally:
            self._ranks = None

    @contextlib.contextmanager
    def mine(self):
        """A rank in this process has handlers of its own; ours come back after it."""
        try:
            yield
        finally:
            self.install()

    def install(self) -> dict:
        return {number: signal.signal(number, self) for number in (signal.SIGTERM, signal.SIGINT)}

    def sleep(self, seconds: float) -> None:
        """Or until somebody asks to stop."""
        until = time.monotonic() + seconds
        while not self.asked and (left := until - time.monotonic()) > 0:
            time.sleep(min(0.1, left))


@contextlib.contextmanager
def _forwarding():
    state = _Forwarding()
    before = state.install()
    try:
        yield state
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _new_folder(parent: Path) -> Path:
    """A name for the logs of a try, that nobody has yet."""
    name = time.strftime("%Y%m%d-%H%M%S")
    names = [name, *(f"{name}-{n}" for n in range(2, 1000))]
    return next(parent / n for n in names if not (parent / n).exists())


def _say(ending: Ending) -> None:
    if ending.what:
        print(f"{ending.detail}error: {ending.what}\nwhat the other ranks wrote: {ending.logs}", file=sys.stderr, flush=True)


def _say_restart(config: Config, ending: Ending, number: int, step: int) -> None:
    """Also for a program: a line of `restarts.jsonl`. Times are on the clock that `time.monotonic` reads."""
    most = config.launch.max_restarts
    of = f"restart {number} of {most} without a new checkpoint" if number else "with a checkpoint more than before"
    print(f"{ending.what}: all ranks start again from step {step} ({of}; logs: {ending.logs})", file=sys.stderr, flush=True)
    line = {
        "what": ending.what,
        "code": ending.code,
        "step": step,
        "in_a_row": number,
        "detail": ending.detail,
        "seen": ending.seen,
        "again": time.monotonic(),
    }
    with files.opened(Path(config.run_dir) / "restarts.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
