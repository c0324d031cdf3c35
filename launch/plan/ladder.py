"""The budget ladder: what each of a family of experiments takes, from one GPU's evening to DeepSeek-V3; and the gate on these figures.

    python -m shoestring.launch.plan.ladder docs          writes docs/ladder.md, and docs/ladder.json: the figures on record
    python -m shoestring.launch.plan.ladder docs --check  prices again: what has changed, by which term; an error beyond CHANGE

Who changes a price beyond that, on purpose, writes the record again in the same commit.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...train import cost, units
from .command import priced_exactly
from .plans import Plan
from .request import Request

CHANGE = 0.01  # of a price, that needs no new record
FIGURES = ("dollars_total", "days", "tokens_per_second_per_gpu", "gpu_hours_per_trillion_tokens", "memory_gb_peak")


@dataclass(frozen=True, kw_only=True)
class Rung:
    experiment: str
    words: tuple[str, ...] = ()
    what: str

    @property
    def request(self) -> Request:
        return Request(words=(f"experiment={self.experiment}", *self.words), search=False)

    @property
    def command(self) -> str:
        return " ".join(["shoestring plan", f"experiment={self.experiment}", *self.words, "search=false"])


_V3 = ("precision=fp8", "parallel.schedule=dualpipe", "parallel.dispatcher=deepep")
RUNGS = (
    Rung(experiment="ladder_1", what="one consumer GPU, an evening"),
    Rung(experiment="ladder_8", what="one node, some days"),
    Rung(experiment="ladder_64", what="eight nodes, some weeks"),
    Rung(experiment="ladder_2048", what="DeepSeek-V3's pre-training"),
    Rung(
        experiment="deepseek_v3",
        words=(*_V3, "stack=deepseek_v3"),
        what="the same with DeepSeek's software (DeepEP), phase by phase: a growing batch, and context extensions in layouts of ours",
    ),
    Rung(experiment="dense_405b", what="a dense model of Llama 3 405B's size: what a token costs where every parameter is active"),
)


def price() -> dict[str, Plan]:
    """By experiment."""
    return {rung.experiment: priced_exactly(rung.request) for rung in RUNGS}


def recorded(plans: Mapping[str, Plan]) -> dict[str, Any]:
    """What the gate compares: figures to six digits, and each part and term of a step."""
    short = lambda value: float(f"{value:.6g}")
    found = {}
    for name, plan in plans.items():
        plain = plan.to_plain()
        found[name] = {key: short(plain[key]) for key in FIGURES}
        found[name]["breakdown"] = {part: short(seconds) for part, seconds in plain["breakdown"].items()}
    return found


def changes(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[list[str], bool]:
    """A line for each experiment, and whether any has changed beyond what needs no new record."""
    lines, beyond = [], before.keys() != after.keys()
    for name in after:
        if name not in before:
            lines.append(f"{name}: not on record")
            continue
        old, new = before[name], after[name]
        share = new["dollars_total"] / old["dollars_total"] - 1
        parts = {
            part: new["breakdown"].get(part, 0.0) - old["breakdown"].get(part, 0.0) for part in {**old["breakdown"], **new["breakdown"]}
        }
        moved = max(parts, key=lambda part: abs(parts[part]))
        by = f", most of it {moved}: {parts[moved]:+.3g} s a step" if share else ""
        lines.append(f"{name}: {units.money(old['dollars_total'])} -> {units.money(new['dollars_total'])} ({100 * share:+.2f} %){by}")
        beyond |= abs(share) > CHANGE
    lines += [f"{name}: on record, and gone" for name in before.keys() - after.keys()]
    return lines, beyond


def page(plans: Mapping[str, Plan]) -> str:
    rows = []
    for rung in RUNGS:
        plan = plans[rung.experiment]
        c, run = plan.config, plan.run
        params = cost.num_params(c.model)
        size = f"{units.count(params.total)}, {units.count(params.active)} active"
        rows.append(
            f"| `{rung.experiment}` | {rung.what} | {size} | {run.gpus:,} x {c.cluster.device} | {units.count(run.tokens)} | "
            f"{run.tokens_per_second_per_gpu.likely:,.0f} | {_days(run.days.likely)} | {units.money(run.dollars.likely)} | "
            f"{units.money(run.dollars.low)} to {units.money(run.dollars.high)} | {plan.memory_gb[1.0]:.1f} of {c.cluster.memory_gb:g} |"
        )
    commands = "\n".join(rung.command for rung in RUNGS)
    table = "\n".join(rows)
    return f"""\
# The budget ladder

What training costs, from one GPU's evening to DeepSeek-V3. Everything here is **projected** by `shoestring plan`; no run of these was made.
Each is an experiment in `conf/experiment/`, complete but for your text; prices are those of `conf/cluster/`: set your own.

| experiment | what | parameters | on | tokens | tokens/s/GPU | time | dollars | interval | GB |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
{table}

```sh
{commands}
```

The dense model takes the work of all its parameters for each token: that, and not layouts, is where the order of magnitude lies.

This page, and the record that the gate compares with (`docs/ladder.json`), are made by `python -m shoestring.launch.plan.ladder docs`. The
gate prices the ladder again at each commit; a price that has changed by more than {100 * CHANGE:g} % wants a new record in the same commit:

```sh
python -m shoestring.launch.plan.ladder docs --check
```
"""


def _days(days: float) -> str:
    return f"{days:.1f} days" if days >= 1 else f"{24 * days:.1f} hours"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="of ladder.md and ladder.json")
    parser.add_argument("--check", action="store_true", help="compare with the record, write nothing")
    options = parser.parse_args(arguments)
    plans = price()
    found, record = recorded(plans), options.folder / "ladder.json"
    before = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
    lines, beyond = changes(before, found)
    print("\n".join(lines))
    if options.check:
        if beyond:
            print(f"error: a price has changed by more than {100 * CHANGE:g} %. On purpose? Without --check the record is written again.")
        return int(beyond)
    record.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (options.folder / "ladder.md").write_text(page(plans), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
