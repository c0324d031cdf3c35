"""What every place for step records has in common: none can stop a run; one that fails says so, once, and goes quiet."""

import contextlib
import sys
from collections.abc import Iterable

from ..metrics import StepRecord


class Sink:
    """Takes each step's record. Subclasses implement `_write` and, where they hold something, `_close`; both may raise."""

    hint = ""  # what a person can do when this one fails
    _stopped = _closed = False

    def write(self, record: StepRecord) -> None:
        self._guard(self._write, record)

    def trouble(self, kind: str, text: str) -> None:
        """Told of what no record tells: a step that was not taken, the end of a run that failed."""
        self._guard(self._trouble, kind, text)

    def close(self) -> None:
        """Flush and release. A sink that has failed is released in silence; a second call does nothing."""
        if self._closed:
            return
        if self._stopped:
            with contextlib.suppress(Exception):
                self._close()
        self._guard(self._close)
        self._stopped = self._closed = True

    def _guard(self, action, *args) -> None:
        if self._stopped:
            return
        try:
            action(*args)
        except Exception as error:
            self._stopped = True
            name, what = type(self).__name__, f"{type(error).__name__}: {error}".rstrip(".")
            print(f"{name} stopped: {what}. Training goes on without it. {self.hint}".rstrip(), file=sys.stderr, flush=True)

    def _write(self, record: StepRecord) -> None:
        raise NotImplementedError

    def _trouble(self, kind: str, text: str) -> None:
        pass

    def _close(self) -> None:
        pass


class Sinks(Sink):
    """Several sinks as one."""

    def __init__(self, sinks: Iterable[Sink]):
        self.sinks = list(sinks)

    def _write(self, record):
        for sink in self.sinks:
            sink.write(record)

    def _trouble(self, kind, text):
        for sink in self.sinks:
            sink.trouble(kind, text)

    def _close(self):
        for sink in self.sinks:
            sink.close()
