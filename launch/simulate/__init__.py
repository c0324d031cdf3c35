"""What a step and a run would take on a cluster that need not be at hand: projected, from the lists that the executor runs, from what each
kernel computes and moves, and from what a device and its links reach (conf/cluster/*.yaml)."""

from .recorded import Recorded
from .run import RunEstimate, in_all, project_run
from .step import Interval, StepEstimate, project_step

__all__ = ["Interval", "Recorded", "RunEstimate", "StepEstimate", "in_all", "project_run", "project_step"]
