"""From seconds to rates: how long a kernel takes, as launch + work / rate x (1 + half / depth), and a message, as latency + bytes / rate.

Both are linear in what is sought, so one least-squares solution of relative errors finds all of it: the launch that kernels share, and
each kind's rate and half.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One kernel, timed. `work`: FLOPs or bytes. `depth`: what its rate depends on (K of a product, positions of attention), 0: nothing.

    `table`, `kind`: where in `cluster.rates`, such as products, fp8_wgrad.
    """

    table: str
    kind: str
    seconds: float
    work: float
    depth: float = 0.0
    launches: int = 1


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Work per second of what is deep, and the depth at which half of it is reached."""

    per_second: float
    half: float = 0.0

    def seconds(self, sample: Sample) -> float:
        return sample.work / self.per_second * (1 + self.half / sample.depth if sample.depth else 1)


Rates = dict[tuple[str, str], Rate]


def kernels(samples: Sequence[Sample]) -> tuple[float, Rates]:
    """Seconds of a launch, and the rate of each (table, kind)."""
    kinds = list(dict.fromkeys((s.table, s.kind) for s in samples))
    depths = {kind: {s.depth for s in samples if (s.table, s.kind) == kind and s.depth} for kind in kinds}
    columns = ["launch", *kinds, *((*kind, "half") for kind in kinds if len(depths[kind]) > 1)]

    def row(sample: Sample) -> list[float]:
        kind = (sample.table, sample.kind)
        own = {"launch": sample.launches, kind: sample.work, (*kind, "half"): sample.work / (sample.depth or 1)}
        return [own.get(column, 0.0) for column in columns]

    found = _least_squares(columns, [row(s) for s in samples], [s.seconds for s in samples], kept=kinds)
    rates = {kind: Rate(per_second=1 / found[kind], half=found.get((*kind, "half"), 0.0) / found[kind]) for kind in kinds}
    return found.get("launch", 0.0), rates


def message(times: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(bytes, seconds) of messages -> latency in seconds, bytes per second."""
    latency, per_byte = line(times)
    return latency, 1 / per_byte


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """(x, y) -> what y is at 0, and how much it grows with x."""
    found = _least_squares(["at 0", ("slope",)], [[1.0, x] for x, _ in points], [y for _, y in points], kept=[("slope",)])
    return found.get("at 0", 0.0), found[("slope",)]


def errors(samples: Sequence[Sample], launch: float, rates: Rates) -> dict[tuple[str, str], float]:
    """Of each kind, the median of |fitted - measured| / measured."""
    off: dict[tuple[str, str], list[float]] = {}
    for s in samples:
        kind = (s.table, s.kind)
        off.setdefault(kind, []).append(abs(s.launches * launch + rates[kind].seconds(s) - s.seconds) / s.seconds)
    return {kind: float(np.median(values)) for kind, values in off.items()}


def _least_squares(columns: list, rows: list[list[float]], seconds: Sequence[float], *, kept: Sequence) -> dict:
    """Of relative errors, none negative: what would be is left out, one after another. Where it is `kept`, its half goes, or what all
    share: that has taken what was its own."""
    matrix = np.array(rows) / np.array(seconds)[:, None]
    scale = np.abs(matrix).max(0)
    left = list(columns)
    while True:
        at = [columns.index(column) for column in left]
        solution, *_ = np.linalg.lstsq(matrix[:, at] / scale[at], np.ones(len(rows)), rcond=None)
        found = dict(zip(left, solution))
        worst = min(found, key=found.get)
        if found[worst] > 0:
            return {column: float(value / scale[columns.index(column)]) for column, value in found.items()}
        if worst in kept:
            worst = next(other for other in ((*worst, "half"), columns[0]) if other in found)
        left.remove(worst)
