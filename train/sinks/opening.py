"""The sinks that a configuration asks for, as one."""

from pathlib import Path

from ...conf.phases import num_steps
from ...conf.schema import Config
from .console import ConsoleSink
from .jsonl import JsonlSink
from .prometheus import PrometheusSink
from .sink import Sinks
from .wandb_run import WandbSink


def open_sinks(config: Config, run_dir: Path, metrics_path: Path) -> Sinks:
    """Of the rank that tells; close them before a session goes back, and at its end."""
    console = ConsoleSink(num_steps(config), log_interval=config.launch.log_interval)
    wandb = WandbSink(config, run_dir, mode=config.launch.wandb, project=config.launch.wandb_project)
    prometheus = PrometheusSink(config, port=config.launch.prometheus_port, file=config.launch.prometheus_file)
    return Sinks([JsonlSink(metrics_path), console, wandb, prometheus])
