"""One try on this machine: the ranks are started, watched and ended, and it is found out which one's end was the cause.

On CPU they are forked from this process, which has paid for the imports (a second instead of ten); CUDA does not survive a fork, so GPU
ranks are spawned. Rank 0 has the console; the others write to the try's folder of logs, and are heard when they fail.

(torch's own launcher would wait half a minute for a rank that was stopped, and restart after any exit code.)
"""

import contextlib
import ctypes
import gc
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing import connection
from multiprocessing.connection import Connection
from pathlib import Path

import torch.distributed as dist

from ..conf import files
from ..parallel.flight import ASKED, asked_file, missing, tidy
from . import cause, environment, exit_codes, heartbeats, rank_log, secrets
from .cause import Ending

_TICK_S = 0.1
_QUIET_S = 0.5  # once a rank has failed, without a further one: then nobody is left who would tell more
_LONGEST_S = 5.0
_STACKS_S = 0.5  # for a rank to write its stacks


@dataclass(frozen=True, kw_only=True)
class Try:
    """What the ranks are started with. `target(config, logs, *args)` returns an exit code, or leaves with one after writing
    `logs/failure-RANK.json` (see `worker.run`)."""

    run_dir: Path
    logs: Path
    flight: Path  # where ranks that are lost leave what they were at
    target: Callable[..., int]
    args: tuple
    world_size: int
    device_type: str
    patience_s: float


class Ranks:
    """From `with` on they run; when it is left none does."""

    def __init__(self, what: Try):
        self.what = what
        self.codes: dict[int, int] = {}  # of ranks that have ended, in the order in which they did
        self.hanging: list[int] = []
        self.seen: float | None = None  # when the first was found to have failed, or not to answer
        self.stopped: set[int] = set()  # by a signal such as SIGSTOP, when they were ended
        self.watcher = heartbeats.Watcher(what.run_dir, what.world_size)

    def __enter__(self) -> "Ranks":
        what = self.what
        files.folder(what.run_dir, "logs", what.logs.name)
        heartbeats.forget(what.run_dir)
        environment.prepare_launch(what.device_type == "cpu")
        context = multiprocessing.get_context("fork" if what.device_type == "cpu" else "spawn")
        pipes = [context.Pipe(duplex=False) for _ in range(what.world_size)]
        self.processes = [
            context.Process(target=_main, args=(rank, os.getpid(), pipes[rank][0], what), name=f"rank {rank}")
            for rank in range(what.world_size)
        ]
        sys.stdout.flush(), sys.stderr.flush()
        for process in self.processes:
            process.start()
        # Not before: where a store is running when ranks are forked, one of them now and then never gets to it (2 of 120 starts). And not
        # by libuv: with it 1 start in 12 was five seconds late or more, while it asked a name server for who connects.
        # A port that torch opens itself listens on every address of the machine, whatever its name here.
        listening = socket.create_server(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        self._store = dist.TCPStore(
            "127.0.0.1", port, is_master=True, wait_for_workers=False, use_libuv=False, master_listen_fd=listening.detach()
        )
        for reader, writer in pipes:
            with reader, writer, contextlib.suppress(BrokenPipeError):  # a rank that is gone already
                writer.send(self._store.port)
        return self

    def __exit__(self, *_) -> None:
        for process in self.processes:
            if process.pid and process.exitcode is None:
                process.kill()
        for process in self.processes:
            process.join()

    def watch(self) -> Ending:
        """Until all have ended, or some must be ended because others failed or do not answer."""
        last_at = 0.0
        while left := self._left():
            ended = connection.wait([self.processes[rank].sentinel for rank in left], timeout=_TICK_S)
            now = time.monotonic()
            self.watcher.look()
            for rank in left:
                if self.processes[rank].sentinel in ended:
                    self.processes[rank].join()
                    self.codes[rank] = self.processes[rank].exitcode
                    self.seen, last_at = self.seen or (now if self.codes[rank] not in exit_codes.AGREED else None), now
            if self.seen and self._left():
                if now > min(last_at + _QUIET_S, self.seen + _LONGEST_S):
                    break
            elif self._left() and (hanging := self.watcher.hanging(self.what.patience_s)):
                self.hanging, self.seen = hanging, now
                break
        return self._conclude()

    def signal(self, number: int) -> None:
        for rank in self._left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.processes[rank].pid, number)

    def _left(self) -> list[int]:
        return [rank for rank in range(self.what.world_size) if rank not in self.codes]

    def _conclude(self) -> Ending:
        left = self._left()
        if not left and all(code in exit_codes.AGREED for code in self.codes.values()):
            return Ending(code=self.codes[0], seen=time.monotonic())
        self.stopped = {rank for rank in left if _state(self.processes[rank].pid) in ("T", "t")}
        lacking = missing(self.what.flight)
        self._ask_for_stacks(left)
        self.signal(signal.SIGKILL)
        tidy(self.what.flight, *range(self.what.world_size))
        return cause.find(
            self.what.logs,
            self.what.flight,
            codes=self.codes,
            left=left,
            hanging=self.hanging,
            stopped=self.stopped,
            lacking=lacking,
            watcher=self.watcher,
            seen=self.seen,
        )

    def _ask_for_stacks(self, ranks: Iterable[int]) -> None:
        """A stopped one is let go on for this: it would not answer. It is killed before it can do more."""
        begun = [rank for rank in ranks if rank in self.watcher.beats]  # the others would not know the signal
        for number in (ASKED, signal.SIGCONT):
            for rank in begun:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.processes[rank].pid, number)
        asked = [asked_file(self.what.flight, rank) for rank in begun]
        until = time.monotonic() + _STACKS_S
        while time.monotonic() < until and not all(file.exists() and file.stat().st_size for file in asked):
            time.sleep(0.02)


def _state(pid: int) -> str:
    """Of a process: R, S, D, T (stopped) ...; "" where it cannot be known."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def _main(rank: int, launcher: int, store_port: Connection, what: Try) -> None:
    """A rank's whole life."""
    gc.freeze()  # what the parent left is not searched for garbage, which would copy all its pages
    end_with(launcher)
    environment.become_rank(rank, what.world_size, store_port.recv())
    if rank:
        out, err = what.logs / f"rank_{rank}.stdout", what.logs / f"rank_{rank}.stderr"
        rank_log.take_over((out, sys.stdout, 1), (err, sys.stderr, 2))
    secrets.install()  # a rank that was forked has it, one that was spawned has not
    code = what.target(*what.args)
    sys.stdout.flush(), sys.stderr.flush()
    sys.exit(code)


def end_with(launcher: int) -> None:
    """Called in a child: without its launcher it is asked to stop, as by anybody else: it saves, and ends."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != launcher:  # it was gone before that
            os.kill(os.getpid(), signal.SIGTERM)
