"""Training from one command: as a rank where torchrun has started us, in this process for a world of one, else by starting the ranks.

Ranks on this machine are started by torch's elastic launcher. On CPU they are forked from this process, which has paid for the imports
(a second instead of ten); CUDA does not survive a fork, so GPU ranks are spawned. Rank 0 has the console; the others write to
`RUN_DIR/logs`, and are heard when they fail.
"""

import contextlib
import json
import logging
import multiprocessing
import os
import pkgutil
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ..conf.phases import phase_at
from ..conf.rules import replaced
from ..conf.schema import Config, ConfigError
from ..parallel.flight import who_is_missing
from . import device, environment, exit_codes
from .validate import validate

# By name: it imports deepspeed, which looks for its device when it is imported, so that must be settled first.
_WORKER = "shoestring.launch.worker"


def train(config: Config, command: Sequence[str]) -> int:
    """Train, however this process was started; the exit code. Raises ConfigError before any process starts.

    `command`: the words that asked for it, to be shown again.
    """
    place = environment.Place.from_environment()
    try:
        validate(config, place.world_size if place else None)
        kind = device.choose_type(config)
    except ConfigError:
        if place and place.rank:
            return exit_codes.CONFIG  # every rank finds the same: rank 0 says it
        raise
    environment.tell_deepspeed(kind)
    if place:
        return pkgutil.resolve_name(f"{_WORKER}:run")(config, place, command)
    while True:  # phase by phase, as far as their numbers of ranks differ
        done = _steps_done(config)
        world_size = phase_at(config, done).config.parallel.world_size
        if world_size == 1:
            code = pkgutil.resolve_name(f"{_WORKER}:run")(config, environment.Place(), command)
        else:
            code = start(config, kind, pkgutil.resolve_name(f"{_WORKER}:run_launched"), command, world_size=world_size)
        if code != exit_codes.OTHER_SIZE:
            return code
        config = replaced(config, "checkpoint.resume", "auto")  # from what this session saved
        if config.train.stop_after:
            config = replaced(config, "train.stop_after", config.train.stop_after - (_steps_done(config) - done))


def _steps_done(config: Config) -> int:
    return pkgutil.resolve_name("shoestring.train.resume:steps_done")(config)


def start(config: Config, device_type: str, target: Callable[..., int], *args: Any, world_size: int) -> int:
    """Run `target(config, failures, *args)` in `world_size` ranks on this machine; the exit code of the whole.

    `target` returns an exit code, or leaves with one after writing `failures / "failure-RANK.json"` (see `worker.run`).
    """
    logs = Path(config.run_dir) / "logs" / time.strftime("%Y%m%d-%H%M%S")
    logs.mkdir(parents=True, exist_ok=True)
    environment.prepare_launch(device_type == "cpu")
    for chatty in ("torch.distributed.elastic", "torch.multiprocessing.spawn"):
        logging.getLogger(chatty).setLevel(logging.CRITICAL + 1)  # what they have to say, `_explain` says
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=world_size,
        run_id="ranks",
        rdzv_backend="c10d",
        rdzv_endpoint="127.0.0.1:0",
        local_addr="127.0.0.1",
        max_restarts=0,
        start_method="fork" if device_type == "cpu" else "spawn",
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects={rank: Std.ALL for rank in range(1, world_size)}),
        signals_to_handle="SIGHUP,SIGQUIT",  # SIGTERM and SIGINT are ours, see `_forwarding`
    )
    with _forwarding() as state:
        try:
            codes = elastic_launch(settings, target)(config, logs, *args)
        except ChildFailedError as error:
            if state.killed:
                return exit_codes.INTERRUPTED
            return _explain(error.get_first_failure()[1], logs, world_size)
        except KeyboardInterrupt:
            return exit_codes.INTERRUPTED
    return codes[0]


class _Forwarding:
    """Passes the first SIGTERM or SIGINT to the ranks, which save and end; the second kills them."""

    def __init__(self):
        self.asked = self.killed = False
        self._launcher = os.getpid()

    def __call__(self, number, frame) -> None:
        if os.getpid() != self._launcher:  # a rank that was forked a moment ago and has no handler of its own yet
            os._exit(128 + number)
        ranks = multiprocessing.active_children()
        if not ranks:
            raise KeyboardInterrupt
        self.killed = self.asked
        if not self.asked:
            print("\nstopping: the ranks end this step and save; once more ends them at once", file=sys.stderr, flush=True)
        for rank in ranks:
            rank.kill() if self.killed else rank.terminate()
        self.asked = True


@contextlib.contextmanager
def _forwarding():
    state = _Forwarding()
    before = {number: signal.signal(number, state) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield state
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _explain(first: ProcessFailure, logs: Path, world_size: int) -> int:
    """Say which rank failed first and why; the exit code. `first` is the failure that the agent happened to see first."""
    records = [json.loads(path.read_text()) for path in logs.glob("failure-*.json")]
    # A rank whose peer has died finds its connection closed: an error of another kind is the cause, else the earliest.
    records.sort(key=lambda r: (r["code"] == exit_codes.LOST, r["time"]))
    if records and records[0]["code"] != exit_codes.LOST:
        cause = records[0]
        _say(cause["traceback"] + f"error: {cause['message']}", logs)
        return cause["code"]
    silent = sorted(set(range(world_size)) - {r["rank"] for r in records})
    who = [first.local_rank] if first.local_rank in silent else silent
    if first.local_rank in silent and first.exitcode < 0:
        how = f"was killed by {signal.Signals(-first.exitcode).name}" + (" (out of memory?)" if first.exitcode == -signal.SIGKILL else "")
    else:
        how = "died without a word (killed from outside, perhaps out of memory)"
    if who and not (records and "Timed out" in records[0]["message"]):
        _say(f"{_last_words(logs, who[0])}error: rank {', '.join(map(str, who))} {how}", logs)
    else:
        _say("\n".join([f"error: {records[0]['message']}", *who_is_missing(logs.parent.parent / "flight")]), logs)
    return exit_codes.LOST


def _last_words(logs: Path, rank: int) -> str:
    """The end of what a rank without the console wrote to stderr."""
    for path in logs.glob(f"*/attempt_0/{rank}/stderr.log"):
        return "".join(f"  rank {rank} | {line}\n" for line in path.read_text(errors="replace").splitlines()[-8:])
    return ""


def _say(text: str, logs: Path) -> None:
    print(f"{text}\nwhat the other ranks wrote: {logs}", file=sys.stderr, flush=True)
