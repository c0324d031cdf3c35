"""TensorBoard: event files of the numbers that W&B gets, under the same names."""

from pathlib import Path

import yaml

from ...conf.schema import Config
from .sink import Sink
from .wandb_run import settings_of, wandb_values

FLUSH_S = 10


class TensorBoardSink(Sink):
    """Into `folder`. A session adds a file; steps that it takes again replace those of the one before."""

    hint = "launch.tensorboard=true needs the package tensorboard: pip install 'shoestring[tensorboard]'"

    def __init__(self, config: Config, folder: Path):
        self._config, self._folder, self._writer = config, folder, None

    def _write(self, record):
        if self._writer is None:
            from tensorboard.compat.proto.summary_pb2 import Summary  # a second of imports that runs without it need not pay
            from torch.utils.tensorboard import SummaryWriter

            self._summary = Summary
            first = not any(self._folder.glob("events.out.*"))
            self._writer = SummaryWriter(self._folder, purge_step=record.step, flush_secs=FLUSH_S)
            if first:
                settings = yaml.safe_dump(settings_of(self._config), sort_keys=False)
                self._writer.add_text("config", "\n".join(f"    {line}" for line in settings.splitlines()), 0)
        # All of a step as one event: a tenth of the time of one event each.
        values = [self._summary.Value(tag=name, simple_value=value) for name, value in wandb_values(record).items() if name != "step"]
        self._writer.file_writer.add_summary(self._summary(value=values), record.step, record.time_unix)

    def _close(self):
        if self._writer is not None:
            self._writer.close()
