"""Two runs as one HTML page: both losses by tokens and by dollars, and what differs in their settings. Needs nothing from the network."""

import html
from pathlib import Path

from ...train import units
from ..figures import learning
from ..figures.curves import axis
from ..figures.page import Page, Tile, render
from ..figures.run import Run
from . import compare
from .compare import Reached, Side
from .table import loss


def page(a: Side, b: Side) -> str:
    """The whole file. Text of the runs is escaped."""
    runs = [Run(Path(side.path), label=side.path).look_at_all() for side in (a, b) if side.records]
    charts = [learning.loss(runs, axis(name, runs), key=f"loss-by-{name}", wide=True) for name in ("tokens", "dollars")] if runs else []
    whole = Page(
        title=f"{a.path} and {b.path}", facts=[], status="two runs", kind="comparison", tiles=_tiles(a, b),
        notes=[f"{side.path}: no step has been recorded." for side in (a, b) if not side.records],
        charts=[chart for chart in charts if chart], sections=[_settings(a, b)], config_text="", method=_method(),
    )  # fmt: skip
    return render(whole)


def _tiles(a: Side, b: Side) -> list[Tile]:
    target = compare.target(a, b)
    tiles = []
    for letter, side in zip("AB", (a, b)):
        last, found = side.records[-1] if side.records else None, None if target is None else compare.reached(side, target)
        tiles += [
            Tile(f"{letter}: loss", loss(last.loss if last else None), side.path),
            Tile(f"{letter}: to {loss(target)}", units.money(found.dollars if found else None), _where(found)),
        ]
    return tiles


def _where(found: Reached | None) -> str:
    return f"{units.count(found.tokens)} tokens, {units.duration(found.seconds)}" if found else "not reached"


def _settings(a: Side, b: Side) -> str:
    e = html.escape
    rows = "".join(f"<tr><td>{e(name)}</td><td>{e(left)}</td><td>{e(right)}</td></tr>" for name, left, right in compare.differing(a, b))
    head = f"<thead><tr><th>Setting</th><th>{e(a.path)}</th><th>{e(b.path)}</th></tr></thead>"
    table = f'<div class="scroll"><table>{head}<tbody>{rows}</tbody></table></div>' if rows else '<p class="sub">None.</p>'
    return f'<section class="card wide layouts"><h2>Settings that differ</h2>{table}</section>'


def _method() -> list[str]:
    return [
        "Loss is the mean next-token cross-entropy of a step, in nats.",
        f"A loss is reached when the median of the last {compare.SMOOTH} steps' losses is not above it (of fewer in a short run); the one "
        "named here is the lowest that both runs have reached.",
        "Dollars are the seconds that all devices were held, restarts, evaluations and lost steps included, times their price.",
    ]
