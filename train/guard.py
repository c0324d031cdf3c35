"""What a run does about a step that looks wrong, before any weight has changed: alike on all ranks, since all see the same numbers.

loss or gradient norm not finite, or far above what they were     computed again
samples that read back other than they were written               computed again
... and sound then                                                a passing fault: that one is taken
... and as bad                                                    the samples are left out, and the next ones are taken
... of several steps in a row                                     back to the last checkpoint, without the samples since
memory changed between two steps                                  back to the last checkpoint
back too often without getting further                            the run ends: diverged
"""

import math
import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from ..conf.schema import GuardConfig

FEW = 16  # steps from which on there is something to compare with
TIMES = {"loss": 1.05, "gradient norm": 4.0}  # the median, at least: where all are nearly alike, small deviations mean nothing


class GoBack(Exception):
    """To the last checkpoint. `without_since`: the samples since are left out."""

    def __init__(self, why: str, *, without_since: bool):
        super().__init__(why)
        self.without_since = without_since


class Diverged(FloatingPointError):
    """Going back does not help."""


@dataclass
class Guard:
    """`losses`, `norms`: of the last steps that were taken."""

    config: GuardConfig
    losses: deque[float] = field(init=False)
    norms: deque[float] = field(init=False)
    in_a_row: int = 0  # steps whose samples were left out
    went_back: int = 0  # without getting further than this
    furthest: int = 0  # step

    def __post_init__(self):
        self.losses, self.norms = (deque(maxlen=self.config.window) for _ in range(2))

    def trouble(self, loss: float, norm: float) -> str | None:
        """What is wrong with a step of this loss and this gradient norm; None where nothing is."""
        if not (math.isfinite(loss) and math.isfinite(norm)):
            return f"loss {loss:g}, gradient norm {norm:g}"
        pairs = (("loss", loss, self.losses), ("gradient norm", norm, self.norms))
        for name, value, seen in pairs if self.config.spike else ():
            if value > self._limit(seen, TIMES[name]):
                return f"{name} {value:.4g}; of the last {len(seen)} the median is {statistics.median(seen):.4g}, the most {max(seen):.4g}"
        return None

    def _limit(self, seen: Sequence[float], times: float) -> float:
        """In logarithms, in which gradient norms scatter evenly: so many deviations above the median."""
        if len(seen) < FEW:
            return math.inf
        logs = [math.log(max(value, 1e-30)) for value in seen]
        median = statistics.median(logs)
        deviation = 1.4826 * statistics.median(abs(value - median) for value in logs)
        return max(math.exp(median + self.config.spike * deviation), times * math.exp(median), max(seen))

    def taken(self, loss: float, norm: float) -> None:
        self.losses.append(loss)
        self.norms.append(norm)
        self.in_a_row = 0

    @property
    def is_last_try(self) -> bool:
        """Whether one more step that cannot be trained on would be too many."""
        return self.in_a_row + 1 >= self.config.patience

    def left_out(self, why: str) -> None:
        """Raises GoBack where too many steps in a row were."""
        self.in_a_row += 1
        if self.in_a_row >= self.config.patience:
            self.in_a_row = 0
            raise GoBack(f"{self.config.patience} steps in a row could not be trained on, the last with {why}", without_since=True)

    def going_back(self, why: str, step: int) -> None:
        """From step `step`. Raises Diverged where it has been done too often without getting further."""
        self.went_back = 1 if step > self.furthest else self.went_back + 1
        self.furthest = max(step, self.furthest)
        if self.went_back > self.config.rollbacks:
            times = f"{self.config.rollbacks} times and came no further" if self.config.rollbacks else "no time: guard.rollbacks is 0"
            raise Diverged(f"step {step + 1}: {why}; the run went back to its last checkpoint {times}")

    def begin(self) -> None:
        """Nothing has been seen."""
        self.losses.clear()
        self.norms.clear()
        self.in_a_row = 0

    # ------------------------------------------------------------ in a checkpoint

    def state(self) -> dict:
        return {"guard": {"losses": list(self.losses), "norms": list(self.norms)}}

    def load_state(self, extra: dict) -> None:
        self.begin()
        kept = extra.get("guard", {})
        self.losses.extend(kept.get("losses", ()))
        self.norms.extend(kept.get("norms", ()))
