"""Gradients that can be applied: of the next samples, or, where those cannot be trained on, of the ones after."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch.distributed as dist

from ..conf.schema import GuardConfig
from . import left_out
from .data.corpus import DataError
from .guard import Guard
from .left_out import Window, configured, take
from .phase_run import PhaseRun
from .resume import Progress
from .signals import Heard
from .step import Gradients


class Sound:
    """Alike on all ranks. `windows`: samples that are left out already. `alert` is told of each step that looks wrong."""

    def __init__(
        self, config: GuardConfig, windows: list[Window], run_dir: Path, log: Callable[[str], None], alert: Callable[[str], None]
    ):
        self.guard, self.windows, self.run_dir, self.log, self.alert = Guard(config), windows, run_dir, log, alert

    def gradients(
        self, part: PhaseRun, progress: Progress, count: int, signals: Callable[[], dict[str, float]]
    ) -> tuple[Gradients, Heard, np.ndarray]:
        """And what ranks said with them, and of which `count` samples they are. Raises GoBack, DataError and WrongGradients.

        `signals`: what this rank says, asked again for each try.
        """
        step, stream = progress.step, part.phase.stream
        while True:
            windows = [*self.windows, *configured(part.phase.config.data.skip, stream)]
            samples = take(windows, stream, progress.sample, count)
            found, heard, trouble = self._try(part, step, samples, signals)
            if trouble:
                part.engine.discard()
                found, heard, again = self._try(part, step, samples, signals)
                told = "computed again, it is the same" if again else "computed again, it is sound: a passing fault"
                self.log(sentence := f"step {step + 1}: {trouble}; {told}")
                self.alert(sentence)
                trouble = again
            if not trouble:
                return found, heard, samples
            part.engine.discard()
            damaged = part.unreadable(heard)
            blame = part.blame(step, samples) if damaged or not math.isfinite(found.grad_norm) else []
            for sentence in blame:
                self.log(f"  {sentence}")
            if damaged and self.guard.is_last_try:
                raise DataError(f"step {step + 1}, and {self.guard.in_a_row} before it: {'; '.join(blame)}")
            self.leave_out(stream, int(samples[0]), int(samples[-1]), trouble)
            self.guard.left_out(trouble)

    def _try(
        self, part: PhaseRun, step: int, samples: np.ndarray, signals: Callable[[], dict[str, float]]
    ) -> tuple[Gradients, Heard, str | None]:
        if part.engine.sentinel:
            part.engine.sentinel.wake(step)
        found, heard = part.agreed(step, samples, **signals())
        return found, heard, part.unreadable(heard) or self.guard.trouble(found.loss, found.grad_norm)

    def leave_out(self, stream: int, first: int, last: int, why: str) -> None:
        """For good: on disk before anything else happens."""
        self.windows.append(Window(stream=stream, first=first, last=last, why=why))
        if dist.get_rank() == 0:
            left_out.write(self.run_dir, self.windows)
        self.log(f"samples {first} to {last} are left out ({self.run_dir / left_out.NAME})")
