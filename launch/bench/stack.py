"""What this software costs beside kernels and links, on a CPU: seconds of a layer and of a step that no kernel accounts for.

Models so small that their kernels take next to nothing are trained in one process; what a step takes beyond what is projected for it, by
depth, is the layers', and what is left is the step's. A CPU is its own host; of a GPU's host nothing can be learnt here.
"""

import dataclasses
import json
import statistics
import time
from pathlib import Path

import torch

from ...conf.compose import load
from ...conf.rules import replaced
from ...conf.schema import ClusterConfig, Config, StackConfig
from ...parallel.phases import MicroBatch
from ...train.engine import Engine
from ...train.metrics import replace_file
from ..local import fork_ranks
from ..simulate import project_step

DEPTHS = (2, 8)  # layers
STEPS = 12
MARK = "# Measured by `shoestring bench fabric`"
WORDS = (
    "model=micro", "model.num_dense_layers=0", "data=synthetic", "data.seq_len=16", "train.micro_batch_sequences=1",
    "train.global_batch_tokens=64", "optim.warmup_steps=1",
)  # fmt: skip


def measure(cluster: ClusterConfig) -> StackConfig:
    """Shoestring's own, with what is measured here: exchanges of gloo wait for peers on shared cores, and that is in the links' times."""
    usual = load(["stack=shoestring"]).stack
    quiet = dataclasses.replace(usual, host_us_per_layer=0.0, host_us_per_step=0.0)
    beyond = {}
    for depth in DEPTHS:
        config = replaced(replaced(load([*WORDS, f"model.num_layers={depth}"]), "cluster", cluster), "stack", quiet)
        (taken,) = fork_ranks(1, _step_seconds, config)
        beyond[depth] = taken - project_step(config, terms=False).ideal
    shallow, deep = DEPTHS
    passes = 2 * config.num_micro_batches
    layer = max(0.0, (beyond[deep] - beyond[shallow]) / (deep - shallow) / passes)
    step = max(0.0, beyond[shallow] - (shallow + 1) * passes * layer)  # embedding and head are two phases, as a layer is
    return dataclasses.replace(
        usual, name=cluster.name, peer_wait=0.0, host_us_per_layer=round(layer * 1e6, 1), host_us_per_step=round(step * 1e6, 1)
    )


def _step_seconds(config: Config) -> float:
    """Median of some, after the first."""
    torch.set_num_threads(1)
    engine = Engine(config)
    rows = torch.randint(config.model.vocab_size, (1, config.data.seq_len + 1), generator=torch.Generator().manual_seed(0))
    batches = [MicroBatch(tokens_BS=rows[:, :-1], targets_BN=rows[:, 1:])] * config.num_micro_batches
    taken = []
    for _ in range(STEPS):
        began = time.perf_counter()
        engine.train_step(batches, 1e-9)
        taken.append(time.perf_counter() - began)
    return statistics.median(taken[2:])


def write(path: Path, stack: StackConfig) -> Path:
    """`conf/stack/NAME.yaml`: what differs from Shoestring's own on a GPU is measured, terms are its."""
    of = lambda t: f"{{low: {t.low:g}, likely: {t.likely:g}, high: {t.high:g}, source: {json.dumps(t.source)}}}"
    terms = "".join(f"  {name}: {of(term)}\n" for name, term in stack.terms.items())
    text = f"""\
{MARK}: {DEPTHS[0]} and {DEPTHS[1]} layers of model=micro, one process.
name: {stack.name}
hidden: {stack.hidden:g}
peer_wait: {stack.peer_wait:g}
host_us_per_layer: {stack.host_us_per_layer:g}
host_us_per_step: {stack.host_us_per_step:g}
terms:
{terms}"""
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, text)
    return path
