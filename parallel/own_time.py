"""How long a rank was busy itself: a clock that stands still while its thread waits for other ranks, or for a core that others are on."""

import os
import time
import weakref


class OwnTime:
    """Call it: seconds, of the thread that made it. Entered, as a context, while that thread waits for others.

    `shared_cores`: ranks share this host's cores (a run on CPUs), and what a thread stands in line for one says nothing of its rank. The
    system keeps that in /proc; where it does not, it counts as busy.
    """

    def __init__(self, *, shared_cores: bool = True):
        self._queue, self._waited, self._entered = _open_queue() if shared_cores else None, 0.0, 0.0
        if self._queue is not None:
            weakref.finalize(self, os.close, self._queue)

    def __call__(self) -> float:
        return self._running() - self._waited

    def __enter__(self) -> None:
        self._entered = self._running()

    def __exit__(self, *raised: object) -> None:
        self._waited += self._running() - self._entered

    def _running(self) -> float:
        queued = int(os.pread(self._queue, 64, 0).split()[1]) / 1e9 if self._queue is not None else 0.0
        return time.monotonic() - queued


def _open_queue() -> int | None:
    """Of this thread: nanoseconds that it ran, those that it stood in line, and how often it ran."""
    try:
        return os.open("/proc/thread-self/schedstat", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
