"""`shoestring dollars RUN`: where each dollar went, as a table or JSON, and what is still to come, which is projected and says so."""

import dataclasses
import json
import math
import time
from pathlib import Path

from ..conf.compose import load_saved
from ..conf.errors import ConfigError
from ..conf.schema import Config
from ..train import sessions, units, waterfall
from ..train.account import Account
from ..train.projection import Projection, Range, projection
from ..train.waterfall import Waterfall
from .overview import table

BAR = 30  # characters, of the whole


def show(run_dir: Path, *, as_json: bool = False) -> str:
    """What is to be printed. Raises ConfigError for a directory that has nothing of a run."""
    if not any((run_dir / name).is_file() for name in (sessions.NAME, *sessions.FILES)):
        raise ConfigError("RUN_DIR", str(run_dir), f"has no {sessions.NAME} and no {sessions.FILES[0]}: no run was there", "runs/NAME")
    account = Account.of(run_dir)
    spent = waterfall.of(account, waterfall.recomputes(run_dir))
    config = _config(run_dir)
    ahead = projection(config, account) if config else None
    if as_json:
        return json.dumps(_plain(spent, ahead), indent=1)
    return "\n".join([*_spent(run_dir, spent), *(_ahead(ahead) if ahead else [])])


def _config(run_dir: Path) -> Config | None:
    try:
        return load_saved(run_dir / "config.yaml")
    except Exception:  # half a configuration, or another version's, fails in as many ways as there are
        return None


def _plain(spent: Waterfall, ahead: Projection | None) -> dict:
    totals = {name: getattr(spent, name) for name in ("dollars", "seconds", "gpu_hours", "dollars_per_billion_tokens")}
    return {**totals, **dataclasses.asdict(spent), "projected": ahead and dataclasses.asdict(ahead)}


def _spent(run_dir: Path, w: Waterfall) -> list[str]:
    per = f", {units.money(w.dollars_per_billion_tokens)} per billion tokens" if w.tokens else ""
    rows = [("part", "dollars", "share", "", "GPU-hours", "how it is known")]
    before, whole = 0.0, w.dollars or w.seconds
    for part in w.parts:
        value = part.dollars if w.dollars else part.seconds
        if value:
            bar = _bar(before / whole, (before + value) / whole)
            rows.append((part.name, units.money(part.dollars), units.percent(value / whole), bar, _hours(part.gpu_hours), part.source))
            before += value
    rows.append(("all", units.money(w.dollars), units.percent(1.0), "", _hours(w.gpu_hours), ""))
    return [
        f"{run_dir}: {units.money(w.dollars)} for {w.steps:,} steps, {units.count(w.tokens)} tokens{per}",
        table.align(rows, [False, True, True, False, True, False]),
        *(f"note: {note}" for note in w.notes),
    ]


def _bar(left: float, right: float) -> str:
    """From `left` to `right` of the whole: what came before it is blank."""
    first = min(BAR - 1, math.floor(left * BAR))
    return "·" * first + "█" * max(1, round(right * BAR) - first)


def _hours(value: float) -> str:
    return units.significant(value)


def _ahead(p: Projection) -> list[str]:
    if p.step >= p.steps:
        return ["nothing is left to do"]
    whole = lambda value: units.plain(None) if value is None else f"{value:,.0f}"
    rows = [("projected", "low", "median", "high")]
    for name, values, text in (
        ("dollars to go", p.dollars, units.money), ("dollars in all", p.total_dollars, units.money),
        ("GPU-hours to go", p.gpu_hours, units.significant), ("time to go", p.seconds, units.duration), ("ends", p.ends_unix, _when),
    ):  # fmt: skip
        rows.append((name, *_cells(values, text)))
    for limit in p.limits:
        rows += [(f"{limit.name} met at step", *_cells(limit.step, whole)), (f"{limit.name} met", *_cells(limit.time_unix, _when))]
    first = f"{p.first} comes first" if p.limits else "no limit is set"
    return ["", table.align(rows, [False, True, True, True]), f"steps {p.step} to {p.steps}, {p.basis}; {first}"]


def _cells(values: Range, text) -> tuple[str, ...]:
    return tuple(text(value) if value is not None else "not before the end" for value in dataclasses.astuple(values))


def _when(moment: float) -> str:
    try:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(moment))
    except (ValueError, OverflowError, OSError):
        return units.plain(None)
