"""Everything that wants a GPU, in one command and within ten minutes: `python tests/benchmarks/gpu.py OUT [--minutes 10] [--only PARTS]`.

    data      the text that is trained on, tokenised
    correct   every kernel on DeepSeek-V3's shapes against FP64, no times
    bench     times, ceilings, peers
    overlap   what the executor costs, and how much it hides of exchanges with itself (`gpu_overlap.py`)
    tune      every configuration of the kernels that have several: which wins, per shape
    step      a cut-down DeepSeek-V3 trained in bf16 and in fp8
    profile   where one such step's time goes, by torch.profiler

Each part is a process of its own with a time limit; one that fails or is late does not stop the others. Into OUT: PART.txt (what it
said), PART.json, PART.html, and summary.json. Without a GPU the same runs at small sizes, in a minute or two, to see that it would.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from shoestring.conf.compose import load
from shoestring.launch import environment
from shoestring.launch.bench import step
from shoestring.parallel.phases import MicroBatch
from shoestring.train.engine import Engine
from torch.profiler import ProfilerActivity

SHOESTRING = [sys.executable, "-c", "import sys; from shoestring.launch.cli import main; sys.exit(main(sys.argv[1:]))"]
TUNED = "fp8,cast,columns,swiglu,norm and cast"
SMALL = ("experiment=smoke", "parallel.ep=1")


@dataclass(frozen=True, kw_only=True)
class Part:
    """`limit_s`: seconds at most, however much time there is."""

    name: str
    command: list[str]
    limit_s: float


@dataclass(frozen=True, kw_only=True)
class Ended:
    name: str
    code: int | None  # None: it was late
    seconds: float


def parts(out: Path, *, gpu: bool) -> list[Part]:
    bench = [*SHOESTRING, "bench"]
    files = lambda name: ["--json", str(out / f"{name}.json"), "--page", str(out / f"{name}.html")]
    words = [] if gpu else list(SMALL)
    return [
        Part(name="data", command=[*SHOESTRING, "data", "build", *(words or step.V3)], limit_s=60),
        Part(name="correct", command=[*bench, "kernels", "--check", *files("correct")], limit_s=90),
        Part(name="bench", command=[*bench, "kernels", *files("bench")], limit_s=230),
        Part(
            name="step",
            command=[*bench, "step", *words, "--steps", "16", "--limit", "105", "--out", str(out / "runs"), *files("step")],
            limit_s=215,
        ),
        Part(name="overlap", command=[sys.executable, str(Path(__file__).with_name("gpu_overlap.py")), str(out), *words], limit_s=120),
        Part(name="tune", command=[*bench, "kernels", "--tune", "--only", TUNED, *files("tune")], limit_s=180),
        Part(name="profile", command=[sys.executable, __file__, str(out), "--profile", *words], limit_s=90),
    ]


def run(chosen: Sequence[Part], out: Path, seconds: float) -> list[Ended]:
    """One after another, until the time is over; the summary is written after each."""
    until, ended = time.monotonic() + seconds, []
    for part in chosen:
        began = time.monotonic()
        code = run_part(part, out / f"{part.name}.txt", min(part.limit_s, until - began))
        ended.append(Ended(name=part.name, code=code, seconds=round(time.monotonic() - began, 1)))
        told = "late: ended" if code is None else "done" if code == 0 else f"failed with {code}"
        print(f"{part.name:<8} {told:<14} {ended[-1].seconds:>6.1f} s   {out / part.name}.txt", flush=True)
        (out / "summary.json").write_text(json.dumps([asdict(e) for e in ended], indent=1) + "\n")
    return ended


def run_part(part: Part, said: Path, limit_s: float) -> int | None:
    """Its exit code, or None where the time was not enough; nothing that it started is left."""
    if limit_s <= 0:
        return None
    with open(said, "w") as log:
        process = subprocess.Popen(part.command, cwd=said.parent, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def profile(words: Sequence[str], out: Path) -> None:
    """One FP8 step after three: a table of kernels by their own time, and a trace for a browser (chrome://tracing, Perfetto)."""
    gpu = torch.cuda.is_available()
    environment.tell_deepspeed("cuda" if gpu else "cpu")
    words = list(words) or step.fit(torch.cuda.get_device_properties(0).total_memory)
    config = load([*words, "precision=fp8", f"train.steps={step.NEVER}"])
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    engine, device = Engine(config, "cuda:0" if gpu else "cpu"), "cuda" if gpu else "cpu"
    sequences = config.train.micro_batch_sequences
    rows = torch.randint(config.model.vocab_size, (sequences, config.data.seq_len + 1), device=device)
    batches = [MicroBatch(tokens_BS=rows[:, :-1], targets_BN=rows[:, 1:])] * (config.sequences_per_step // sequences)
    for _ in range(3):
        engine.train_step(batches, 1e-4)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]
    with torch.profiler.profile(activities=activities, record_shapes=True) as seen:
        engine.train_step(batches, 1e-4)
    by = "self_cuda_time_total" if gpu else "self_cpu_time_total"
    print(seen.key_averages().table(sort_by=by, row_limit=60, max_name_column_width=80))
    seen.export_chrome_trace(str(out / "trace.json.gz"))
    told = [
        {"name": e.key, "calls": e.count, "device_us": e.self_device_time_total, "cpu_us": e.self_cpu_time_total}
        for e in seen.key_averages()
    ]
    (out / "profile.json").write_text(json.dumps(told, indent=1) + "\n")
    dist.destroy_process_group()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--only", default="", help="comma-separated parts")
    parser.add_argument("--profile", nargs="*", default=None, help=argparse.SUPPRESS)
    options = parser.parse_args()
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if options.profile is not None:
        profile(options.profile, out)
        return 0
    every = parts(out, gpu=torch.cuda.is_available())
    wanted = [name for name in options.only.split(",") if name] or [part.name for part in every]
    if unknown := set(wanted) - {part.name for part in every}:
        parser.error(f"no part is called {', '.join(unknown)}; there are {', '.join(part.name for part in every)}")
    ended = run([part for part in every if part.name in wanted], out, 60 * options.minutes)
    return int(any(part.code != 0 for part in ended))


if __name__ == "__main__":
    sys.exit(main())
