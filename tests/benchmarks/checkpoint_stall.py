"""What saving costs a run: `python tests/benchmarks/checkpoint_stall.py [words as for shoestring train]` (`tiny`, a minute or two).

Two runs that save every 10 steps, one asynchronously and one not. Of each: the share of its time in which training stands still, and how
much longer than the others those steps take beside which a save is written. Then what one rank's file takes: written, hashed on the way,
flushed, read back.
"""

import argparse
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch
from shoestring.conf.compose import load
from shoestring.launch import environment
from shoestring.launch.local import fork_ranks
from shoestring.train import trainer
from shoestring.train.checkpoint.files import HashedFile, digest, forget_cache
from shoestring.train.metrics import StepRecord, read_records

INTERVAL = 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", default=[])
    parser.add_argument("--steps", type=int, default=80)
    arguments = parser.parse_args()
    environment.prepare(threads=1)
    with tempfile.TemporaryDirectory() as folder:
        for kind in ("true", "false"):
            words = [
                *("experiment=tiny", "train.eval_interval=0", "launch.log_interval=1000", f"train.steps={arguments.steps}"),
                *(f"checkpoint.interval={INTERVAL}", f"checkpoint.async_save={kind}", f"run_dir={folder}/{kind}", *arguments.overrides),
            ]
            config = load(words)
            fork_ranks(config.parallel.world_size, trainer.run, config, torch.device("cpu"), timeout_s=1800)
            print(f"checkpoint.async_save={kind}: {described(read_records(Path(config.run_dir) / 'metrics.jsonl'))}", flush=True)
        size = max(p.stat().st_size for p in Path(folder).rglob("*.distcp"))
        print(f"one rank's file, {size / 1e6:.1f} MB: {one_file(Path(folder) / 'file', size)}")


def described(records: list[StepRecord]) -> str:
    records = records[INTERVAL:]  # the first steps and the first save warm up
    trained, stood = sum(r.step_seconds for r in records), sum(r.checkpoint_seconds or 0.0 for r in records)
    after = [r.step_seconds for r in records if r.step % INTERVAL == 1]
    others = [r.step_seconds for r in records if r.step % INTERVAL not in (0, 1, 2)]
    saves = len(after)
    usual, late = statistics.median(others), statistics.median(after)
    beside = saves * (late - usual) / (trained + stood)
    return (
        f"training stands still for {stood / (trained + stood):.2%} of the time ({1e3 * stood / saves:.0f} ms a save); "
        f"the step after a save takes {late:.3f} s, others {usual:.3f} s: {beside:+.2%} of the time"
    )


def one_file(path: Path, size: int) -> str:
    data, took = torch.randint(256, (size,), dtype=torch.uint8).numpy(), {}
    for name in ("written", "hashed"):
        began = time.perf_counter()
        if name == "written":
            path.write_bytes(data)
        else:
            with HashedFile(path) as file:
                file.write(data)
        took[name] = time.perf_counter() - began
    began = time.perf_counter()
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
    took["flushed"] = time.perf_counter() - began
    began = time.perf_counter()
    forget_cache(path)
    digest(path)
    took["read back"] = time.perf_counter() - began
    return ", ".join(f"{name} {1e3 * seconds:.0f} ms" for name, seconds in took.items())


if __name__ == "__main__":
    main()
