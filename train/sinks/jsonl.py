"""metrics.jsonl: the file that every reader of a run reads."""

import os
from pathlib import Path

from ...conf import files
from .. import metrics
from .sink import Sink


class JsonlSink(Sink):
    """One line per record, appended and handed to the system before `write` returns, so that a killed run loses none.

    On resume call `JsonlSink.rewind(path, step)` first: see `metrics.rewind`.
    """

    rewind = staticmethod(metrics.rewind)

    def __init__(self, path: str | Path):
        self.path, self._file = Path(path), None

    def _write(self, record):
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _mend_last_line(self.path)
            self._file = files.opened(self.path, "a", encoding="utf-8")
        self._file.write(metrics.to_line(record))
        self._file.flush()

    def _close(self):
        if self._file is not None:
            self._file.close()


def _mend_last_line(path: Path) -> None:
    """Cut a torn last line off, or the next record would be glued to it and lost too."""
    if not os.path.lexists(path):
        return
    with files.opened(path, "rb+") as file:
        file.seek(0, os.SEEK_END)
        end = file.tell()
        while end > 0:
            start = max(0, end - 65536)
            file.seek(start)
            newline = file.read(end - start).rfind(b"\n")
            if newline >= 0:
                end = start + newline + 1
                break
            end = start
        file.truncate(end)
