"""Sinks that training does not wait for: a thread of their own writes what it is given, in order."""

import queue
import threading
from collections.abc import Iterable

from .sink import Sink, Sinks

MOST = 4096  # records that may wait
CLOSE_S = 60.0  # that the end of a session waits for what is left


class Beside(Sink):
    """Where they do not keep up for thousands of records, this session does without them; `metrics.jsonl` has all."""

    hint = "The run directory has all records."

    def __init__(self, sinks: Iterable[Sink]):
        self._sinks = Sinks(sinks)
        self._waiting: queue.Queue = queue.Queue(MOST)
        self._thread = threading.Thread(target=self._write_on, name="sinks", daemon=True)
        self._thread.start()

    def _write_on(self) -> None:
        while (record := self._waiting.get()) is not None:
            self._sinks.write(record)
        self._sinks.close()

    def _write(self, record):
        try:
            self._waiting.put_nowait(record)
        except queue.Full:
            raise TimeoutError(f"{MOST} records wait to be written") from None

    def _close(self):
        try:
            self._waiting.put(None, timeout=CLOSE_S)
        except queue.Full:
            raise TimeoutError(f"no record was written for {CLOSE_S:g} s") from None
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            raise TimeoutError(f"{self._waiting.qsize()} records are not written after {CLOSE_S:g} s")
