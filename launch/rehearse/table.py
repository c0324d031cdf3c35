"""What rehearsals say on the console: a row for each rank, then the bytes of each collective."""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from ...conf.schema import Config
from ...train import units
from .distinct import spans
from .formulas import Formulas
from .rank import Rehearsal

_COLLECTIVES = ("dispatch F", "combine F", "dispatch B", "combine B", "counts", "pipeline", "reduce", "gather", "scalars")
_LINKS = {"inter": "between nodes", "intra": "inside nodes"}


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One rank, and those that it stands for."""

    ranks: list[int]
    measured: Rehearsal
    formula: Formulas


def lines(config: Config, shown: Sequence[Shown], imbalance: float) -> Iterator[str]:
    p, first = config.parallel, shown[0].measured
    precision = config.precision.compute if config.precision.linear == "compute" else config.precision.linear
    routing = "even routing" if imbalance == 1.0 else f"each rank the busiest, with {imbalance:g} times the mean"
    layout = f"pp {p.pp}, edp {p.edp}, ep {p.ep}, {p.schedule}"
    yield f"{config.model.name} on {p.world_size:,} ranks: {layout}, {precision}, {routing}"
    yield f"{first.micro_batches} of a step's {first.of_micro_batches} micro-batches were run: memory is at its fullest in them. FLOPs and"
    yield "bytes are those of all, by counting on: each has the same. In brackets: the planner's formula against what was measured."
    yield ""
    yield from _aligned(_ranks(shown))
    yield ""
    yield from _aligned(_parts(shown))
    yield ""
    yield from _aligned(_collectives(shown))


def _ranks(shown: Sequence[Shown]) -> Iterator[list[str]]:
    yield ["rank", "stands for", "blocks", "dense", "experts", "FLOPs a step", "peak GB", "at", "GB between nodes", "inside"]
    for s in shown:
        r, f = s.measured, s.formula
        links = [sum(n for (_, at), n in r.sent.items() if at == link) / 1e9 for link in _LINKS]
        yield [
            str(r.rank),
            spans(s.ranks),
            " | ".join(spans(blocks) or "-" for blocks in r.stages.values()),
            f"{units.count(r.params['dense'])} {_beside(f.params['dense'], r.params['dense'])}",
            f"{units.count(r.params['expert'])} {_beside(f.params['expert'], r.params['expert'])}",
            f"{units.si(r.flops)} {_beside(f.flops, r.flops)}",
            f"{units.significant(r.peak_bytes / 1e9, 4)} {_beside(f.peak_bytes, r.peak_bytes)}",
            r.peak_at,
            *(units.significant(n) for n in links),
        ]


def _parts(shown: Sequence[Shown]) -> Iterator[list[str]]:
    """Of the peak, in GB."""
    names = [name for name in _ordered(shown) if any(s.measured.by_category.get(name) for s in shown)]
    yield ["GB at the peak of rank", *names]
    for s in shown:
        yield [str(s.measured.rank), *(units.significant(s.measured.by_category.get(name, 0) / 1e9) for name in names)]


def _ordered(shown: Sequence[Shown]) -> list[str]:
    usual = ["weights", "main_grads", "optimizer", "casts", "activations", "working", "exchange", "other"]
    return usual + sorted({name for s in shown for name in s.measured.by_category} - set(usual))


def _collectives(shown: Sequence[Shown]) -> Iterator[list[str]]:
    """Of the rehearsed ranks: the least and the most."""
    yield ["sent in a step, GB", *_LINKS.values(), "formulas"]
    for name in _COLLECTIVES:
        if any(of == name for s in shown for of, _ in s.measured.sent):
            of_each = {link: [s.measured.sent.get((name, link), 0) for s in shown] for link in _LINKS}
            yield [name, *(_range([n / 1e9 for n in of]) for of in of_each.values()), "equal" if _agree(name, shown) else "differ"]


def _agree(name: str, shown: Sequence[Shown]) -> bool:
    pairs = ((s.measured.sent.get((name, link), 0), s.formula.sent.get((name, link), 0)) for s in shown for link in _LINKS)
    return all(math.isclose(measured, formula, rel_tol=1e-9) for measured, formula in pairs)


def _range(values: list[float]) -> str:
    low, high = units.significant(min(values)), units.significant(max(values))
    return low if low == high else f"{low} to {high}"


def _beside(formula: float, measured: float) -> str:
    if formula == measured:
        return "(=)"
    return f"({100 * (formula / measured - 1):+.1f} %)" if measured else "(!)"


def _aligned(rows: Iterable[list[str]]) -> Iterator[str]:
    rows = list(rows)
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip()
