"""Where a traced step's device-seconds went: each moment of each rank, from the step's begin to its end, in exactly one part.

    compute     phases, weight gradients, packing; recompute is not in it
    recompute   forward again in backward, of phases that kept nothing (train.recompute: attention, experts)
    exchange    a token exchange is under way that all its peers have come to, and the rank computes nothing: exposed
    bubble      the rank waits for another stage: in a posted receive, or, its stage being done, for the pipeline to drain
    imbalance   the rank waits for slower ranks of its own stage: in an exchange until the last has come, or when it is done before them
    update      sums of gradients once the pipeline has drained, and what starts them before; the optimizer
    data        samples are read
    idle        the rest: the host between phases, the barrier before a traced step, the guard's replays, what a step tells

Where two could claim a moment, the first of these does: compute, data, exchange (its peers' wait after its transfer), update, waits.
"""

from collections import defaultdict
from collections.abc import Sequence

from .trace import PIPELINE, Span
from .trace_measure import intersect, length, subtract, union

PARTS = ("compute", "recompute", "exchange", "bubble", "imbalance", "update", "data", "idle")


def divide(spans: Sequence[Span], *, dp: int, ep: int, seconds: float) -> dict[str, float]:
    """Seconds by `PARTS`, mean over ranks; they add up to `seconds`, the step's own, and none is negative.

    `dp`: ranks of a pipeline rank; `ep`: neighbours among them that exchange tokens. Raises ValueError without any span of the executor.
    """
    of_rank, ends = defaultdict(list), defaultdict(float)
    for s in spans:
        of_rank[s.rank].append(s)
        if s.what in ("compute", "exchange"):
            ends[s.rank // dp] = max(ends[s.rank // dp], s.end)
    pipeline = [s for s in spans if s.what in PIPELINE]
    if not pipeline:
        raise ValueError("a trace without spans: no step was recorded")
    drained, come = max(s.end for s in pipeline), _last_to_come(of_rank, ep)
    sums = dict.fromkeys(PARTS, 0.0)
    for rank, mine in of_rank.items():
        for part, value in _divide_rank(mine, come[rank // ep], ends[rank // dp], drained).items():
            sums[part] += value / len(of_rank)
    told = sum(sums.values())
    shrink = seconds / told if told > seconds else 1.0  # clocks of devices, beside the host's
    parts = {part: value * shrink for part, value in sums.items()}
    parts["idle"] += max(0.0, seconds - sum(parts.values()))
    return parts


def _divide_rank(mine: Sequence[Span], come: dict[tuple, float], stage_ends: float, drained: float) -> dict[str, float]:
    """Without what is left, which is idle. `stage_ends`: when the last rank of this one's stage is done."""
    sets = lambda *whats: union((s.start, s.end) for s in mine if s.what in whats)
    section = lambda *names: union((s.start, s.end) for s in mine if s.what == "section" and s.phase in names)
    compute = sets("compute")
    again = intersect(sets("recompute"), compute)
    data = subtract(section("data"), compute)
    taken = union([*compute, *data])
    exchange = subtract(sets("exchange"), taken)
    transfer = intersect(exchange, union((min(s.end, max(s.start, come[key])), s.end) for key, s in _exchanges(mine)))
    taken = union([*taken, *exchange])
    after = [(drained, max(drained, max(s.end for s in mine)))]
    update = subtract(union([*sets("reduce"), *intersect(section("reduce", "update"), after)]), taken)
    taken = union([*taken, *update])
    done = max((s.end for s in mine if s.what in ("compute", "exchange")), default=0.0)
    posted = union((s.start, min(s.end, done)) for s in mine if s.what == "link" and s.kind == "recv" and s.start < done)
    bubble = subtract(union([*posted, (max(done, stage_ends), max(done, stage_ends, drained))]), taken)
    peers = subtract([(done, max(done, stage_ends))], union([*taken, *bubble]))
    return {
        "compute": length(compute) - length(again), "recompute": length(again), "exchange": length(transfer), "bubble": length(bubble),
        "imbalance": length(exchange) - length(transfer) + length(peers), "update": length(update), "data": length(data),
    }  # fmt: skip


def _exchanges(mine: Sequence[Span]) -> list[tuple[tuple, Span]]:
    """A rank's exchanges, each with what it is called: alike on its peers. Several of one name are legs, or tries, by their order."""
    seen: dict[tuple, int] = defaultdict(int)
    named = []
    for s in sorted((s for s in mine if s.what == "exchange"), key=lambda s: s.start):
        name = (s.stage, "F" if s.kind == "F" else "B", s.micro_batch, s.phase)
        named.append(((*name, seen[name]), s))
        seen[name] += 1
    return named


def _last_to_come(of_rank: dict[int, list[Span]], ep: int) -> dict[int, dict[tuple, float]]:
    """Of each group of `ep` ranks: when the last of them issued each exchange."""
    come: dict[int, dict[tuple, float]] = defaultdict(dict)
    for rank, mine in of_rank.items():
        group = come[rank // ep]
        for key, s in _exchanges(mine):
            group[key] = max(group.get(key, s.start), s.start)
    return come
