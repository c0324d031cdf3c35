"""Under torchrun, whose restarts these are: which of our ends may be restarted, a layout that fits the nodes that are left, exit codes.

    python -m shoestring.launch.elastic --nnodes 1:2 --max-restarts 3 ... -m shoestring.train KEY=VALUE ...

is torchrun, with two things set right: ranks meet over a store of their own, without which about half of all restarts on gloo fail; and it
ends with our exit code, where torchrun ends with 1 and a traceback, also after a SIGTERM that every rank has answered by saving.
"""

import contextlib
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.elastic.rendezvous import RendezvousError

from ..conf import files, rules
from ..conf.errors import ConfigError, closest, divisors
from ..conf.phases import phases
from ..conf.schema import Config
from . import environment, exit_codes, last_try, lease, secrets
from .environment import Place
from .validate import validate


def fitted(config: Config, place: Place) -> Config:
    """The configuration for the ranks that there are: another one only where `launch.elastic` says so. Rank 0 tells of it."""
    if not config.launch.elastic:
        return config
    found = fitting(config, place.world_size)
    if found is not config and place.rank == 0:
        for was, now in ((was.config, now.config) for was, now in zip(phases(config), phases(found))):
            print(
                f"launch.elastic: {place.world_size} processes for a layout of {was.parallel.world_size}: "
                f"parallel.edp={now.parallel.edp} instead of {was.parallel.edp}; the global batch stays, in {now.num_micro_batches} "
                f"micro-batches of {now.train.micro_batch_sequences} in each pipeline instead of {was.num_micro_batches} of "
                f"{was.train.micro_batch_sequences}",
                flush=True,
            )
    return found


def fitting(config: Config, world_size: int) -> Config:
    """The same run on `world_size` ranks: pp, ep and the global batch stay, edp is what that leaves, and a micro-batch has the most
    sequences, up to the configured number, that the batch is a multiple of. `config` itself where it fits as it is.

    Raises ConfigError where there is no such layout.
    """
    if config.phases:
        fitted_ones = {name: fitting(phase, world_size) for name, phase in config.phases.items()}
        changed = any(fitted_ones[name] is not phase for name, phase in config.phases.items())
        return rules.replaced(config, "phases", type(config.phases)(fitted_ones)) if changed else config
    return _one(config, world_size)


def _one(config: Config, world_size: int) -> Config:
    p = config.parallel
    if p.world_size == world_size:
        return config
    unit = p.pp * p.ep
    if world_size % unit:
        rule = f"of pp x ep = {p.pp} x {p.ep} = {unit} processes none can be left out, and {world_size} is no multiple of that"
        raise ConfigError("number of processes", world_size, rule, closest(world_size, [unit * max(1, world_size // unit)]))
    shrunk = rules.replaced(config, "parallel.edp", world_size // unit)
    first: ConfigError | None = None
    for size in reversed(divisors(config.train.micro_batch_sequences)):
        candidate = rules.replaced(shrunk, "train.micro_batch_sequences", size)
        try:
            rules.check(candidate)
            validate(candidate, world_size)
            return candidate
        except ConfigError as error:
            first = first or error
    sizes = [unit * n for n in range(1, world_size // unit) if not _sequences(config) % (p.ep * n)]
    rule = f"there is no layout for so many that keeps pp = {p.pp} and ep = {p.ep} ({first})"
    raise ConfigError("number of processes", world_size, rule, sizes[-1] if sizes else None)


def _sequences(config: Config) -> int:
    return config.train.global_batch_tokens // config.data.seq_len


# ---------------------------------------------------------------- a rank


def run_rank(config: Config, place: Place, run: Callable[..., int], command: Sequence[str]) -> int:
    """`run(config, place, command)` as one of torchrun's ranks; its exit code, or that of an earlier try that no restart can better.

    Rank 0 has the run directory meanwhile. Raises ConfigError, on that rank, where another job has it.
    """
    ended = _Ended(os.getppid())
    if (code := ended.read()) is not None and environment.restart():
        return code
    if place.rank:
        return ended.write(run(config, place, command))
    if environment.restarts_share_store():
        print(
            "torchrun may restart these ranks, and on gloo about half of its restarts fail unless "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 is set for it: `python -m shoestring.launch.elastic` in torchrun's place does so",
            flush=True,
        )
    run_dir = Path(config.run_dir)
    with lease.held(run_dir, session=environment.session()):
        return ended.write(last_try.recorded(run_dir, lambda: run(config, place, command)))


class _Ended:
    """A note for the next ranks of the same agent (torchrun's process on this machine): with what code the last ended, where a restart
    would change nothing. Torchrun restarts after any code but 0."""

    def __init__(self, agent: int):
        self._path = Path(tempfile.gettempdir()) / f"shoestring-ended-{agent}-{lease.born(agent) or 0}"

    def read(self) -> int | None:
        """None also for a note that is not this user's: the folder is everybody's."""
        with contextlib.suppress(OSError, ValueError), files.reading(self._path) as file:
            return int(file.read(8)) if os.fstat(file.fileno()).st_uid == os.geteuid() else None
        return None

    def write(self, code: int) -> int:
        if environment.under_torchrun() and code not in (exit_codes.OK, exit_codes.FAILED, exit_codes.LOST):
            with contextlib.suppress(OSError), files.fresh(self._path, private=True) as file:
                file.write(str(code).encode())
        return code

    def take(self) -> int | None:
        code = self.read()
        with contextlib.suppress(OSError):  # somebody else's, who has taken the name
            self._path.unlink(missing_ok=True)
        return code


# ---------------------------------------------------------------- in torchrun's place


def main(argv: Sequence[str]) -> int:
    """Run torchrun in this process; our exit code."""
    secrets.install()
    environment.prepare_torchrun()
    ended, code = _Ended(os.getpid()), exit_codes.OK
    try:
        torchrun.run(torchrun.parse_args(list(argv)))
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
    except SignalException as error:
        code = 128 + error.sigval
    except RendezvousError as error:
        print(f"error: no rendezvous ({error}): is the machine of --rdzv-endpoint there? Start again with one that is", file=sys.stderr)
        code = exit_codes.LOST
    told = ended.take()
    return told if told is not None and code else code if 0 <= code < 256 else exit_codes.LOST


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
