"""The simulated step beside the measured one, of `tiny` on this machine's processes: `python tests/benchmarks/predicted.py [options]`.

First `shoestring bench fabric name=here out=DIR/cluster/here.yaml`. Then, with `--config-dir DIR`, the step of each layout is projected
from what that measured, and timed: forked ranks, the median of some steps, layouts in turn, several rounds.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
import torch.distributed as dist
from shoestring.conf.compose import load
from shoestring.launch.local import fork_ranks
from shoestring.launch.simulate import project_step
from shoestring.parallel.phases import MicroBatch
from shoestring.train.engine import Engine

USUAL = "experiment=tiny optim.warmup_steps=1"
LAYOUTS = {
    2: ["parallel.pp=1 parallel.ep=2", "parallel.pp=1 parallel.ep=1 parallel.edp=2", "parallel.pp=2 parallel.ep=1"],
    4: ["parallel.pp=2 parallel.ep=2", "parallel.pp=1 parallel.ep=4"],
    8: ["parallel.pp=2 parallel.ep=4", "parallel.pp=2 parallel.edp=2 parallel.ep=2"],
}
STEPS = 8


def step_seconds(words: list[str], config_dir: str) -> float:
    """Median, on the slowest rank."""
    torch.set_num_threads(1)
    config = load(words, config_dir)
    engine = Engine(config)
    shape = config.train.micro_batch_sequences, config.data.seq_len + 1
    rows = torch.randint(config.model.vocab_size, shape, generator=torch.Generator().manual_seed(engine.mesh.dp_rank))
    batches = [MicroBatch(tokens_BS=rows[:, :-1], targets_BN=rows[:, 1:])] * config.num_micro_batches
    taken = []
    for _ in range(STEPS):
        dist.barrier()
        began = time.perf_counter()
        engine.train_step(batches, 1e-9)
        taken.append(time.perf_counter() - began)
    median = torch.tensor([statistics.median(taken[2:])], dtype=torch.float64)
    dist.all_reduce(median, dist.ReduceOp.MAX)
    return median.item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config-dir", type=Path, required=True)
    parser.add_argument("--name", default="here", help="of the cluster's file and the stack's (default: here)")
    parser.add_argument("--processes", type=int, nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--words", nargs="*", default=[], help="KEY=VALUE, for another model, batch or length than those of tiny")
    options = parser.parse_args()
    cases = [(n, layout) for n in options.processes for layout in LAYOUTS[n]]
    usual = [*USUAL.split(), *options.words, f"cluster={options.name}", f"stack={options.name}"]
    words = {layout: [*usual, *layout.split()] for _, layout in cases}
    measured: dict[str, list[float]] = {layout: [] for _, layout in cases}
    for _ in range(options.runs):
        for n, layout in cases:
            measured[layout].append(fork_ranks(n, step_seconds, words[layout], str(options.config_dir))[0])
    print(f"{'processes':<10} {'layout':<48} {'projected s':>12} {'measured s':>28} {'apart':>8}")
    for n, layout in cases:
        projected = project_step(load(words[layout], str(options.config_dir)), terms=False).ideal
        times = sorted(measured[layout])
        middle = statistics.median(times)
        spread = f"{middle:.3f} ({times[0]:.3f} to {times[-1]:.3f})"
        print(f"{n:<10} {layout:<48} {projected:>12.3f} {spread:>28} {100 * (projected / middle - 1):>+7.1f}%")


if __name__ == "__main__":
    main()
