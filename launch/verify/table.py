"""What a verification says on the console: a table that grows as cases end, and below it, on a terminal, how far it is."""

import itertools
import os
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import TextIO

from ...train import units
from .certificate import Invalid, Measure, Result

_PLAIN_WIDTH, _WIDEST, _INDENT = 140, 160, 6
_NUMBERS, _TIME, _LEAST_WHERE = len("1.0e-15 of 1e-10"), 5, 48


class Screen:
    """Lines, and on a terminal one more at the end, which `status` sets and which is gone before the next line, and at the end."""

    def __init__(self, say: Callable[[str], None] | None = None, stream: TextIO | None = None):
        self._stream, self._say = stream or sys.stdout, say
        self.live = say is None and self._stream.isatty() and os.environ.get("TERM") != "dumb"
        self.width = min(_WIDEST, shutil.get_terminal_size().columns) if self.live else _PLAIN_WIDTH
        self.colour = self.live and "NO_COLOR" not in os.environ

    def __enter__(self) -> "Screen":
        return self

    def __exit__(self, *_) -> None:
        self.status("")

    def say(self, text: str) -> None:
        self.status("")
        if self._say:
            self._say(text)
        else:
            print(text, file=self._stream, flush=True)

    def status(self, text: str) -> None:
        if self.live:
            self._stream.write(f"\r\x1b[K{text[: self.width - 1]}")
            self._stream.flush()


def progress(done: int, total: int, at_once: int, seconds: float) -> str:
    """Such as "12 of 77 done, 2 running, 2:05 gone, about 11:17 left"."""
    left = f", about {units.duration(seconds / done * (total - done))} left" if 1 < done < total else ""
    return f"{done} of {total} done, {min(at_once, total - done)} running, {units.duration(seconds)} gone{left}"


class Table:
    """A row is the verdict, the layout, the one gone on with, the deviation that is nearest to its limit, where that is, and the time;
    below it options and notes. Where the width does not allow it, the place of the deviation stands below too."""

    def __init__(self, layouts: Sequence[str], resumed: Sequence[str], width: int, colour: bool = False):
        self._width, self._colour = width, colour
        self._resumed = max([len("resumed on"), *map(len, resumed)]) if any(resumed) else 0
        rest = _INDENT + (self._resumed + 2 if self._resumed else 0) + _NUMBERS + 2 + _TIME + 2
        self._layout = max(len("layout"), min(max(map(len, layouts)), width - rest))
        room = width - rest - self._layout - 2
        self._where = room if room >= _LEAST_WHERE else 0

    def header(self) -> str:
        return self._line("", "layout", "resumed on", "largest of limit", "where", "time")

    def row(self, result: Result) -> str:
        number, where = "error", result.error.strip().splitlines()[-1:]
        if measure := nearest(result):
            number, where = numbers(measure), [place(measure, result)]
        inside = textwrap.wrap(" ".join(where), self._where) if self._where else []
        below = [] if self._where else where
        layout, time = result.layout, units.duration(result.seconds)
        first = [layout] if len(layout) > self._layout else []  # alone, so that columns stay columns
        mark = "pass" if result.passed else "FAIL"
        lines = [self._line(mark, *first)] if first else []
        lines.append(self._line("" if first else mark, "" if first else layout, result.resumed_on, number, *(inside[:1] or [""]), time))
        column = self._width - self._where - _TIME - 2
        lines += [" " * column + line for line in inside[1:]]
        for text in [result.short, *below, *result.notes]:
            lines += indented(text, self._width)
        return "\n".join([self._painted(lines[0]), *lines[1:]])

    def _line(self, mark: str, layout: str, resumed: str = "", number: str = "", where: str = "", time: str = "") -> str:
        cells = [f"{mark:<{_INDENT - 2}}", f"{layout:<{self._layout}}", *([f"{resumed:<{self._resumed}}"] if self._resumed else [])]
        cells += [f"{number:<{_NUMBERS}}", *([f"{where:<{self._where}}"] if self._where else []), f"{time:>{_TIME}}"]
        return "  ".join(cells).rstrip()

    def _painted(self, line: str) -> str:
        if not self._colour:
            return line
        return (f"\x1b[1;31m{line[:4]}\x1b[0m" if line.startswith("FAIL") else f"\x1b[32m{line[:4]}\x1b[0m") + line[4:]


def nearest(result: Result) -> Measure | None:
    """What a row tells of: the worst of what is broken, or what is nearest to it."""
    return None if result.error else result.broken[0] if result.broken else result.worst


def numbers(measure: Measure) -> str:
    if not measure.limit:
        return "equal" if measure.passed else "not equal"
    return f"{measure.value:.1e} of {measure.limit:.0e}" if measure.value is not None else f"no number/{measure.limit:.0e}"


def place(measure: Measure, result: Result) -> str:
    """Without the layout gone on with, which the row has already."""
    return str(measure).removesuffix(f", on {result.resumed_on}")


def details(result: Result, width: int, most: int = 8) -> str:
    """Everything that failed in a case, worst first."""
    if result.error:
        return "\n".join(f"  {line}" for line in result.error.strip().splitlines()[-25:])
    more = len(result.broken) - most
    texts = [f"{numbers(d):<{_NUMBERS}}  {place(d, result)}" for d in result.broken[:most]]
    lines = [line for text in texts for line in indented(text, width, 2, _NUMBERS + 4)]
    return "\n".join([*lines, *([f"  ... and {more} more"] if more > 0 else [])])


def invalid_lines(invalid: Sequence[Invalid], width: int) -> Iterator[str]:
    """Each rule once, and the cases that break it."""
    by_rule = sorted(invalid, key=lambda case: case.why)  # stable: cases stay in order
    for why, cases in itertools.groupby(by_rule, key=lambda case: case.why):
        yield "\n".join([*indented(", ".join(case.name for case in cases), width, 2), *indented(why, width, _INDENT)])


def indented(text: str, width: int, indent: int = _INDENT, hanging: int | None = None) -> list[str]:
    """Commands and names are never broken inside a word."""
    return textwrap.wrap(
        text, width, initial_indent=" " * indent, subsequent_indent=" " * (hanging or indent),
        break_long_words=False, break_on_hyphens=False, drop_whitespace=True,
    )  # fmt: skip
