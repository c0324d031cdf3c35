"""What a run has spent, and whether it may spend more: on the first rank, from the session's begin to its end; in `sessions.jsonl`.

`train/ledger.py` makes the account of what is written here and of the steps' records; `train/budget.py` has the limits.
"""

import dataclasses
import json
import time
from pathlib import Path

from ..conf.schema import Config
from . import cost, ledger, metrics, sessions
from .budget import Budget


class Books:
    """Of one session. `job`: a name that all sessions of one job share: between those, its devices were held."""

    def __init__(self, config: Config, run_dir: Path, job: str):
        self.run_dir, self.job = run_dir, job
        self.budget = Budget(config)
        self._began = self._told = time.monotonic()
        self._past = metrics.Rewound(session=0, seconds=0.0, dollars=0.0, kept=0, lost=0)
        self._config = config

    @property
    def session(self) -> int:
        return self._past.session

    @property
    def metrics_path(self) -> Path:
        return self.run_dir / "metrics.jsonl"

    def begin(self, config: Config, step: int) -> None:
        """The session goes on from `step`. What was recorded of later ones is lost; what the job waited for is the run's, too."""
        self._open(config, step, sessions.waited(self.run_dir, self.job, self._began, sessions.this_boot()))
        self.budget.step_took(self._past.step_seconds)

    def back(self, config: Config, step: int) -> None:
        """Likewise, of this session: it went back. What it did since its last record is the next one's begin."""
        self._began = self._told
        self._open(config, step, 0.0)

    def _open(self, config: Config, step: int, waited: float) -> None:
        self._config = config
        devices, second = cost.num_devices(config), cost.dollars(1.0, cost.num_devices(config), config.cluster)
        past = metrics.rewind(self.metrics_path, step)
        begun, ends = sessions.events(self.run_dir)
        # A session may have left no record, and it lasts longer than to its last one.
        spent = lambda name: max([getattr(past, name), *(getattr(end, name) for end in ends.values())])
        self._past = dataclasses.replace(
            past, session=max([past.session, *(earlier.session + 1 for earlier in begun)]), seconds=spent("seconds") + waited,
            dollars=spent("dollars") + waited * second, gpu_hours=spent("gpu_hours") + waited * devices / 3600,
        )  # fmt: skip
        began = sessions.Began(
            session=self.session, job=self.job, time_unix=time.time(), boot=sessions.this_boot(), monotonic=self._began,
            seconds=self._past.seconds, devices=devices, dollars=second, layout=metrics.layout_name(config.parallel),
        )  # fmt: skip
        sessions.note(self.run_dir, began)

    def so_far(self) -> dict[str, float]:
        """Fields of a record: seconds that the devices were held, restarts and lost work included; dollars and GPU-hours of them."""
        self._told = time.monotonic()
        held, devices = self._told - self._began, cost.num_devices(self._config)
        return {
            "seconds": self._past.seconds + held,
            "dollars": self._past.dollars + cost.dollars(held, devices, self._config.cluster),
            "gpu_hours": self._past.gpu_hours + held * devices / 3600,
        }

    def spent(self) -> str:
        """Which limit leaves no room for a step after the next; "" where there is room."""
        told, now = self._told, self.so_far()
        self._told = told
        return self.budget.spent(budget_usd=now["dollars"], budget_gpu_hours=now["gpu_hours"]) or ""

    def end(self, standing: float) -> None:
        """`standing`: seconds that the loop stood still for saves that no record has told of. Writes `ledger.json`."""
        ended = sessions.Ended(session=self.session, standing=standing, time_unix=time.time(), **self.so_far())
        sessions.note(self.run_dir, ended)
        metrics.replace_file(self.run_dir / "ledger.json", json.dumps(dataclasses.asdict(ledger.account(self.run_dir)), indent=1) + "\n")
