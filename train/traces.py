"""Every `launch.trace_interval` steps, what each rank did and when: a file under the run's `traces/`, and figures for the step's record."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..parallel import world
from ..parallel.executor import Executor
from ..parallel.trace import Recorder, Tracer, write_trace
from ..parallel.trace_divide import divide
from ..parallel.trace_measure import measure
from .step import silent
from .stragglers import Busy, Stragglers


class Traces:
    """Collective to build and to use. `interval`: in steps; 0: nothing is ever traced, and nothing is made for it. `log` is told of slow
    GPUs. `beat`: this rank's, which a traced step's sections are learned from."""

    def __init__(self, folder: Path, interval: int, device: torch.device, beat: Busy, log: Callable[[str], None]):
        self.folder, self.interval, self.device, self.beat, self.log = folder, interval, device, beat, log
        self.recorder = Recorder(dist.get_rank(), device) if interval else None
        self.group = world.on_hosts("traces") if interval else None  # GPUs' own would carry spans over the link that is measured

    def due(self, step: int) -> bool:
        return bool(self.interval) and step % self.interval == 0

    def begin(self, step: int, executor: Executor) -> None:
        """Before step number `step` (1 is the first) of the run: record it if it is due."""
        if self.due(step):
            executor.tracer = self.recorder
            self.recorder.begin(self.group)
            self.beat.turned = self.recorder.section

    def finish(self, step: int, executor: Executor, stragglers: Stragglers, seconds: float) -> dict[str, Any]:
        """After it, and the `seconds` that it took: writes the file. The fields of its `StepRecord`, on rank 0; empty elsewhere, and where
        the step was not due."""
        if not self.due(step):
            return {}
        executor.tracer, self.beat.turned = Tracer(), silent
        spans = self.recorder.finish(self.group)
        if spans is None:
            return {}
        for sentence in stragglers.look(step, spans) if self.device.type == "cuda" else ():
            self.log(sentence)
        p = executor.mesh.parallel
        fields = {**dataclasses.asdict(measure(spans)), "breakdown": divide(spans, dp=p.dp, ep=p.ep, seconds=seconds)}
        write_trace(self.folder / f"step_{step}.json", spans, step=step, **fields)
        del fields["seconds"]  # of the pipeline alone: the record has the whole step's
        return fields
