"""How the last try in a run directory ended, for whoever looks later: `ending.json`, which the next start removes.

Written by who has the lease: our launcher, or torchrun's first rank. A process that was killed leaves none.
"""

import contextlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from ..conf import files
from ..conf.outside import parse_json
from ..train.metrics import from_plain, replace_file
from . import exit_codes

FILE = "ending.json"
_LONGEST = 1 << 20  # bytes of it that are read


@dataclass(frozen=True, kw_only=True)
class Ended:
    """`code`: see `exit_codes`; `what`: a sentence; `again`: its launcher is about to start the ranks again."""

    code: int
    what: str
    time_unix: float
    again: bool = False


def recorded(run_dir: Path, run: Callable[[], int]) -> int:
    """The exit code of `run`, which is noted with what it raised or means, unless `run` itself has noted more of it."""
    clear(run_dir)
    try:
        code = run()
    except BaseException as error:
        note(run_dir, exit_codes.of(error), exit_codes.sentence(error))
        raise
    said = read(run_dir)
    if said is None or said.again or said.code != code:
        note(run_dir, code)
    return code


def note(run_dir: Path, code: int, what: str = "", *, again: bool = False) -> None:
    """A disk that is full or gone is nothing to end for."""
    ended = Ended(code=code, what=what or exit_codes.MEANING.get(code, ""), time_unix=time.time(), again=again)
    with contextlib.suppress(OSError):
        replace_file(run_dir / FILE, json.dumps(asdict(ended)) + "\n")


def clear(run_dir: Path) -> None:
    with contextlib.suppress(OSError):
        (run_dir / FILE).unlink(missing_ok=True)


def read(run_dir: Path) -> Ended | None:
    """None where there is none, or none that can be read."""
    try:
        return from_plain(Ended, parse_json(files.read(run_dir / FILE, _LONGEST)))
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return None
