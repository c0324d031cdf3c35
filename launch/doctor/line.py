"""A line of what the doctor has found: state, value, and what to do; lines of several nodes as one table; how a terminal shows them.

    kind        of which a failure's exit code is
    software    2   packages, versions, settings of the process
    variables   2   of the environment
    storage     4   room, permission
    machine     5   GPUs, network devices
    fabric      5   what ranks find out together
"""

import os
import sys
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from rich.console import Console
from rich.text import Text

from .. import exit_codes

OK, WARN, FAIL, SKIPPED = "ok", "warn", "fail", "skipped"
CODES = {
    "software": exit_codes.CONFIG,
    "variables": exit_codes.CONFIG,
    "storage": exit_codes.STORAGE,
    "machine": exit_codes.LOST,
    "fabric": exit_codes.LOST,
}
_COLOURS = {OK: "green", WARN: "yellow", FAIL: "bold red", SKIPPED: "dim"}
_WIDEST = 24  # characters of a check's name that the values stand beside
_MOST_HOSTS = 8  # that are named


@dataclass(frozen=True, kw_only=True)
class Line:
    """`advice`: what to do, with the command to type; "" where nothing is. `alike`: nodes with another value than most are a failure.
    `host`: the nodes that it is about, "" for all."""

    kind: str
    check: str
    state: str
    value: str
    advice: str = ""
    alike: bool = False
    host: str = ""


def ok(kind: str, check: str, value: str, *, alike: bool = False) -> Line:
    return Line(kind=kind, check=check, state=OK, value=value, alike=alike)


def warn(kind: str, check: str, value: str, advice: str) -> Line:
    return Line(kind=kind, check=check, state=WARN, value=value, advice=advice)


def fail(kind: str, check: str, value: str, advice: str) -> Line:
    return Line(kind=kind, check=check, state=FAIL, value=value, advice=advice)


def skipped(kind: str, check: str, why: str) -> Line:
    return Line(kind=kind, check=check, state=SKIPPED, value=why)


def exit_code(lines: Iterable[Line]) -> int:
    """Of the first failure, in the order of `CODES`; OK where nothing has failed."""
    kinds = {line.kind for line in lines if line.state == FAIL}
    return next((code for kind, code in CODES.items() if kind in kinds), exit_codes.OK)


# ---------------------------------------------------------------- several nodes


def merged(by_host: Mapping[str, Sequence[Line]]) -> list[Line]:
    """What nodes have found, as one list: what is alike once, the others with their hosts, and a failure for each `alike` value that is
    not the same everywhere."""
    if len(by_host) == 1:
        return list(next(iter(by_host.values())))
    together: list[Line] = []
    order = dict.fromkeys((line.kind, line.check) for lines in by_host.values() for line in lines)
    for kind, check in order:
        found = [(host, line) for host, lines in by_host.items() for line in lines if (line.kind, line.check) == (kind, check)]
        together += _of_one_check(found, len(by_host))
    return together


def _of_one_check(found: Sequence[tuple[str, Line]], nodes: int) -> list[Line]:
    """`found`: (host, its line)."""
    first = found[0][1]
    mismatch = version_mismatch(first.kind, first.check, {host: line.value for host, line in found if line.alike})
    fine = [(host, line) for host, line in found if line.state == OK]
    lines = [] if mismatch else _once(fine)
    parts: dict[tuple[str, str, str], list[str]] = {}
    for host, line in found:
        if line.state != OK:
            parts.setdefault((line.state, line.value, line.advice), []).append(host)
    for (state, value, advice), hosts in parts.items():
        where = "" if len(hosts) == nodes else some(hosts)
        lines.append(replace(first, state=state, value=value, advice=advice, host=where))
    return [*lines, *mismatch]


def _once(fine: Sequence[tuple[str, Line]]) -> list[Line]:
    """Free space and the like is nowhere equal: then the first node's stands for all that are well."""
    if not fine:
        return []
    host, line = fine[0]
    equal = len({other.value for _, other in fine}) == 1
    return [line if equal else replace(line, value=f"{line.value} ({host}; well on {len(fine)} nodes)")]


def version_mismatch(kind: str, what: str, values: Mapping[str, str]) -> list[Line]:
    """A failure that names who has what, where not all have the same; `values` by host or rank."""
    who: dict[str, list[str]] = {}
    for name, value in values.items():
        who.setdefault(value, []).append(name)
    if len(who) < 2:
        return []
    most = max(who, key=lambda value: len(who[value]))
    others = "; ".join(f"{value} on {some(names)}" for value, names in who.items() if value != most)
    advice = f"install the same everywhere: pip install -c constraints.txt -e . on {some(n for v in who if v != most for n in who[v])}"
    return [fail(kind, f"{what} mismatch", f"{most} on {some(who[most])}; {others}", advice)]


def some(names: Iterable[str]) -> str:
    """Names in a sentence; not all of a thousand."""
    names = list(dict.fromkeys(names))
    return ", ".join(names[:_MOST_HOSTS]) + (f" and {len(names) - _MOST_HOSTS} more" if len(names) > _MOST_HOSTS else "")


# ---------------------------------------------------------------- on a terminal


def show(lines: Sequence[Line], *, title: str = "", say: Callable[[str], None] | None = None) -> None:
    """Print a table: by kind, what is wrong with what to do under it, the sum last. In colour on a terminal. `say` gets it as text."""
    text = _text(lines, title)
    if say:
        say(text.plain)
    else:
        Console(file=sys.stdout, soft_wrap=True, highlight=False).print(text)


def _text(lines: Sequence[Line], title: str) -> Text:
    text = Text(f"{title}\n" if title else "")
    width = min(_WIDEST, max((_columns(line.check) for line in lines), default=0))
    for kind in CODES:
        of_kind = [line for line in lines if line.kind == kind]
        if of_kind:
            text.append(f"\n{kind}\n", style="bold")
        for line in of_kind:
            _add(text, line, width)
    text.append("\n").append_text(_sum(lines))
    return text


def _add(text: Text, line: Line, width: int) -> None:
    state = "-" if line.state == SKIPPED else line.state
    text.append(f"  {state:<5}", style=_COLOURS[line.state])
    where = f"{line.host}: " if line.host else ""
    text.append(f"{line.check}{' ' * max(1, width - _columns(line.check) + 2)}")
    text.append(f"{where}{line.value}\n", style="dim" if line.state == SKIPPED else "")
    if line.advice and line.state in (WARN, FAIL):
        text.append(" " * (9 + width) + f"-> {line.advice}\n", style=_COLOURS[line.state])


def _sum(lines: Sequence[Line]) -> Text:
    failed, warned = ([line for line in lines if line.state == state] for state in (FAIL, WARN))
    fine, unseen = (sum(line.state == state for line in lines) for state in (OK, SKIPPED))
    words = [f"{len(failed)} failed", f"{len(warned)} warning{'s' * (len(warned) != 1)}", f"{fine} ok"]
    words += [f"{unseen} not looked at (-)"] * bool(unseen)
    colour = _COLOURS[FAIL if failed else WARN if warned else OK]
    text = Text(", ".join(words), style=colour)
    if failed:
        text.append(": " + ", ".join(dict.fromkeys(line.check for line in failed)), style=colour)
    return text


def _columns(text: str) -> int:
    """That a terminal gives it."""
    return sum(2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


# ---------------------------------------------------------------- numbers


def gigabytes(num_bytes: float) -> str:
    """1e9 bytes, and 1e12 from a thousand on: 66.8 GB, 0.012 GB, 8.19 TB."""
    value = num_bytes / 1e9
    if value >= 999.5:
        return f"{value / 1e3:.3g} TB"
    return f"{value:.0f} GB" if value >= 100 else f"{value:.1f} GB" if value >= 1 else f"{value:.3f} GB"


def nearest_there(path: str | os.PathLike[str]) -> str:
    """The path, or the nearest above it that exists."""
    path = os.path.abspath(os.path.expanduser(path))
    while not os.path.exists(path) and path != os.path.dirname(path):
        path = os.path.dirname(path)
    return path
