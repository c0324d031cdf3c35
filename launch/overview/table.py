"""The rows of `shoestring runs` as text, CSV or JSON."""

import csv
import io
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from ...conf.errors import choose
from ...train import metrics, units
from .. import secrets
from .read import Row

SORTS = tuple(field.name for field in fields(Row) if field.name != "note")


@dataclass(frozen=True, kw_only=True)
class Column:
    title: str
    text: Callable[[Row], str]
    right: bool = True


COLUMNS = (
    Column(title="run", text=lambda r: r.path, right=False),
    Column(title="state", text=lambda r: r.state + (f" ({r.code})" if r.code else ""), right=False),
    Column(title="layout", text=lambda r: r.layout, right=False),
    Column(title="precision", text=lambda r: r.precision, right=False),
    Column(title="steps", text=lambda r: f"{_whole(r.step)}/{_whole(r.steps)}"),
    Column(title="tokens", text=lambda r: units.count(r.tokens)),
    Column(title="loss", text=lambda r: loss(r.loss)),
    Column(title="held out", text=lambda r: loss(r.eval_loss)),
    Column(title="tokens/s", text=lambda r: units.count(r.tokens_per_second)),
    Column(title="MFU", text=lambda r: units.percent(r.mfu)),
    Column(title="spent", text=lambda r: units.money(r.dollars)),
    Column(title="updated", text=lambda r: _when(r.updated), right=False),
)


def ordered(rows: Sequence[Row], field: str, *, reverse: bool = False) -> list[Row]:
    """By a field; what cannot be told comes last, either way. Raises ConfigError for a field that a row has not."""
    choose("--sort", field, SORTS)
    value = lambda row: getattr(row, field)
    unknown = lambda row: value(row) is None or (isinstance(value(row), float) and math.isnan(value(row)))
    return [*sorted((r for r in rows if not unknown(r)), key=value, reverse=reverse), *(r for r in rows if unknown(r))]


def as_text(rows: Sequence[Row]) -> str:
    """A line each, and what is wrong with some below."""
    notes = [f"{row.path}: {row.note}" for row in rows if row.note and row.state in ("failed", "half-written", "empty")]
    table = align([tuple(c.title for c in COLUMNS), *(tuple(c.text(r) for c in COLUMNS) for r in rows)], [c.right for c in COLUMNS])
    return "\n".join([table, *([""] if notes else []), *map(printable, notes)])


def align(rows: Sequence[Sequence[str]], right: Sequence[bool]) -> str:
    """Cells of equal width in each column, two spaces between; what a terminal could take for a command is a question mark."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(right))]
    lines = ("  ".join(cell.rjust(w) if on_right else cell.ljust(w) for cell, w, on_right in zip(row, widths, right)) for row in rows)
    return "\n".join(line.rstrip() for line in lines)


def as_csv(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    """Numbers in full; what is not known is an empty field."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([[printable(cell) if isinstance(cell, str) else cell for cell in row] for row in rows])
    return text.getvalue()


def rows_as_csv(rows: Sequence[Row]) -> str:
    names = [field.name for field in fields(Row)]
    return as_csv(names, [[getattr(row, name) for name in names] for row in rows])


def as_json(rows: Sequence[Row]) -> str:
    """A list of objects. What is not a number is null, and named in `nonfinite`, as in metrics.jsonl."""
    return json.dumps([metrics.to_plain(row) for row in rows], indent=1) + "\n"


def write(text: str, path: Path) -> None:
    """`-` is the console."""
    if str(path) == "-":
        sys.stdout.write(text)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        metrics.replace_file(path, secrets.hide(text))
        print(path)


def printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


def loss(value: float | None) -> str:
    return f"{value:.4f}" if value is not None and math.isfinite(value) else units.plain(value)


def _whole(value: int | None) -> str:
    return "–" if value is None else str(value)


def _when(value: float | None) -> str:
    return "–" if value is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(value))
