"""Whole runs under faults: launched as `shoestring train` would, each in a process of its own, with every line that it prints and when."""

import contextlib
import json
import os
import select
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shoestring.conf.schema import Config
from shoestring.launch import exit_codes, launcher, lease

from .processes import Fault, Faulty


@dataclass(frozen=True, kw_only=True)
class Ran:
    """A launch that is over: its exit code, what it printed, and the times of its faults (monotonic seconds), by name."""

    code: int
    began: float
    ended: float
    lines: list[tuple[float, str]]  # when, and what; loggers' on any rank among them
    injected: dict[str, float]
    again: dict[str, float]
    restarts: list[dict]

    @property
    def text(self) -> str:
        return "\n".join(line for _, line in self.lines)


def launch(config: Config, *faults: Fault, timeout_s: float = 120.0) -> Ran:
    """As `shoestring train` on this machine would. With all that it has started, it is gone afterwards."""
    run_dir = Path(config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush(), sys.stderr.flush()
    began, (reader, writer) = time.monotonic(), os.pipe()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            os.setsid()
            os.close(reader)
            for target in {1, 2, sys.stdout.fileno(), sys.stderr.fileno()}:
                os.dup2(writer, target)
            os.close(writer)
            with lease.held(run_dir):
                code = launcher.here(config, "cpu", ["shoestring", "train"], Faulty(*faults))
        except BaseException as error:
            print(f"error: {exit_codes.sentence(error)}", flush=True)
            code = exit_codes.of(error)
        finally:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(code)
    os.close(writer)
    try:
        lines, code = _hear(reader, child, began + timeout_s)
    finally:
        os.close(reader)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child, signal.SIGKILL)
    return _ran(run_dir, code, began, lines)


def _hear(reader: int, child: int, until: float) -> tuple[list[tuple[float, str]], int]:
    """What is printed, line by line, until the process ends; its exit code."""
    lines, rest, code = [], b"", None
    while True:
        while select.select([reader], [], [], 0 if code is not None else 0.02)[0] and (data := os.read(reader, 1 << 16)):
            *whole, rest = (rest + data).split(b"\n")
            lines += [(time.monotonic(), line.decode(errors="replace")) for line in whole]
        if code is not None:
            return lines, code
        if (ended := os.waitpid(child, os.WNOHANG))[0]:
            code = os.waitstatus_to_exitcode(ended[1])
        elif time.monotonic() > until:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise TimeoutError("the launch was not over in time; it said:\n" + "\n".join(line for _, line in lines))


def _ran(run_dir: Path, code: int, began: float, lines: list[tuple[float, str]]) -> Ran:
    folder = run_dir / "faults"
    times = {path.name: float(path.read_text()) for path in folder.glob("*") if path.name != "told.jsonl"}
    told = [(at, text) for at, text in _json_lines(folder / "told.jsonl") if at > began]
    return Ran(
        code=code,
        began=began,
        ended=time.monotonic(),
        lines=sorted([*lines, *told]),
        injected={name: at for name, at in times.items() if not name.endswith(".again")},
        again={name.removesuffix(".again"): at for name, at in times.items() if name.endswith(".again")},
        restarts=list(_json_lines(run_dir / "restarts.jsonl")),
    )


def _json_lines(path: Path) -> Iterator:
    return (json.loads(line) for line in path.read_text().splitlines()) if path.exists() else iter(())
