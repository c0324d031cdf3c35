"""What `guard.checksums` costs: `python tests/benchmarks/checksums.py [words as for shoestring train]` (`tiny`, a minute).

One run in which steps with and without take turns. Medians of a step, on the first rank: by the clock, and of what its own thread computes,
which other processes on the machine do not change.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from shoestring.conf.compose import load
from shoestring.conf.phases import phase_at
from shoestring.conf.rules import replaced
from shoestring.launch import environment
from shoestring.launch.local import fork_ranks
from shoestring.train.data.corpus import open_corpus
from shoestring.train.phase_run import PhaseRun

BLOCK = 3  # steps in turn; the first of each is the last one's successor, and does not count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", default=[])
    parser.add_argument("--steps", type=int, default=72)
    arguments = parser.parse_args()
    environment.prepare(threads=1)
    with tempfile.TemporaryDirectory() as folder:
        words = ["experiment=tiny", f"run_dir={Path(folder) / 'run'}", f"train.steps={arguments.steps}", *arguments.overrides]
        took = fork_ranks(load(words).parallel.world_size, steps, words, timeout_s=1800)[0]
    for column, name in enumerate(("by the clock", "of its own thread")):
        without, checked = (statistics.median(seconds[column] for seconds in took[on]) for on in (False, True))
        print(f"a step takes {without:.4f} s {name}, with checksums {checked:.4f} s: {checked / without - 1:+.2%}")


def steps(words: list[str]) -> dict[bool, list[tuple[float, float]]]:
    """(seconds by the clock, of the thread) of steps with and without."""
    config = load(words)
    phase = phase_at(config, 0)
    corpus = open_corpus(config.data, vocab_size=config.model.vocab_size, seed=config.train.seed, log=lambda line: None)
    part, count, took = PhaseRun(phase, corpus, torch.device("cpu")), config.sequences_per_step, {False: [], True: []}
    phases = {on: dataclasses.replace(phase, config=replaced(phase.config, "guard.checksums", on)) for on in took}
    for step in range(config.train.steps):
        on = bool(step // BLOCK % 2)
        part.phase = phases[on]
        began = time.perf_counter(), time.thread_time()
        part.apply(step, part.gradients(step, np.arange(step * count, (step + 1) * count)))
        if step % BLOCK and step >= 2 * BLOCK:
            took[on].append((time.perf_counter() - began[0], time.thread_time() - began[1]))
    return took


if __name__ == "__main__":
    main()
