"""Oracle for a run's dollars: from the raw lines of its files and its price alone, nothing of the code that keeps the books."""

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

from ..parallel.moments import divided

DIVIDED = ("compute", "recompute", "exposed all-to-all", "bubble", "imbalance", "update", "data", "idle")


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines() if line] if path.exists() else []


def parts(run: Path, price: float, devices: int, *, dp: int, ep: int) -> dict[str, float]:
    """Dollars by part's name. `price`: of a device's hour. One job, one phase, one layout, traced."""
    kept, lost, events = (lines(run / name) for name in ("metrics.jsonl", "metrics_lost.jsonl", "sessions.jsonl"))
    found, every = defaultdict(float), [*kept, *lost]
    begins = [e for e in events if "job" in e]
    ends = {e["session"]: e for e in events if "standing" in e}
    last = {}  # sign of life of a session
    for begin in begins:
        n = begin["session"]
        mine = [r for r in every if r["session"] == n]
        last[n] = max([begin["seconds"], *(r["seconds"] for r in mine), *([ends[n]["seconds"]] if n in ends else [])])
        if mine:
            first = min(mine, key=lambda r: r["seconds"])
            own = first["step_seconds"] + (first["eval_seconds"] or 0) + (first["checkpoint_seconds"] or 0)
            found["start"] += first["seconds"] - own - begin["seconds"]
    found["restart"] = sum(after["seconds"] - last[before["session"]] for before, after in pairwise(begins))
    found["lost work"] = sum(r["step_seconds"] for r in lost)
    found["evaluation"] = sum(r["eval_seconds"] or 0 for r in every)
    found["checkpoint"] = sum(r["checkpoint_seconds"] or 0 for r in every) + sum(e["standing"] for e in ends.values())

    shares = {r["step"]: _shares(run, r, dp, ep) for r in kept if (run / "traces" / f"step_{r['step']}.json").exists()}
    for r in kept:
        step, seconds = r["step"], r["step_seconds"]
        near = [max((s for s in shares if s <= step), default=min(shares)), min((s for s in shares if s >= step), default=max(shares))]
        share = {name: sum(shares[s][name] for s in near) / 2 for name in DIVIDED}
        if step not in shares:
            found["data"] += r["data_seconds"]
            seconds -= r["data_seconds"]
            without = 1 - share.pop("data")
            share = {name: value / without for name, value in share.items()}
        for name, value in share.items():
            found[name] += value * seconds
    total = last[begins[-1]["session"]]
    found["idle"] = total - sum(value for name, value in found.items() if name != "idle")
    return {name: value * devices * price / 3600 for name, value in found.items()}


def _shares(run: Path, record: dict, dp: int, ep: int) -> dict[str, float]:
    events = json.loads((run / "traces" / f"step_{record['step']}.json").read_text())["traceEvents"]
    spans = [e["args"] | {"rank": e["pid"], "start": e["ts"], "end": round(e["ts"] + e["dur"], 1)} for e in events if e["ph"] == "X"]
    of_step = divided(spans, dp=dp, ep=ep)
    shares = {name.replace("exchange", "exposed all-to-all"): value / 1e6 / record["step_seconds"] for name, value in of_step.items()}
    return shares | {"idle": 1 - sum(shares.values())}
