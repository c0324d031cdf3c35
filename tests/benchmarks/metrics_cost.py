"""What watching costs a step: `python tests/benchmarks/metrics_cost.py [words as for shoestring train]` (`tiny`, three minutes).

`tiny` is trained with every sink on: JSON lines, console, W&B (offline), Prometheus (endpoint, scraped every 5 s, and file), TensorBoard,
alerts. Of each sink: the wall time that the training loop spends in it per step. Beside that: CPU time of the threads and of the process
(W&B's) that sinks have started, as a share of a step of all cores that train. Medians of several runs; the loop's own time is the step's.
"""

import argparse
import contextlib
import io
import os
import statistics
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import torch
from shoestring.conf.compose import load
from shoestring.launch import environment
from shoestring.launch.local import fork_ranks
from shoestring.train import trainer
from shoestring.train.metrics import read_records
from shoestring.train.sinks.sink import Sinks

WARM = 5  # steps
TICK = os.sysconf("SC_CLK_TCK")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", default=[])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--runs", type=int, default=5)
    arguments = parser.parse_args()
    environment.prepare(threads=1)
    runs = [run(arguments.steps, arguments.overrides) for _ in range(arguments.runs)]
    middle = lambda value: statistics.median(map(value, runs))
    step = middle(lambda r: r["step"])
    print(f"a step: {1e3 * step:.0f} ms on {runs[0]['ranks']} ranks, {os.cpu_count()} cores; {len(runs)} runs of {arguments.steps} steps")
    print("| sink | ms a step | share of a step |\n| --- | --- | --- |")
    for name in runs[0]["sinks"]:
        seconds = middle(lambda r, name=name: r["sinks"][name])
        print(f"| {name} | {1e3 * seconds:.3f} | {seconds / step:.3%} |")
    for label, value in (
        ("all, in the loop", lambda r: sum(r["sinks"].values())),
        ("CPU time of their threads", lambda r: r["threads"]),
        ("CPU time of W&B's process", lambda r: r["process"]),
    ):
        cores = 1 if "loop" in label else min(os.cpu_count(), runs[0]["ranks"])
        print(f"| {label} | {1e3 * middle(value):.3f} | {middle(lambda r, v=value: v(r) / r['step']) / cores:.3%} |")


def run(steps: int, overrides: list[str]) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        port = free_port()
        words = [
            *("experiment=tiny", "train.eval_interval=0", "checkpoint.interval=0", f"train.steps={steps}", f"run_dir={folder}/run"),
            *("launch.wandb=offline", "launch.tensorboard=true", f"launch.prometheus_port={port}"),
            *(f"launch.prometheus_file={folder}/run.prom", "launch.log_interval=1", "launch.alerts.command=['true']", *overrides),
        ]
        ended = threading.Event()
        scraper = threading.Thread(target=scrape, args=(port, ended))
        scraper.start()
        config = load(words)
        try:
            measured, *_ = fork_ranks(config.parallel.world_size, job, words, timeout_s=1800)
        finally:
            ended.set()
            scraper.join()
        seconds = statistics.median(r.step_seconds for r in read_records(Path(folder) / "run" / "metrics.jsonl")[WARM:])
        return {"step": seconds, "ranks": config.parallel.world_size, **measured}


def job(words: list[str]) -> dict:
    """On rank 0 what was measured."""
    meter, opened = Meter(), trainer.open_sinks
    trainer.open_sinks = lambda *args, **more: meter.around(opened(*args, **more))
    with contextlib.redirect_stdout(io.StringIO()):  # lines are made, and nobody waits for a terminal
        trainer.run(load(words), torch.device("cpu"), log=lambda line: None)
    return meter.result()


class Meter(Sinks):
    """Sinks, each of whose writes is timed after the first steps."""

    def __init__(self):
        self.seconds, self.steps = {}, 0

    def around(self, sinks: Sinks) -> "Meter":
        super().__init__(sinks.sinks)
        return self

    def _write(self, record):
        self.steps += 1
        if self.steps <= WARM:
            before = self._tasks() if self.steps == 1 else None
            super()._write(record)
            if before is not None:
                self.of_training = before
            self.before = self._cpu()
            return
        for sink in self.sinks:
            began = time.perf_counter()
            sink.write(record)
            name = type(sink).__name__.removesuffix("Sink")
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - began
        self.after = self._cpu()

    def _tasks(self) -> set[str]:
        """Threads that train: those that were there before any record, but for the ones that sinks start when they are opened."""
        sinks = {str(t.native_id) for t in threading.enumerate() if t is not threading.main_thread()}
        return set(os.listdir("/proc/self/task")) - sinks

    def _cpu(self) -> tuple[float, float]:
        """CPU seconds of the sinks' threads, and of the processes below this one."""
        threads = sum(cpu(Path(f"/proc/self/task/{task}/stat")) for task in set(os.listdir("/proc/self/task")) - self.of_training)
        return threads, sum(cpu(Path(f"/proc/{pid}/stat")) for pid in below(os.getpid()))

    def result(self) -> dict:
        if not self.steps:
            return {}
        steps = self.steps - WARM
        threads, process = ((b - a) / steps for a, b in zip(self.before, self.after))
        return {"sinks": {name: seconds / steps for name, seconds in self.seconds.items()}, "threads": threads, "process": process}


def cpu(stat: Path) -> float:
    """User and system seconds of a thread or process; 0 where it has gone."""
    try:
        fields = stat.read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICK


def below(pid: int) -> list[int]:
    """Children and theirs."""
    found = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            for child in map(int, children.read_text().split()):
                found += [child, *below(child)]
    return found


def scrape(port: int, ended: threading.Event) -> None:
    while not ended.wait(5.0):
        with contextlib.suppress(OSError):
            urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5).read()


def free_port() -> int:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


if __name__ == "__main__":
    main()
