"""`shoestring runs [DIR ...]` and `shoestring runs compare A B`."""

import sys
from collections.abc import Sequence
from pathlib import Path

from ...conf.errors import ConfigError
from ...train import units
from . import compare, compare_page, read, table
from .compare import Reached, Side


def main(
    words: Sequence[str],
    *,
    sort: str | None = None,
    reverse: bool = False,
    csv_path: Path | None = None,
    json_out: bool = False,
    html_path: Path | None = None,
) -> None:
    """Print what was asked for. Raises ConfigError for folders and options that are none."""
    if list(words[:1]) == ["compare"]:
        if len(words) != 3:
            raise ConfigError("runs compare", " ".join(words[1:]), "takes two runs: shoestring runs compare A B")
        for option, value in (("--sort", sort), ("--reverse", reverse), ("--json", json_out)):
            if value:
                raise ConfigError(option, value, "is for the table of runs, not for a comparison")
        _compare(compare.read(words[1]), compare.read(words[2]), csv_path, html_path)
        return
    if html_path:
        raise ConfigError("--html", str(html_path), "is for a comparison: shoestring runs compare A B --html FILE")
    _list(words or ["runs"], sort, reverse, csv_path, json_out)


def _list(roots: Sequence[str], sort: str | None, reverse: bool, csv_path: Path | None, json_out: bool) -> None:
    rows = [read.read(path) for path in read.find(roots)]
    if sort or reverse:
        rows = table.ordered(rows, sort or "path", reverse=reverse)
    if json_out:
        sys.stdout.write(table.as_json(rows))
    elif str(csv_path) != "-":
        print(table.as_text(rows) if rows else f"{', '.join(map(str, roots))}: no run there")
    if csv_path:
        table.write(table.rows_as_csv(rows), csv_path)


def _compare(a: Side, b: Side, csv_path: Path | None, html_path: Path | None) -> None:
    if str(csv_path) != "-":
        print("\n\n".join(part for part in (_settings(a, b), _losses(a, b), _costs(a, b)) if part))
    if csv_path:
        table.write(table.as_csv(*compare.joined(a, b)), csv_path)
    if html_path:
        table.write(compare_page.page(a, b), html_path)


def _settings(a: Side, b: Side) -> str:
    lines = [f"{side.path}: its settings cannot be read" for side in (a, b) if side.settings is None]
    rows = compare.differing(a, b) if not lines else []
    if rows:
        return table.align([("setting", f"A: {a.path}", f"B: {b.path}"), *rows], [False] * 3)
    return "\n".join(lines) or f"A: {a.path}\nB: {b.path}\nno setting differs"


def _losses(a: Side, b: Side) -> str:
    pairs = compare.at_equal_tokens(a, b)
    if not pairs:
        return "\n".join(f"{side.path}: no step has been recorded" for side in (a, b) if not side.records)
    rows = [("tokens A", "tokens B", "loss A", "loss B", "B - A")]
    rows += [
        (units.count(x.tokens), units.count(y.tokens), table.loss(x.loss), table.loss(y.loss), f"{y.loss - x.loss:+.4f}") for x, y in pairs
    ]
    return table.align(rows, [True] * 5)


def _costs(a: Side, b: Side) -> str:
    target = compare.target(a, b)
    rows = [("", "tokens/s", "to loss", "at step", "tokens", "dollars", "time")]
    for letter, side in zip("AB", (a, b)):
        found = None if target is None else compare.reached(side, target)
        cells = _reached(found) if found else ("–",) * 4
        rows.append((letter, units.count(side.tokens_per_second), table.loss(target), *cells))
    return table.align(rows, [False, *[True] * 6])


def _reached(found: Reached) -> tuple[str, ...]:
    return str(found.step), units.count(found.tokens), units.money(found.dollars), units.duration(found.seconds)
