"""Does FP8 train as well as BF16? `python tests/benchmarks/fp8_vs_bf16.py [options]` measures it, by held-out loss, on a CPU.

Trains a small model on the Python standard library's sources, for each seed three times on the same samples: in BF16; again, from weights
that were each moved by one BF16 ulp (how far do two equally good runs part?); and in FP8. BF16's weights are then evaluated in FP8, too:
what rounding costs with no training in it. Kill it at any time: called again, it goes on from the last checkpoints, and complete runs are
only read.
"""

import argparse
import datetime
import fcntl
import hashlib
import json
import math
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev

import torch
import torch.distributed as dist
from shoestring.conf.compose import load
from shoestring.conf.phases import phase_at
from shoestring.launch import exit_codes, worker
from shoestring.launch.environment import Place
from shoestring.parallel.optimizer.zero import Chunk
from shoestring.train import cost, trainer
from shoestring.train.checkpoint.checkpointer import Checkpointer
from shoestring.train.data.corpus import open_corpus
from shoestring.train.engine import Engine
from shoestring.train.metrics import read_records, replace_file
from shoestring.train.phase_run import PhaseRun
from shoestring.train.step import Watch
from torch import Tensor

BATCH_TOKENS = 4096
EVALUATIONS = 5  # of a run, the last at its end
SEQ_LEN = 64
SETTINGS = (
    # Every width that a product sums over is a whole number of FP8's blocks of 128.
    "model=tiny", "model.num_layers=2", "model.q_lora_rank=128", "model.kv_lora_rank=128", "model.qk_nope_head_dim=16",
    "model.top_k=2", "data=stdlib", f"data.seq_len={SEQ_LEN}", "data.eval_fraction=0.05",
    # A calm setting: runs that part by themselves drown what is asked. With 3 blocks, 20 steps of warm-up and sequences of 256 tokens,
    # BF16 runs from weights one ulp apart ended 0.1 to 0.7 % apart at this learning rate, at three times as much 2.5 %.
    "parallel=single", "cluster=cpu", "launch.device=cpu", "optim.lr=1e-3", "optim.final_lr=1e-4",
    f"train.global_batch_tokens={BATCH_TOKENS}", f"train.micro_batch_sequences={BATCH_TOKENS // SEQ_LEN}",
    "checkpoint.keep_last=1", "launch.log_interval=50",
)  # fmt: skip
WIDTHS: dict[int, tuple[str, ...]] = {  # the wider has as many active parameters as may be: 0.9 M
    128: (),
    256: ("model.dim=256", "model.dense_hidden_dim=256", "model.init_std=0.042"),
}
READ_IN_FP8 = "read_in_fp8.json"
AIM = 0.25  # per cent
T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)  # Student's t, two-sided 95 %, by degrees of freedom from 1
BEGIN, END = "<!-- fp8_vs_bf16.py writes from here -->", "<!-- to here -->"


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One of the runs of a seed: its precision, whether its initial weights are moved, and its colour (of Okabe and Ito's)."""

    precision: str
    moved: bool = False
    colour: str


ARMS = {
    "bf16": Arm(precision="bf16", colour="#555555"),
    "control": Arm(precision="bf16", moved=True, colour="#0072B2"),
    "fp8": Arm(precision="fp8", colour="#D55E00"),
}
Curve = list[tuple[int, float]]  # (tokens, held-out loss in nats a token) at each evaluation
Runs = dict[str, list[Curve]]  # by arm, of each seed


def main() -> None:
    options = parse()
    if options.run:
        sys.exit(train_here(options.run, options.words))
    if options.read:
        sys.exit(read_here(options.read, options.words))
    runs = train_all(options)
    read = [read_in_fp8(options, seed) for seed in range(options.seeds)]
    measured = f"{setting(options)}\n\n{table(runs)}\n{rounding(runs, read)}\n\n{verdict(runs)}"
    print(f"\n{measured}")
    if options.page:
        write_page(options, runs, read, measured)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500, help=f"of each run, of {BATCH_TOKENS} tokens (default 500)")
    parser.add_argument("--width", type=int, default=256, choices=WIDTHS, help="dim of the model (default 256)")
    parser.add_argument("--seeds", type=int, default=5, choices=range(2, len(T_975) + 2), help="of three runs each (default 5)")
    parser.add_argument(
        "--held-out", type=int, default=1792, metavar="N", help=f"sequences of {SEQ_LEN} tokens to evaluate on (default 1792)"
    )
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, of one core each (default 1); no figure depends on it")
    parser.add_argument("--out", type=Path, default=Path(tempfile.gettempdir(), "fp8_vs_bf16"), help="folder of the runs")
    parser.add_argument("--page", type=Path, metavar="MD", help="put the result into this page, picture and JSON beside it; needs `bench`")
    parser.add_argument("--run", choices=ARMS, help=argparse.SUPPRESS)  # what the program starts itself with
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.steps < EVALUATIONS:
        parser.error(f"--steps {options.steps}: at least {EVALUATIONS}, one for each evaluation")
    return options


# ---------------------------------------------------------------- runs


def train_all(options: argparse.Namespace) -> Runs:
    """Seed by seed, so that an early look with fewer --seeds already compares."""
    pairs = [(name, seed) for seed in range(options.seeds) for name in ARMS]
    with ThreadPoolExecutor(options.jobs) as pool:
        try:
            curves = dict(zip(pairs, pool.map(lambda pair: train(options, *pair), pairs)))
        except BaseException:
            pool.shutdown(cancel_futures=True)  # Ctrl-C reaches the runs, too: they save; no others are begun
            raise
    return {name: [curves[name, seed] for seed in range(options.seeds)] for name in ARMS}


def train(options: argparse.Namespace, name: str, seed: int) -> Curve:
    """One run to its end, from its newest checkpoint if it has one. Exits with what is wrong where the run fails."""
    run_dir, words = settings_of(options, name, seed)
    if not is_complete(run_dir, options.steps):
        run_dir.mkdir(parents=True, exist_ok=True)
        code = call(run_dir, "--run", name, "--", *words, f"name={name}-{seed}", f"run_dir={run_dir}")
        if code or not is_complete(run_dir, options.steps):
            failed(f"{name}, seed {seed}: incomplete (exit code {code})", run_dir)
    curve = curve_of(run_dir)
    print(f"{datetime.datetime.now():%H:%M} {name}, seed {seed}: held-out {curve[-1][1]:.4f}", flush=True)
    return curve


def read_in_fp8(options: argparse.Namespace, seed: int) -> float:
    """Held-out loss of the seed's complete BF16 run, computed in FP8."""
    run_dir, words = settings_of(options, "bf16", seed)
    answer = run_dir / READ_IN_FP8
    if not answer.exists() and call(run_dir, "--read", str(run_dir), "--", *words, "precision=fp8", f"run_dir={run_dir}"):
        failed(f"bf16, seed {seed}: could not be read in FP8", run_dir)
    return json.loads(answer.read_text())


def settings_of(options: argparse.Namespace, name: str, seed: int) -> tuple[Path, list[str]]:
    """A run's folder and its words."""
    steps, every = options.steps, options.steps // EVALUATIONS
    words = [
        *SETTINGS, *WIDTHS[options.width], f"precision={ARMS[name].precision}", f"train.steps={steps}", f"train.eval_interval={every}",
        f"checkpoint.interval={max(1, every // 2)}", f"optim.warmup_steps={min(100, steps // 4)}", f"train.seed={seed}",
        f"train.eval_sequences={options.held_out}",
    ]  # fmt: skip
    # Resuming does not ask whether the learning rate is still the same: other words, another folder.
    return (options.out / f"{name}-{seed}-{hashlib.sha256(shlex.join(words).encode()).hexdigest()[:8]}").absolute(), words


def call(run_dir: Path, *arguments: str) -> int:
    """This program, in a process of its own. The exit code."""
    with open(run_dir / "console.log", "a") as log:
        return subprocess.run([sys.executable, __file__, *arguments], env=environment(), stdout=log, stderr=subprocess.STDOUT).returncode


def failed(what: str, run_dir: Path) -> None:
    log = run_dir / "console.log"
    last = "\n".join(log.read_text(errors="replace").splitlines()[-5:])
    raise SystemExit(f"{what}; {log} ends with\n{last}\nto go on: the same command")


def environment() -> dict[str, str]:
    """One thread, and memory that glibc keeps instead of asking for it at each tensor: FP8's references make many."""
    keep = {f"MALLOC_{name}_": str(2**31) for name in ("TRIM_THRESHOLD", "MMAP_THRESHOLD")}
    return os.environ | keep | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def is_complete(run_dir: Path, steps: int) -> bool:
    records = read_records(run_dir / "metrics.jsonl") if (run_dir / "metrics.jsonl").exists() else []
    return len(records) == steps


def curve_of(run_dir: Path) -> Curve:
    return [(r.tokens, r.eval_loss) for r in read_records(run_dir / "metrics.jsonl") if r.eval_loss is not None]


# ---------------------------------------------------------------- one run, in a process of its own


def train_here(name: str, words: Sequence[str]) -> int:
    """Train as `shoestring train` does, and stop at a checkpoint when the process that asked for it is gone. The exit code."""
    config, parent = load(words), os.getppid()
    with open(Path(config.run_dir) / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a run whose program was killed may still be saving
        if os.getppid() != parent:
            return exit_codes.PREEMPTED
        watch = MoveByOneUlp(config.train.seed) if ARMS[name].moved else None
        here = lambda config, device, *, stop, **more: trainer.run(
            config, device, stop=lambda: stop() or os.getppid() != parent, watch=watch, **more
        )
        return worker.run(config, Place(), words, train=here)


def read_here(run_dir: Path, words: Sequence[str]) -> int:
    """Evaluate the newest checkpoint as these words say; the loss goes into a file beside it."""
    config = load(words)
    dist.init_process_group(store=dist.HashStore(), rank=0, world_size=1)
    phase = phase_at(config, config.train.steps - 1)
    corpus = open_corpus(config.data, vocab_size=config.model.vocab_size, seed=config.train.seed, log=lambda line: None)
    part = PhaseRun(phase, corpus, torch.device("cpu"))
    saved = Checkpointer(run_dir / "checkpoints", keep_last=1, async_save=False)
    rng = torch.get_rng_state()  # a checkpoint wants a place for all that it holds
    saved.load(saved.latest(), part.engine.chunks(saving=False) | {"rng.0": Chunk(rng.numel(), 0, rng)})
    part.engine.optimizer.load_state(config.train.steps)
    replace_file(run_dir / READ_IN_FP8, json.dumps(part.evaluate().loss) + "\n")
    return 0


class MoveByOneUlp(Watch):
    """Every initial weight, and its FP32 master, becomes one of its two BF16 neighbours, by the toss of a coin."""

    def __init__(self, seed: int):
        self.seed = seed

    def begun(self, engine: Engine) -> None:
        if engine.optimizer.steps:
            return  # resumed: they were moved then
        coin = torch.Generator().manual_seed(self.seed)
        for piece, chunk in engine.optimizer.state().items():
            if piece.endswith(".master"):
                chunk.data.copy_(neighbours(chunk.data.bfloat16(), coin))
        engine.optimizer.load_state(0)


def neighbours(weights: Tensor, coin: torch.Generator) -> Tensor:
    """Of BF16 numbers, the next one above or below each."""
    up = torch.rand(weights.shape, generator=coin) < 0.5
    return torch.nextafter(weights, torch.where(up, math.inf, -math.inf).to(weights))


# ---------------------------------------------------------------- figures


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean over seeds with its 95 % interval, mean - half to mean + half (Student's t)."""

    mean: float
    half: float

    @property
    def low(self) -> float:
        return self.mean - self.half

    @property
    def high(self) -> float:
        return self.mean + self.half

    def __str__(self) -> str:
        return f"{self.low:+.3f} % to {self.high:+.3f} %"


def apart(run: Curve, bf16: Curve) -> list[float]:
    """Of one seed, at each evaluation: how much higher than BF16's the held-out loss is, per cent."""
    return [100 * (loss - other) / other for (_, loss), (_, other) in zip(run, bf16, strict=True)]


def at_end(runs: Runs, name: str) -> list[float]:
    """`apart` at the end of each seed's run."""
    return [apart(run, bf16)[-1] for run, bf16 in zip(runs[name], runs["bf16"], strict=True)]


def interval(values: Sequence[float]) -> Interval:
    """Of two values and more."""
    return Interval(mean=fmean(values), half=T_975[len(values) - 2] * stdev(values) / math.sqrt(len(values)))


def table(runs: Runs) -> str:
    """Held-out losses at the end, seed by seed, and how far the other two are from BF16's."""
    others = [name for name in ARMS if name != "bf16"]
    differences = {name: at_end(runs, name) for name in others}
    lines = ["seed  " + "".join(f"{name:>9}" for name in ARMS) + "".join(f"{f'{name} - bf16':>18}" for name in others)]
    for seed in range(len(runs["bf16"])):
        losses = "".join(f"{runs[name][seed][-1][1]:9.4f}" for name in ARMS)
        lines.append(f"{seed:<6}{losses}" + "".join(f"{differences[name][seed]:+16.3f} %" for name in others))
    losses = "".join(f"{fmean(run[-1][1] for run in runs[name]):9.4f}" for name in ARMS)
    ends = [interval(differences[name]) for name in others]
    return "\n".join([*lines, f"mean  {losses}" + "".join(f"{f'{end.mean:+.3f} ± {end.half:.3f} %':>18}" for end in ends)])


def rounding(runs: Runs, read: Sequence[float]) -> str:
    """`read`: of each seed, the loss of BF16's weights computed in FP8."""
    apart_ = [100 * (loss - run[-1][1]) / run[-1][1] for loss, run in zip(read, runs["bf16"], strict=True)]
    found = interval(apart_)
    return f"bf16's weights, evaluated in fp8: {found.mean:+.3f} ± {found.half:.3f} %"


def verdict(runs: Runs) -> str:
    """What the intervals say of the aim, and what they do not."""
    fp8, control = (interval(at_end(runs, name)) for name in ("fp8", "control"))
    if abs(fp8.mean) >= AIM:
        said = f"The aim is missed: the mean difference of FP8 is {fp8.mean:+.3f} %, and was to be below {AIM} % either way."
    elif max(abs(fp8.low), abs(fp8.high)) < AIM:
        said = f"The aim is met: the whole interval of FP8, {fp8}, is within {AIM} %."
    else:
        said = f"The mean difference of FP8, {fp8.mean:+.3f} %, is within {AIM} %; its interval, {fp8}, is not: these seeds do not decide."
    zero = "inside" if fp8.low <= 0 <= fp8.high else "outside"
    return f"{said}\nZero is {zero} its interval. The control's is {control}."


def setting(options: argparse.Namespace) -> str:
    libraries = ", ".join(f"{name} {version(name)}" for name in ("shoestring", "torch"))
    params = cost.num_params(load([*SETTINGS, *WIDTHS[options.width]]).model)
    return (
        f"{datetime.date.today()}  python {platform.python_version()}, {libraries}\n"
        f"{params.total / 1e6:.2f} M parameters, {params.active / 1e6:.2f} M active; {options.steps} steps of {BATCH_TOKENS} tokens: "
        f"{options.steps * BATCH_TOKENS / 1e6:.2f} M tokens a run\n"
        f"held-out loss of {options.held_out * SEQ_LEN} tokens, nats a token; {options.seeds} seeds, mean ± half of the 95 % interval"
    )


# ---------------------------------------------------------------- picture and page


def write_page(options: argparse.Namespace, runs: Runs, read: Sequence[float], measured: str) -> None:
    """Fills the marked part of the page; `fp8_vs_bf16.svg` and `.json` go beside it. ValueError where the page has no such part."""
    before, begin, rest = options.page.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not end:
        raise ValueError(f"{options.page}: no place for the result; it goes between the lines {BEGIN} and {END}")
    picture = options.page.with_name("fp8_vs_bf16.svg")
    plot(runs, picture)
    ends = {name: {"per_cent": at_end(runs, name), **asdict(interval(at_end(runs, name)))} for name in ARMS if name != "bf16"}
    data = {
        "date": f"{datetime.date.today()}",
        "settings": [*SETTINGS, *WIDTHS[options.width]],
        "steps": options.steps,
        "aim_per_cent": AIM,
        "at_end": ends,
        "runs": runs,
        "bf16_read_in_fp8": read,
    }
    replace_file(picture.with_suffix(".json"), json.dumps(data, indent=1) + "\n")
    words = f"--width {options.width} --steps {options.steps} --seeds {options.seeds} --held-out {options.held_out} --page {options.page}"
    command = f"python tests/benchmarks/fp8_vs_bf16.py {words}"
    image = f"![Held-out loss, and difference to BF16, over tokens]({picture.name})"
    legend = (
        "A thin line is a seed, a bold one their mean. The bars are the 95 % intervals at the end, the grey band is the aim.\n"
        f"`{picture.with_suffix('.json').name}`, beside this page, has every evaluation of every run."
    )
    text = f"```sh\n{command}\n```\n\n```text\n{measured}\n```\n\n{image}\n\n{legend}\n"
    replace_file(options.page, f"{before}{begin}\n\n{text}\n{end}{after}")


def plot(runs: Runs, path: Path) -> None:
    """Held-out loss, and how far control and FP8 are from BF16: a thin line per seed, a bold one for their mean."""
    import matplotlib  # only here: the table needs no extra
    from matplotlib.figure import Figure

    # Text stays text, and equal runs give equal files.
    style = {"svg.fonttype": "none", "svg.hashsalt": "fp8", "font.size": 10, "axes.spines.top": False, "axes.spines.right": False}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(9.6, 3.8), layout="constrained", facecolor="white")
        figure.get_layout_engine().set(w_pad=0.12, h_pad=0.1)
        losses, differences = figure.subplots(1, 2)
        tokens = [tokens for tokens, _ in runs["bf16"][0]]
        for name in ARMS:
            draw(losses, tokens, [[loss for _, loss in run] for run in runs[name]], name)
        losses.legend(frameon=False)
        titled(losses, "held-out loss, nats a token")
        differences.axhspan(-AIM, AIM, color="#eeeeee", zorder=0)
        differences.axhline(0, color=ARMS["bf16"].colour, linewidth=1)
        for offset, name in enumerate(name for name in ARMS if name != "bf16"):
            draw(differences, tokens, [apart(run, bf16) for run, bf16 in zip(runs[name], runs["bf16"])], name)
            end = interval(at_end(runs, name))
            at = tokens[-1] * (1.04 + 0.03 * offset)
            differences.errorbar(at, end.mean, end.half, fmt="o", markersize=4, capsize=3, color=ARMS[name].colour)
        titled(differences, "held-out loss, difference to BF16, per cent")
        figure.savefig(path, metadata={"Date": None})


def draw(axes, tokens: list[int], curves: list[list[float]], name: str) -> None:
    for values in curves:
        axes.plot(tokens, values, color=ARMS[name].colour, linewidth=0.6, alpha=0.5)
    axes.plot(
        tokens, [fmean(values) for values in zip(*curves)], color=ARMS[name].colour, linewidth=2, label=name, marker="o", markersize=3
    )


def titled(axes, title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("tokens")
    axes.xaxis.set_major_formatter(_millions)
    axes.set_xlim(0)
    axes.locator_params("x", nbins=5)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)


def _millions(value: float, _) -> str:
    return f"{value / 1e6:g} M" if value else "0"


if __name__ == "__main__":
    main()
