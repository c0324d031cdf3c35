"""The jobs of `shoestring train --multirun`, one after the other, each in a process of its own: what ends one does not end the others.

The same command again trains what is not complete yet. A signal reaches the job that runs, which saves and ends, and the sweep with it.
"""

import functools
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ..conf.errors import ConfigError
from ..conf.sweep import Job
from ..train import units
from . import environment, exit_codes
from .overview import read, table
from .ranks import end_with
from .validate import validate

_NOT_STARTED = "–"


def run(jobs: Sequence[Job], more: Sequence[str] = ()) -> int:
    """Check all of them, then train them in order; the first exit code that is not 0. `more`: words for all, as --config-dir."""
    if wrong := [f"{job}: {error}" for job in jobs if (error := _error(job))]:
        print(*(f"error: {line}" for line in wrong), sep="\n", file=sys.stderr)
        return exit_codes.CONFIG
    codes: dict[int, int] = {}
    with _Signals() as signals:
        for job in jobs:
            if signals.asked:
                break
            if read.read(Path(job.config.run_dir)).state == "complete":
                _say(f"{job}: {job.config.run_dir} is complete")
                codes[job.number] = exit_codes.OK
            else:
                _say(f"\n{job} of {len(jobs)}: {job.config.run_dir}")
                codes[job.number] = _train([*job.words, *more], signals)
    _say(f"\n{_results(jobs, codes)}")
    if len(codes) < len(jobs):
        _say("stopped: the same command goes on")
    missed = [exit_codes.PREEMPTED] * (len(codes) < len(jobs))
    return next((code for code in [*codes.values(), *missed] if code), exit_codes.OK)


def _error(job: Job) -> ConfigError | None:
    try:
        validate(job.config) if job.config else None
    except ConfigError as error:
        return error
    return job.error


def _train(words: Sequence[str], signals: "_Signals") -> int:
    """In a session of its own: a terminal's Ctrl-C comes once, from here."""
    command = [sys.executable, "-m", "shoestring.train", *words]
    with_us = functools.partial(end_with, os.getpid())
    with subprocess.Popen(
        command, env=environment.of_a_job(), stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=with_us
    ) as process:
        signals.go_to(process)
        code = process.wait()
        signals.go_to(None)
    if code >= 0:
        return code
    return exit_codes.PREEMPTED if signals.asked else exit_codes.LOST  # by a signal that came before it could answer, or by the system


def _results(jobs: Sequence[Job], codes: dict[int, int]) -> str:
    rows = [("job", "settings", "steps", "loss", "held out", "tokens/s", "spent", "exit code")]
    for job in jobs:
        r = read.read(Path(job.config.run_dir)) if Path(job.config.run_dir).is_dir() else None
        cells = (
            f"{r.step or 0}/{r.steps or '–'}", table.loss(r.loss), table.loss(r.eval_loss), units.count(r.tokens_per_second),
            units.money(r.dollars),
        ) if r else ("–",) * 5  # fmt: skip
        rows.append((str(job.number), " ".join(job.own), *cells, str(codes.get(job.number, _NOT_STARTED))))
    return table.align(rows, [True, False, *[True] * 6])


class _Signals:
    """SIGTERM and SIGINT, meanwhile: each is passed to the running job as a SIGTERM, and no further job is started."""

    def __init__(self):
        self.asked = self._passed = 0
        self._process: subprocess.Popen | None = None

    def __enter__(self) -> "_Signals":
        self._before = {number: signal.signal(number, self._on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def go_to(self, process: subprocess.Popen | None) -> None:
        self._process = process
        self._pass()

    def _on_signal(self, number, frame) -> None:
        self.asked += 1
        self._pass()

    def _pass(self) -> None:
        while self._process and self._passed < self.asked:
            self._passed += 1
            self._process.send_signal(signal.SIGTERM)


def _say(text: str) -> None:
    print(text, flush=True)
