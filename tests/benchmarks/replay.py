"""What `guard.replay_interval` costs: `python tests/benchmarks/replay.py [words as for shoestring train]` (`tiny`, a minute or two).

One run in which steps with and without a replay take turns, and the look at gradients that should be zero is timed in each. Medians on the
first rank: by the clock, and of what its own thread computes, which other processes on the machine do not change.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from shoestring.conf.compose import load
from shoestring.conf.phases import phase_at
from shoestring.launch import environment
from shoestring.launch.local import fork_ranks
from shoestring.train.data.corpus import open_corpus
from shoestring.train.phase_run import PhaseRun

Took = list[tuple[float, float]]  # seconds by the clock, of the thread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", default=[])
    parser.add_argument("--steps", type=int, default=60)
    arguments = parser.parse_args()
    environment.prepare(threads=1)
    with tempfile.TemporaryDirectory() as folder:
        words = ["experiment=tiny", f"run_dir={Path(folder) / 'run'}", f"train.steps={arguments.steps}", *arguments.overrides]
        config = load(words)
        plain, replayed, look = fork_ranks(config.parallel.world_size, steps, words, timeout_s=1800)[0]
    interval = config.guard.replay_interval
    for column, name in enumerate(("by the clock", "of its own thread")):
        once, twice, zero = (statistics.median(seconds[column] for seconds in took) for took in (plain, replayed, look))
        share = f"{(twice / once - 1) / interval:.2%} of a run with one in {interval} steps" if interval else "no step is"
        print(f"{name}: a step takes {once:.4f} s, replayed {twice:.4f} s: {share}; looking for zeros {zero / once:.2%} of a step")


def steps(words: list[str]) -> tuple[Took, Took, Took]:
    """Of steps without a replay, of those with, and of the look at gradients before them."""
    config = load(words)
    phase = phase_at(config, 0)
    corpus = open_corpus(config.data, vocab_size=config.model.vocab_size, seed=config.train.seed, log=lambda line: None)
    part, count = PhaseRun(phase, corpus, torch.device("cpu")), config.sequences_per_step
    took: tuple[Took, Took, Took] = [], [], []
    now = lambda: np.array([time.perf_counter(), time.thread_time()])
    for step in range(config.train.steps):
        began = now()
        assert part.engine.clean()
        looked = now()
        samples, ahead = np.arange(step * count, (step + 1) * count), (1 % config.parallel.edp if step % 2 else None)
        part.apply(step, part.gradients(step, samples, ahead=ahead))
        if step >= 4:
            took[step % 2].append(tuple(now() - looked))
            took[2].append(tuple(looked - began))
    return took


if __name__ == "__main__":
    main()
