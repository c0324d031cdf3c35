"""The sinks that a configuration asks for, as one."""

from pathlib import Path

from ...conf.phases import num_steps
from ...conf.schema import Config
from ..alerts.channels import Channel, Command, Journal, Said, ToWandb, Webhook
from .alerting import AlertSink
from .beside import Beside
from .console import ConsoleSink
from .jsonl import JsonlSink
from .prometheus import PrometheusSink
from .sink import Sinks
from .tensorboard import TensorBoardSink
from .wandb_run import WandbSink


def open_sinks(config: Config, run_dir: Path, metrics_path: Path, *, webhook: str = "") -> Sinks:
    """Of the rank that tells; close them before a session goes back, and at its end. `webhook`: what `launch.alerts.webhook` stands for."""
    launch = config.launch
    console = ConsoleSink(num_steps(config), log_interval=launch.log_interval)
    wandb = WandbSink(config, run_dir, mode=launch.wandb, project=launch.wandb_project)
    prometheus = PrometheusSink(config, port=launch.prometheus_port, file=launch.prometheus_file)
    channels: list[Channel] = [Journal(run_dir), Said(console.say), ToWandb(wandb.alert)]
    if launch.alerts.webhook:
        channels.append(Webhook(launch.alerts.webhook.removeprefix("env:"), webhook))
    if launch.alerts.command:
        channels.append(Command(launch.alerts.command))
    others = [wandb, prometheus] + launch.tensorboard * [TensorBoardSink(config, run_dir / "tensorboard")]
    # Alerts close before the console and W&B: what they still have to say goes there.
    return Sinks([JsonlSink(metrics_path), AlertSink(config, run_dir, channels), console, Beside(others)])
