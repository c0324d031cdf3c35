"""Which rank the others wait for, and in what: each rank tells how long it was busy itself, and the first rank compares.

    data       reading a step's samples                        with all ranks
    compute    forward and backward                            with the ranks of the same pipeline stage
    update     the optimizer's, of the step before             likewise

A clock of each rank's own stands still while it waits (`OwnTime`), so nobody's clock is compared with another's. Of ranks that have nobody
in their stage beside them, what they take beside the other stages is learned from the first steps. On GPUs the host only hands compute on:
there data alone is compared in each step, and what devices compute in traced ones (`launch.trace_interval`), in a stage of several ranks.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from ..conf.schema import ParallelConfig
from ..parallel.own_time import OwnTime
from ..parallel.trace import PIPELINE, Span
from .step import Beat, silent

TITLES = {"busy_data": "data", "busy_compute": "forward and backward", "busy_update": "update"}  # by signal
OFTEN, LAST = 8, 10  # in so many of the last steps
LEAST_S = 0.05  # that a rank is late by in a step
TIMES, SUDDENLY_S = 5.0, 2.0  # the median step, and more than it by so much: one such step is told
SOME, FEW = 4, 16  # steps from which on there is something to compare a single one with; a rank with those of other stages
WINDOW = 64


class Busy:
    """This rank's beat, which also keeps how long it was busy in each phase of the step."""

    def __init__(self, beat: Beat = silent, *, on_gpu: bool = False):
        self.own, self._beat, self._on_gpu = OwnTime(shared_cores=not on_gpu), beat, on_gpu
        self._phase, self._began, self._own_began = "", time.monotonic(), self.own()
        self._own, self._all = dict.fromkeys(TITLES.values(), 0.0), {"": 0.0}
        self._step = self._told = 0
        self.turned: Callable[[str], None] = silent  # told of each phase that begins, "": of none

    def __call__(self, phase: str, step: int | None = None) -> None:
        self._step = self._step if step is None else step
        if phase:
            self._turn(phase)
        self._beat(phase, step)

    def rest(self) -> None:
        """What follows belongs to no phase."""
        self._turn("")

    def take(self) -> tuple[dict[str, float], float]:
        """Seconds since the last call: busy ones, as signals; and all of the step's, or 0 where something else came between: an
        evaluation, a save, the step a second time."""
        self._turn(self._phase)
        busy, seconds = self._own, self._all
        elsewhere, step = seconds.pop(""), sum(seconds.values())
        whole = step if elsewhere < max(LEAST_S, 0.1 * step) and self._step == self._told + 1 else 0.0
        self._told, self._own, self._all = self._step, dict.fromkeys(busy, 0.0), {"": 0.0}
        told = {name: busy[title] for name, title in TITLES.items() if title == "data" or not self._on_gpu}
        return told, whole

    def _turn(self, phase: str) -> None:
        now, own = time.monotonic(), self.own()
        name = self._phase if self._phase in (*self._own, "reduce") else ""
        self._all[name] = self._all.get(name, 0.0) + now - self._began
        if self._phase in self._own:
            self._own[self._phase] += max(0.0, own - self._own_began)
        self._phase, self._began, self._own_began = phase, now, own
        self.turned(phase)


class Stragglers:
    """Of one layout, on the rank that tells. `share`: of a step, that a rank takes longer than its peers, step after step; 0: all is
    well."""

    def __init__(self, parallel: ParallelConfig, share: float):
        self.share, self._stage = share, np.arange(parallel.world_size) // parallel.dp
        self._alone = parallel.dp == 1
        self._busy: deque[np.ndarray] = deque(maxlen=WINDOW)  # (phases, ranks), seconds
        self._before: np.ndarray | None = None  # what was told last, of whatever step
        self._expected: deque[np.ndarray] = deque(maxlen=LAST)
        self._late: deque[np.ndarray] = deque(maxlen=LAST)
        self._seconds: deque[float] = deque(maxlen=WINDOW)
        self._usual: np.ndarray | None = None  # (phases, ranks): of what the others take
        self._late_in_trace = np.zeros(parallel.world_size, dtype=bool)
        self._silent: dict[tuple[int, int], tuple[int, int]] = {}  # (phase, rank): until which step, and for how many after that

    def hear(self, step: int, each: dict[str, list[float]], seconds: float) -> list[str]:
        """Sentences about a step: what its ranks have told (`Heard.each`), and how long it took; 0: not to be looked at."""
        busy, before = np.array([each[name] for name in TITLES]), self._before
        self._before = busy
        if not self.share or not seconds:
            return []
        told = self._sudden(step, busy, before, seconds)
        self._busy.append(busy)
        self._seconds.append(seconds)
        return [*told, *self._lasting(step, busy, seconds)]

    def look(self, step: int, spans: Sequence[Span]) -> list[str]:
        """Likewise about a traced step: of devices that were late in the one before, too."""
        computed = np.zeros((1, len(self._stage)))
        for span in spans:
            computed[0, span.rank] += (span.end - span.start) * (span.what == "compute")
        pipeline = [s for s in spans if s.what in PIPELINE]
        seconds = max(s.end for s in pipeline) - min(s.start for s in pipeline)
        peers = self._by_stage(computed)[0]
        late = computed[0] - peers > max(self.share * seconds, LEAST_S)
        again, self._late_in_trace = late & self._late_in_trace & bool(self.share), late
        return [
            f"rank {rank} is slow: in traced step {step} it computes for {computed[0, rank]:.3g} s, its peers for {peers[rank]:.3g} s: "
            f"{100 * (computed[0, rank] - peers[rank]) / seconds:.0f} % of the step is spent waiting for it"
            for rank in np.flatnonzero(again)[:3]
        ]

    # ------------------------------------------------------------ once

    def _sudden(self, step: int, busy: np.ndarray, before: np.ndarray | None, seconds: float) -> list[str]:
        """Of a step, or of the one before: the rank that compares waits for the end of that after it has told how long it was busy."""
        if len(self._seconds) < SOME or seconds <= max(TIMES * (median := statistics.median(self._seconds)), median + SUDDENLY_S):
            return []
        took = f"took {seconds:.2g} s (median {median:.2g} s)"
        for number, told in ((step, busy), (step - 1, before)):
            more = np.zeros_like(busy) if told is None else told - np.median(self._busy, axis=0)
            phase = int(more.max(axis=1).argmax())
            if len(found := np.flatnonzero(more[phase] >= (seconds - median) / 2)):
                were = "was" if len(found) == 1 else "were"
                return [f"step {number} {took}: {_ranks(found)} {were} busy for {told[phase, found].max():.2g} s in {_title(phase)}"]
        return [f"step {step} {took}: no rank was busy: the network, or another job on these machines"]

    # ------------------------------------------------------------ step after step

    def _lasting(self, step: int, busy: np.ndarray, seconds: float) -> list[str]:
        expected = self._by_peers(busy)
        if expected is None:
            return []
        self._expected.append(expected)
        self._late.append(busy - expected > max(self.share * seconds, LEAST_S))
        often = np.sum(self._late, axis=0) >= OFTEN
        return [sentence for phase in range(len(busy)) if often[phase].any() for sentence in self._tell(step, phase, often[phase])]

    def _tell(self, step: int, phase: int, often: np.ndarray) -> list[str]:
        """Of a phase: of the latest rank, and how many others there are. Again after twice as long."""
        count = len(self._late)
        takes = np.median(list(self._busy)[-count:], axis=0)[phase]
        peers = np.median(self._expected, axis=0)[phase]
        rank = int(np.where(often, takes - peers, -np.inf).argmax())
        until, length = self._silent.get((phase, rank), (0, LAST))
        if step < until:
            return []
        self._silent[phase, rank] = step + length, 2 * length
        share = (takes[rank] - peers[rank]) / statistics.median(list(self._seconds)[-count:])
        others = f" (and {often.sum() - 1} more ranks)" if often.sum() > 1 else ""
        which = "beside the others it was" if self._alone and phase else "its peers"
        return [
            f"rank {rank}{others} is slow: {_title(phase)} takes it {takes[rank]:.3g} s of each step, "
            f"{which} {peers[rank]:.3g} s (the last {count} steps to {step}): "
            f"{100 * share:.0f} % of the step is spent waiting for it"
        ]

    def _by_peers(self, busy: np.ndarray) -> np.ndarray | None:
        """What each rank would take if it were as its peers are; None as long as that is not known."""
        expected = _others(busy)
        if not self._alone:
            expected[1:] = self._by_stage(busy[1:])
        elif len(self._stage) > 1:
            if len(self._busy) < FEW:
                return None
            if self._usual is None:
                usual = [b / np.maximum(_others(b), 1e-9) for b in self._busy]
                self._usual = np.median(usual, axis=0)
            expected[1:] *= self._usual[1:]
        return expected

    def _by_stage(self, values: np.ndarray) -> np.ndarray:
        expected = np.empty_like(values)
        for stage in np.unique(self._stage):
            expected[:, self._stage == stage] = _others(values[:, self._stage == stage])
        return expected


def _others(values: np.ndarray) -> np.ndarray:
    """Of (phases, ranks): of all ranks but each one, the median; of one rank alone, its own value."""
    count = values.shape[1]
    if count == 1:
        return values.copy()
    order = np.sort(values, axis=1)
    place = values.argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    without = lambda i: np.take_along_axis(order, i + (place <= i), axis=1)  # element i of those that are left
    return (without((count - 2) // 2) + without((count - 1) // 2)) / 2


def _title(phase: int) -> str:
    return list(TITLES.values())[phase]


def _ranks(found: np.ndarray) -> str:
    names = [str(rank) for rank in found]
    if len(names) > 8:
        return f"rank {', '.join(names[:8])} and {len(names) - 8} more"
    return f"rank {', '.join(names)}"
