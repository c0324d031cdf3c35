"""Pipeline schedules as data: which rank holds which stage, and each rank's list of actions for one optimizer step.

The same lists feed the executor, the simulator and the Gantt chart. A schedule is one entry of `SCHEDULES`; to add one, write a function
in lists.py and the entry: `validate` proves the lists, and the executor runs them.
"""

from .ops import Action, Held, Op, Placements, direction_of
from .proof import validate
from .stages import parse_stages, split_layers
from .table import SCHEDULES, Schedule, check, proven, share_layers

__all__ = [
    "SCHEDULES", "Action", "Held", "Op", "Placements", "Schedule",
    "check", "direction_of", "parse_stages", "proven", "share_layers", "split_layers", "validate",
]  # fmt: skip
