"""`shoestring rehearse`: choose the ranks, rehearse them side by side, and show what was measured beside what the formulas say.

distinct.py -> a rank of each kind -> rank.py in forked processes -> tables (table.py), and everything as JSON
"""

import json
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from ...conf.compose import load
from ...conf.errors import ConfigError
from ...conf.schema import Config
from ...train import units
from . import table
from .distinct import kinds, spans
from .formulas import Formulas, formulas
from .rank import Rehearsal, rehearsable, rehearse
from .routing import Routing
from .table import Shown

FORMAT = "shoestring rehearsal 1"


@dataclass(frozen=True, kw_only=True)
class Request:
    """`ranks`: none for one of each kind. `out`: for the JSON. `words`: settings of the configuration."""

    ranks: tuple[int, ...] = ()
    imbalance: float = 1.0
    out: Path | None = None
    words: tuple[str, ...] = ()
    config_dir: str | None = None


def parse(words: Sequence[str], config_dir: str | None = None) -> Request:
    """Raises ConfigError for a setting of ours that is no number where it must be one."""
    own: dict[str, Any] = {}
    settings = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in ("ranks", "imbalance", "out"):
            settings.append(word)
        elif key == "out":
            own[key] = Path(value)
        elif key == "ranks" and value != "all-distinct":
            if not all(part.strip().isdecimal() for part in value.split(",")):
                raise ConfigError(key, value, "must be all-distinct, or numbers such as 0,17", "all-distinct")
            own[key] = tuple(int(part) for part in value.split(","))
        elif key == "imbalance":
            try:
                own[key] = float(value)
            except ValueError:
                raise ConfigError(key, value, "must be a number: the load of the busiest rank over the mean", 1.0) from None
    if not any(word.startswith(("data=", "data.sources")) for word in settings):
        settings.append("data=synthetic")  # its text is not looked at
    return Request(**own, words=tuple(settings), config_dir=config_dir)


def main(words: Sequence[str], config_dir: str | None) -> None:
    run(parse(words, config_dir))


def run(request: Request, say: Callable[[str], None] = print) -> list[Shown]:
    """Raises ConfigError before anything runs."""
    began = time.monotonic()
    torch.set_num_threads(1)
    config = load(request.words, request.config_dir)
    rehearsable(config)
    Routing(config, 0, request.imbalance)
    chosen = choose(config, request.ranks)
    shown = side_by_side(config, chosen, request.imbalance)
    for line in table.lines(config, shown, request.imbalance):
        say(line)
    say(f"\n{len(shown)} of {config.parallel.world_size:,} ranks rehearsed in {units.duration(time.monotonic() - began)}")
    if request.out:
        request.out.parent.mkdir(parents=True, exist_ok=True)
        request.out.write_text(json.dumps(content(request, shown), indent=1) + "\n", encoding="utf-8")
        say(f"everything  {request.out}")
    return shown


def choose(config: Config, ranks: Sequence[int]) -> list[list[int]]:
    """What each rehearsal stands for, the rehearsed rank first. Asked for by number, a rank stands for itself."""
    world = config.parallel.world_size
    if wrong := [rank for rank in ranks if rank >= world]:
        raise ConfigError("ranks", spans(wrong), f"the job has ranks 0 to {world - 1}", world - 1)
    return [[rank] for rank in ranks] if ranks else kinds(config)


def side_by_side(config: Config, chosen: Sequence[list[int]], imbalance: float) -> list[Shown]:
    """In forked processes, as many as there are cores: a process is a rank of one world at a time."""
    most = min(len(chosen), os.cpu_count() or 1)
    with ProcessPoolExecutor(most, mp_context=multiprocessing.get_context("fork")) as pool:
        measured = list(pool.map(_measured, [config] * len(chosen), [ranks[0] for ranks in chosen], [imbalance] * len(chosen)))
    found = [formulas(config, ranks[0], imbalance=imbalance) for ranks in chosen]
    return [Shown(ranks=ranks, measured=r, formula=f) for ranks, r, f in zip(chosen, measured, found)]


def _measured(config: Config, rank: int, imbalance: float) -> Rehearsal:
    torch.set_num_threads(1)
    return rehearse(config, rank, imbalance=imbalance)


def content(request: Request, shown: Sequence[Shown]) -> dict[str, Any]:
    """For JSON: `sent` is a list of collectives."""

    def plain(of: Rehearsal | Formulas) -> dict[str, Any]:
        sent = [{"collective": name, "link": link, "bytes": num_bytes} for (name, link), num_bytes in sorted(of.sent.items())]
        return asdict(of) | {"sent": sent}

    return {
        "format": FORMAT,
        "words": request.words,
        "imbalance": request.imbalance,
        "ranks": [{"stands_for": spans(s.ranks), "measured": plain(s.measured), "formulas": plain(s.formula)} for s in shown],
    }
