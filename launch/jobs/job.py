"""A job: on how many nodes a run starts, how many ranks each has, and the torchrun line that starts them there.

One torchrun a node. It is ours (`launch/elastic.py`): torchrun's flags, with restarts that work and exit codes that say something.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...conf.compose import load
from ...conf.errors import ConfigError
from ...conf.phases import phase_at
from ...conf.schema import Config
from ...train.resume import steps_done
from .. import elastic

_LAST_CALL_S = 30  # with fewer nodes than the most, this long further ones are waited for


@dataclass(frozen=True, kw_only=True)
class Job:
    """`words`: those of `shoestring train`. `min_nodes`: with how many the run goes on, where `launch.elastic` lets it."""

    config: Config
    words: tuple[str, ...]
    nodes: int
    min_nodes: int
    ranks_per_node: int
    gpus: bool

    @property
    def run_dir(self) -> Path:
        """On a file system that all nodes share, as are the working directory and the Python environment."""
        return Path(self.config.run_dir).resolve()

    @property
    def world_size(self) -> int:
        return self.nodes * self.ranks_per_node

    def __str__(self) -> str:
        return f"{self.world_size:,} rank{'s' * (self.world_size > 1)} on {self.nodes:,} node{'s' * (self.nodes > 1)}"

    @property
    def cores(self) -> int:
        """That the ranks of a node compute on, where it has no GPUs."""
        return self.ranks_per_node * (self.config.cluster.threads or self.config.launch.threads)

    @property
    def whole_nodes(self) -> bool:
        return self.ranks_per_node == self.config.cluster.gpus_per_node

    def torchrun(self, *, endpoint: str, name: str, python: str = sys.executable, words: Sequence[str] | None = None) -> list[str]:
        """The words to be run once on each node. `name`: of the job, the same on all; `words`: in place of the job's."""
        several = f"{self.min_nodes}:{self.nodes}" if self.min_nodes < self.nodes else str(self.nodes)
        return [
            python, "-m", "shoestring.launch.elastic",
            f"--nnodes={several}", f"--nproc-per-node={self.ranks_per_node}", f"--max-restarts={self.config.launch.max_restarts}",
            "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", f"--rdzv-id={name}",
            *([f"--rdzv-conf=last_call_timeout={_LAST_CALL_S}"] if self.min_nodes < self.nodes else []),
            "-m", "shoestring.train", *(self.words if words is None else words),
        ]  # fmt: skip


def plan_job(config: Config, words: Sequence[str]) -> Job:
    """For the phase that the run is in. Raises ConfigError where its ranks do not fill nodes."""
    world = phase_at(config, steps_done(config)).config.parallel.world_size
    per_node = config.cluster.gpus_per_node
    if world > per_node and world % per_node:
        rule = f"the layout has {world} ranks, which do not fill nodes of so many"
        raise ConfigError("cluster.gpus_per_node", per_node, rule, max(n for n in range(1, per_node) if world % n == 0))
    ranks = min(world, per_node)
    gpus = on_gpus(config)
    return Job(
        config=config,
        words=(*words, *(["launch.device=cuda"] if gpus and config.launch.device == "auto" else [])),  # not, in silence, on CPU
        nodes=world // ranks,
        min_nodes=_fewest(config, world // ranks, ranks) if config.launch.elastic else world // ranks,
        ranks_per_node=ranks,
        gpus=gpus,
    )


def load_words(words: Sequence[str]) -> Config:
    """The configuration of a job's words."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--config-dir")
    known, overrides = parser.parse_known_args(list(words))
    return load(overrides, known.config_dir)


def on_gpus(config: Config) -> bool:
    """On the nodes: this machine may have none."""
    return config.launch.device == "cuda" or (config.launch.device == "auto" and not config.cluster.device.startswith("CPU"))


def _fewest(config: Config, most: int, ranks: int) -> int:
    """Nodes that the layout could shrink to."""
    for nodes in range(1, most):
        try:
            elastic.fitting(config, nodes * ranks)
            return nodes
        except ConfigError:
            continue
    return most
