"""What keeps experts balanced, and what that costs in loss: `python tests/benchmarks/balance_ablation.py [options]`.

Trains `tiny` on the Python standard library's sources with three kinds of balancing, at equal tokens and with several seeds, each run by
`shoestring train` in one process in FP32. Prints a table; --page also writes docs/balance.md with its picture. Called again after an
interruption, it goes on where it was; complete runs are only read.
"""

import argparse
import datetime
import hashlib
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev

from shoestring.train.metrics import StepRecord, read_records

BATCH_TOKENS = 4096
SETTINGS = (
    "model=tiny", "data=stdlib", "parallel=single", "precision=fp32", "cluster=cpu", "launch.device=cpu", "optim.lr=3e-3",
    f"train.global_batch_tokens={BATCH_TOKENS}", "train.micro_batch_sequences=16", "train.eval_sequences=256",
    "checkpoint.interval=50", "checkpoint.keep_last=1", "launch.log_interval=50",
)  # fmt: skip
TAIL = 0.1  # of a run's steps, the last: its final figures are their means
POINTS = 60  # of a curve in the picture, each the mean of equally many steps


@dataclass(frozen=True, kw_only=True)
class Variant:
    """A kind of balancing: its words for `shoestring train`, and its colour (of Okabe and Ito's, which everyone tells apart)."""

    words: tuple[str, ...]
    what: str
    colour: str


VARIANTS = {
    "bias": Variant(
        words=("optim.bias_update_speed=0.001", "optim.sequence_balance_coef=0"),
        what="selection biases, moved against the load by 0.001 a step; no auxiliary loss",
        colour="#0072B2",
    ),
    "aux": Variant(
        words=("optim.bias_update_speed=0", "optim.sequence_balance_coef=0.01"),
        what="sequence-wise auxiliary loss, coefficient 0.01; no biases",
        colour="#D55E00",
    ),
    "none": Variant(words=("optim.bias_update_speed=0", "optim.sequence_balance_coef=0"), what="neither", colour="#555555"),
}
Runs = dict[str, list[list[StepRecord]]]  # by variant, of each seed: one record per step


def main() -> None:
    options = parse()
    runs = train_all(options)
    measured = f"{setting(options)}\n\n" + table({name: [final(run) for run in seeds] for name, seeds in runs.items()})
    print(f"\n{measured}")
    if options.plot:
        plot(runs, options.plot)
    if options.page:
        options.page.write_text(page(options, runs, measured), encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600, help=f"of each run, of {BATCH_TOKENS} tokens (default 600)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each variant (default 3)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="the others are held against the first")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, of one core each (default 1); no figure depends on it")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir(), "balance_ablation"), help="folder of the runs")
    parser.add_argument("--plot", type=Path, metavar="SVG", help="draw the curves; needs the extra `bench`")
    parser.add_argument("--page", type=Path, metavar="MD", help="write the page; its picture goes beside it unless --plot says where")
    options = parser.parse_args()
    if options.page and not options.plot:
        options.plot = options.page.with_name("balance_ablation.svg")
    return options


# ---------------------------------------------------------------- runs


def train_all(options: argparse.Namespace) -> Runs:
    """Seed by seed, so that an early look at a long ablation already compares."""
    pairs = [(name, seed) for seed in range(options.seeds) for name in options.variants]
    with ThreadPoolExecutor(options.jobs) as pool:
        records = dict(zip(pairs, pool.map(lambda pair: train(options.out, options.steps, *pair), pairs)))
    return {name: [records[name, seed] for seed in range(options.seeds)] for name in options.variants}


def train(out: Path, steps: int, name: str, seed: int) -> list[StepRecord]:
    """One run to its end, from its newest checkpoint if it has one. Exits with what is wrong where the run fails."""
    words = [*SETTINGS, *VARIANTS[name].words, f"train.steps={steps}", f"optim.warmup_steps={min(20, steps // 4)}", f"train.seed={seed}"]
    # Resuming does not ask whether the learning rate or the balancing is still the same: other words, another folder.
    run_dir = out / f"{name}-{seed}-{hashlib.sha256(shlex.join(words).encode()).hexdigest()[:8]}"
    if not is_complete(run_dir, steps):
        run_dir.mkdir(parents=True, exist_ok=True)
        log = run_dir / "console.log"
        with open(log, "a") as file:
            command = [sys.executable, "-m", "shoestring.train", *words, f"name={name}-{seed}", "run_dir=."]
            code = subprocess.run(command, cwd=run_dir, stdout=file, stderr=subprocess.STDOUT).returncode
        if code or not is_complete(run_dir, steps):
            last = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
            raise SystemExit(f"{name}, seed {seed}: incomplete (exit code {code}); {log} ends with\n{last}\nto go on: the same command")
    records = read_records(run_dir / "metrics.jsonl")
    print(f"{name}, seed {seed}: {final(records)}", flush=True)
    return records


def is_complete(run_dir: Path, steps: int) -> bool:
    records = read_records(run_dir / "metrics.jsonl") if (run_dir / "metrics.jsonl").exists() else []
    return len(records) == steps


# ---------------------------------------------------------------- figures


@dataclass(frozen=True, kw_only=True)
class Final:
    """How a run ended: means over its last steps, and the held-out loss after the very last."""

    loss: float  # nats a token
    held_out: float  # likewise
    max_vio: float  # of the global batch, mean over layers
    dead_experts: float  # of all layers, in a step


def final(run: Sequence[StepRecord]) -> Final:
    """Of the last `TAIL` of the steps, at least one."""
    tail = run[-max(1, round(TAIL * len(run))) :]
    means = [fmean(getattr(record, name) for record in tail) for name in ("loss", "max_vio_mean", "dead_experts")]
    return Final(loss=means[0], held_out=run[-1].eval_loss, max_vio=means[1], dead_experts=means[2])


def table(finals: dict[str, list[Final]]) -> str:
    """One line per variant: means over seeds, ± their standard deviation. Differences are taken seed by seed."""
    first = next(iter(finals))
    lines = [f"{'variant':<8} {'loss':>17} {'held-out':>17} {f'held-out - {first}':>19} {'MaxVio':>15} {'dead experts':>15}"]
    for name, seeds in finals.items():
        apart = [mine.held_out - other.held_out for mine, other in zip(seeds, finals[first])]
        lines.append(
            f"{name:<8} {spread([s.loss for s in seeds], 4):>17} {spread([s.held_out for s in seeds], 4):>17} "
            f"{spread(apart, 4, sign='+') if name != first else '':>19} "
            f"{spread([s.max_vio for s in seeds], 3):>15} {spread([s.dead_experts for s in seeds], 2):>15}"
        )
    return "\n".join(lines)


def spread(values: Sequence[float], digits: int, sign: str = "") -> str:
    """Mean ± sample standard deviation; of a single value, the value."""
    more = f" ± {stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{fmean(values):{sign}.{digits}f}{more}"


def setting(options: argparse.Namespace) -> str:
    libraries = ", ".join(f"{name} {version(name)}" for name in ("shoestring", "torch"))
    return (
        f"{datetime.date.today()}  python {platform.python_version()}, {libraries}\n"
        f"{options.steps} steps of {BATCH_TOKENS} tokens: {options.steps * BATCH_TOKENS / 1e6:.2f} M tokens a run; "
        f"{options.seeds} seed(s), mean ± standard deviation"
    )


# ---------------------------------------------------------------- picture


def plot(runs: Runs, path: Path) -> None:
    """Loss and MaxVio over tokens: a thin line per seed, a bold one for their mean, named at its end."""
    import matplotlib  # only here: the table needs no extra
    from matplotlib.figure import Figure

    # Text stays text, and equal runs give equal files.
    style = {"svg.fonttype": "none", "svg.hashsalt": "balance", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(9.6, 3.8), layout="constrained", facecolor="white")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
        losses, balance = figure.subplots(1, 2)
        heights = settled([curve(run, "loss") for seeds in runs.values() for run in seeds])
        draw(losses, runs, "loss", "training loss, nats a token", limits=heights)
        draw(balance, runs, "max_vio_mean", "MaxVio, 0 is perfect balance", limits=(0, None))
        figure.savefig(path, metadata={"Date": None})


def draw(axes, runs: Runs, field: str, title: str, limits: tuple[float | None, float | None]) -> None:
    """One panel, from and to these heights; None: as far as the curves go."""
    ends = {}
    for name, seeds in runs.items():
        tokens, *curves = [curve(seeds[0], "tokens"), *(curve(run, field) for run in seeds)]
        mean = [fmean(values) for values in zip(*curves)]
        for values in curves:
            axes.plot(tokens, values, color=VARIANTS[name].colour, linewidth=0.6, alpha=0.5)
        axes.plot(tokens, mean, color=VARIANTS[name].colour, linewidth=2)
        ends[name] = mean[-1]
    axes.set_ylim(*limits)
    axes.set_xlim(0)
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value / 1e6:g} M" if value else "0")
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    label_ends(axes, ends)


def settled(curves: Iterable[list[float]]) -> tuple[float, float]:
    """The lowest and highest value of the curves' second halves: all fall from the same height, next to which nothing else would show."""
    values = [value for one in curves for value in one[len(one) // 2 :]]
    return min(values), max(values)


def label_ends(axes, ends: dict[str, float]) -> None:
    """Names right of the last points, moved apart where they would overlap."""
    bottom, top = axes.get_ylim()
    heights = {name: (end - bottom) / (top - bottom) for name, end in sorted(ends.items(), key=lambda item: item[1])}
    for below, name in pairwise(heights):
        heights[name] = max(heights[name], heights[below] + 0.06)
    for name, height in heights.items():
        axes.text(1.02, height, name, transform=axes.transAxes, va="center", color=VARIANTS[name].colour, weight="bold")


def curve(run: Sequence[StepRecord], field: str) -> list[float]:
    """At most `POINTS` means of equally many steps each; the steps left over are the first."""
    width = -(-len(run) // POINTS)
    values = [getattr(record, field) for record in run][len(run) % width :]
    return [fmean(values[at : at + width]) for at in range(0, len(values), width)]


# ---------------------------------------------------------------- page


def page(options: argparse.Namespace, runs: Runs, measured: str) -> str:
    """docs/balance.md, whole."""
    chosen = ["--variants", *options.variants] if options.variants != list(VARIANTS) else []
    command = f"--steps {options.steps} --seeds {options.seeds} {shlex.join([*chosen, '--page', str(options.page)])}"
    rows = "\n".join(f"| `{name}` | {VARIANTS[name].what} |" for name in options.variants)
    num_experts = sum(len(layer) for layer in runs[options.variants[0]][0][-1].expert_load)
    picture = os.path.relpath(options.plot, options.page.parent)
    return f"""\
# What keeps experts balanced, and what that costs

Nothing in a language model's loss asks a router to use its experts evenly. An expert with few tokens learns little, and under expert
parallelism all ranks wait for the one with the most. The same model, trained on the same tokens with:

| variant | balancing |
| --- | --- |
{rows}

Seed by seed, all start from the same weights and read the same samples of the Python standard library's sources. The model is `tiny`, one
process, FP32; the held-out documents are the same for all. Neither the learning rate nor the coefficients were tuned for any variant.

```sh
pip install --constraint constraints.txt --editable '.[bench]'    # for the picture
python tests/benchmarks/balance_ablation.py {command}
```

```text
{measured}
```

Loss, MaxVio and dead experts are means of the last tenth of the steps; losses are cross-entropy alone, in nats a token. MaxVio is
(tokens of the busiest expert - mean) / mean, of a layer's global batch, and here the mean over layers. A dead expert received no token in
a step; there are {num_experts}. `held-out - {options.variants[0]}` is the difference to the run of the same seed.

![Training loss and MaxVio over tokens, by kind of balancing]({picture})

A thin line is a seed, a bold one their mean. The left panel shows the heights of the second half.
"""


if __name__ == "__main__":
    main()
