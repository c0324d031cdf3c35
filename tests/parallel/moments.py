"""Oracle for where a traced step's time went: each stretch between two neighbouring times of the trace is asked, rank by rank, what it
was.

Written from the definitions alone, over dictionaries as a trace's file has them: rank, what, kind, stage, micro_batch, phase, start, end.
"""

from itertools import pairwise


def divided(spans: list[dict], *, dp: int, ep: int) -> dict[str, float]:
    """Mean seconds over ranks, without idle."""
    ranks = sorted({s["rank"] for s in spans})
    times = sorted({t for s in spans for t in (s["start"], s["end"])} | {0.0})
    last = _last_issued(spans, ep)
    work = [s for s in spans if s["what"] in ("compute", "exchange")]
    drained = max(s["end"] for s in spans if s["what"] in ("compute", "exchange", "link", "pair"))
    found = dict.fromkeys(("compute", "recompute", "exchange", "bubble", "imbalance", "update", "data", "idle"), 0.0)
    for rank in ranks:
        mine = [s for s in spans if s["rank"] == rank]
        done = max((s["end"] for s in work if s["rank"] == rank), default=0.0)
        stage_done = max((s["end"] for s in work if s["rank"] // dp == rank // dp), default=0.0)
        for a, b in pairwise(times):
            now = [s for s in mine if s["start"] <= a and b <= s["end"]]
            found[_part(now, a, b, last, done, stage_done, drained)] += (b - a) / len(ranks)
    del found["idle"]
    return found


def _part(now, a, b, last, done, stage_done, drained) -> str:
    on = lambda what: [s for s in now if s["what"] == what]
    at = {s["phase"] for s in on("section")}
    if on("compute"):
        return "recompute" if on("recompute") else "compute"
    if "data" in at:
        return "data"
    if flying := on("exchange"):
        return "exchange" if any(last[id(s)] <= a for s in flying) else "imbalance"
    if on("reduce") or (at & {"reduce", "update"} and a >= drained):
        return "update"
    if any(s["kind"] == "recv" for s in on("link")) and b <= done:
        return "bubble"
    if stage_done <= a and b <= drained:
        return "bubble"
    return "imbalance" if done <= a and b <= stage_done else "idle"


def _last_issued(spans, ep) -> dict[int, float]:
    """Of each exchange, by its object: when the last of its group issued theirs. The n-th of a name on one rank is the n-th on others."""
    groups: dict = {}
    for rank in {s["rank"] for s in spans}:
        counts: dict = {}
        for s in sorted((s for s in spans if s["rank"] == rank and s["what"] == "exchange"), key=lambda s: s["start"]):
            name = (rank // ep, s["stage"], s["kind"] == "F", s["micro_batch"], s["phase"])
            counts[name] = counts.get(name, 0) + 1
            groups.setdefault((*name, counts[name]), []).append(s)
    return {id(s): max(t["start"] for t in group) for group in groups.values() for s in group}
