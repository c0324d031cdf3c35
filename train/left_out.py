"""Samples that a run leaves out: those that `data.skip` names, and those that its guard found could not be trained on.

A sample is its number in the stream. What the guard found is in RUN_DIR/left_out.json, on disk before the next step is taken, so that a
run that is killed goes on without them, too; and a new run that is told to skip the same samples is the same run, bit for bit.
"""

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..conf import files
from ..conf.errors import ConfigError
from ..conf.outside import parse_json
from .data.documents import DataError
from .metrics import BAD_LINE, from_plain, replace_file

NAME = "left_out.json"
_RANGE = re.compile(r"(\d+)(?:-(\d+))?")


@dataclass(frozen=True, kw_only=True)
class Window:
    """Samples `first` to `last` of a stream."""

    stream: int
    first: int
    last: int
    why: str = ""


def configured(skip: Iterable[str], stream: int) -> list[Window]:
    """Of `data.skip`: "128-143", or "7". Raises ConfigError for anything else."""
    found = []
    for text in skip:
        match = _RANGE.fullmatch(str(text).strip())
        low, high = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if low > high:
            raise ConfigError("data.skip", text, "is a sample's number or FIRST-LAST, such as 128-143")
        found.append(Window(stream=stream, first=low, last=high, why="data.skip"))
    return found


def take(windows: Sequence[Window], stream: int, first: int, count: int) -> np.ndarray:
    """The next `count` samples of a stream from `first` on that no window holds, int64."""
    ranges, at = [], first
    for w in sorted((w for w in windows if w.stream == stream and w.last >= first), key=lambda w: w.first):
        if at < w.first:
            ranges.append(np.arange(at, min(w.first, at + count), dtype=np.int64))
            count -= len(ranges[-1])
            if not count:
                break
        at = max(at, w.last + 1)
    return np.concatenate([*ranges, np.arange(at, at + count, dtype=np.int64)])


def read(run_dir: Path) -> list[Window]:
    """Raises DataError for a file that is not as it was written: without it a run would train on what it has found to be bad."""
    path = run_dir / NAME
    try:
        return [from_plain(Window, entry) for entry in parse_json(files.read(path))] if path.exists() else []
    except (OSError, *BAD_LINE) as error:
        rule = "put a whole copy there, or name the samples in data.skip and remove it"
        raise DataError(f"{path} cannot be read ({type(error).__name__}: {str(error)[:200]}): {rule}") from None


def write(run_dir: Path, windows: Sequence[Window]) -> None:
    replace_file(run_dir / NAME, json.dumps([asdict(w) for w in windows], indent=1) + "\n")
