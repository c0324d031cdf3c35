"""What a trace says of a step: how much communication lay under compute, and how long ranks had nothing to do."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from .trace import PIPELINE, Span

Interval = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Of one step; seconds and shares are means over ranks. A rank at each moment computes, or an exchange of its own is under way
    that nothing hides (exposed), or neither (bubble: it waits for another pipeline rank, or for its own host)."""

    seconds: float  # from the first start to the last end, of all ranks
    bubble: float  # share of them
    comm_seconds: float  # at least one exchange of the rank is under way
    exposed_seconds: float  # part of those: the rank itself computes nothing
    hidden_share: float | None  # the other part, over all ranks; None where nothing is exchanged
    pair_hidden_share: float | None  # likewise, inside actions that overlap a forward and a backward


def measure(spans: Sequence[Span]) -> Measured:
    """Raises ValueError without any span."""
    spans = [s for s in spans if s.what in PIPELINE]
    if not spans:
        raise ValueError("a trace without spans: no step was recorded")
    seconds = max(s.end for s in spans) - min(s.start for s in spans)
    times: dict[int, dict[str, list[Interval]]] = {}
    for s in spans:
        times.setdefault(s.rank, {}).setdefault(s.what, []).append((s.start, s.end))
    idle = comm = exposed = pair_comm = pair_exposed = 0.0
    for of in times.values():
        compute, exchange, pair = (union(of.get(what, ())) for what in ("compute", "exchange", "pair"))
        bare = subtract(exchange, compute)
        comm += length(exchange)
        exposed += length(bare)
        pair_comm += length(intersect(exchange, pair))
        pair_exposed += length(intersect(bare, pair))
        idle += seconds - length(compute) - length(bare)
    return Measured(
        seconds=seconds,
        bubble=idle / (len(times) * seconds) if seconds else 0.0,
        comm_seconds=comm / len(times),
        exposed_seconds=exposed / len(times),
        hidden_share=1 - exposed / comm if comm else None,
        pair_hidden_share=1 - pair_exposed / pair_comm if pair_comm else None,
    )


# ---------------------------------------------------------------- sets of times, as disjoint intervals in order


def union(intervals: Iterable[Interval]) -> list[Interval]:
    merged: list[Interval] = []
    for start, end in sorted(intervals):
        if merged and start <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(end, merged[-1][1])
        else:
            merged.append((start, end))
    return merged


def intersect(a: Sequence[Interval], b: Sequence[Interval]) -> list[Interval]:
    return _where(lambda in_a, in_b: in_a and in_b, a, b)


def subtract(a: Sequence[Interval], b: Sequence[Interval]) -> list[Interval]:
    return _where(lambda in_a, in_b: in_a and not in_b, a, b)


def length(intervals: Iterable[Interval]) -> float:
    return sum(end - start for start, end in intervals)


def _where(keep: Callable[[bool, bool], bool], a: Sequence[Interval], b: Sequence[Interval]) -> list[Interval]:
    """Between two neighbouring ends of any interval, either set is wholly there or wholly not."""
    steps = sorted((t, side, change) for side, s in enumerate((a, b)) for ends in s for t, change in zip(ends, (+1, -1)))
    inside, kept = [0, 0], []
    for (t, side, change), (following, _, _) in pairwise(steps):
        inside[side] += change
        if following > t and keep(inside[0] > 0, inside[1] > 0):
            kept.append((t, following))
    return union(kept)
