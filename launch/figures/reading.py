"""Follows a run's metrics.jsonl: at once as samples of the whole file, then record by record, and on with what is appended.

A file of a million steps takes most of a minute to read; samples take a tenth of a second. A file that was replaced (a restart takes back
the steps that it does again) is read anew.
"""

import math
import os
import threading
import time
from pathlib import Path

from .history import History, parse

CHUNK = 1 << 20  # bytes that are read at a time
SAMPLED_FROM = 8 << 20  # bytes of a file from which on it is sampled first
SAMPLES = 600
LONGEST = 64 << 20  # bytes of a line, of which more is not waited for
LEAST_TAIL, TAIL = 512 << 10, 4 << 20  # bytes in which the last records are looked for
SCANNED = 16 << 20  # bytes in which a step's record is looked for


class Follower:
    """Of one file, which need not be there yet. Any thread may ask; `read_on` is called by one. `share`: of the samples of a long file."""

    def __init__(self, path: Path, share: float = 1.0):
        self.path, self._share = path, share
        self._lock = threading.RLock()
        self._identity: tuple | None = None
        self._forget()

    def _forget(self) -> None:
        self._read = History()  # what has been read in order
        self._samples: History | None = None  # shown until that is all
        self._offset = self._size = 0
        self._skipping = self._whole = False
        self._lines = self.num_bad = 0
        self.first_bad = 0  # number of the first line that is no record
        self._loaded: int | None = None  # where the last record with expert loads is

    # ------------------------------------------------------------ asked by pages

    @property
    def history(self) -> History:
        return self._samples or self._read

    @property
    def lock(self) -> threading.RLock:
        """Held while `history` is asked."""
        return self._lock

    @property
    def progress(self) -> float:
        """Share of the file that has been read in order; 1 once its end was come to, whatever is appended after."""
        return 1.0 if self._whole or not self._size else min(0.999, self._offset / self._size)

    @property
    def version(self) -> tuple:
        """Another one after every change."""
        return (self._identity, self._offset, self.num_bad, self._whole)

    def expert_load(self, step: int | None = None) -> tuple[float, list] | None:
        """Of that step, or of the last one before it in the same stretch; of no step: of the last that has any. With its number."""
        with self._lock:
            last = self._loaded if step is None else None
            step = math.inf if step is None else step
            place, found = self.history.place_before(step) if last is None else last, None
        if self._identity is None:
            return None
        try:
            with open(self.path, "rb") as file:
                file.seek(place)
                while file.tell() < place + SCANNED and (line := file.readline(LONGEST)):
                    record = parse(line)
                    if record is None:
                        continue
                    if record["step"] > step:
                        break
                    if record.get("expert_load"):
                        found = (record["step"], record["expert_load"])
        except OSError:
            return None
        return found

    # ------------------------------------------------------------ reading

    def read_on(self, seconds: float = 0.2) -> bool:
        """Read for about so long; whether there is more to read at once."""
        try:
            if not self.path.is_file():  # a pipe would not end
                raise FileNotFoundError(self.path)
            with open(self.path, "rb") as file:
                stat = os.fstat(file.fileno())
                identity = (stat.st_dev, stat.st_ino)
                if identity != self._identity or stat.st_size < self._offset:
                    with self._lock:
                        self._forget()
                        self._identity, self._size = identity, stat.st_size
                    if stat.st_size > SAMPLED_FROM:
                        self._sample(file, stat.st_size)
                self._size = stat.st_size
                if self._offset == 0 and self._samples is not None and not seconds:
                    return True  # something is there to be shown
                until = time.monotonic() + seconds
                while self._take_chunk(file):
                    if time.monotonic() > until:
                        return True
        except OSError:
            with self._lock:
                if self._identity is not None:
                    self._identity = None
                    self._forget()
            return False
        if not self._whole:
            with self._lock:
                self._samples, self._whole = None, True
        return False

    def read_all(self) -> None:
        while self.read_on(3600.0):
            pass

    def _take_chunk(self, file) -> bool:
        """Whole lines of the next chunk; False at the end of what is whole."""
        file.seek(self._offset)
        block = file.read(CHUNK)
        end = block.rfind(b"\n") + 1
        while not end and len(block) < LONGEST and (more := file.read(CHUNK)):
            block += more
            end = block.rfind(b"\n") + 1
        if not end:
            if len(block) >= LONGEST:  # no line is so long: what comes up to the next newline is none
                self._pass_over(len(block))
                return True
            return False
        with self._lock:
            place = self._offset
            for line in _lines(block[:end]):
                self._take_line(line, place)
                place += len(line)
            self._offset = place
        return True

    def _pass_over(self, length: int) -> None:
        with self._lock:
            self._offset += length
            self._skipping = True

    def _take_line(self, line: bytes, place: int) -> None:
        self._lines += 1
        if self._skipping:  # the rest of one that was too long
            self._skipping = False
            record = None
        elif not line.strip():
            return
        else:
            short = without_loads(line)
            record = parse(short)
            if record is not None and len(short) < len(line):
                self._loaded = max(place, self._loaded or 0)
        if record is None:
            self.num_bad += 1
            self.first_bad = self.first_bad or self._lines
            return
        self.on_record(record)
        self._read.take(record, place)

    def on_record(self, record: dict) -> None:
        """For those who want each record once, in order."""

    def _sample(self, file, size: int) -> None:
        """Lines at even distances, and all of the last ones."""
        samples = History()
        count, tail = max(1, round(self._share * SAMPLES)), max(LEAST_TAIL, round(self._share * TAIL))
        places = [size * i // count for i in range(count)]
        seen = -1
        for place in places:
            file.seek(place)
            if place:
                place += len(file.readline(LONGEST))
            if place <= seen:
                continue
            line = file.readline(LONGEST)
            if line.endswith(b"\n") and (record := parse(without_loads(line))):
                samples.take(record, place)
                seen = place
        file.seek(place := max(seen, size - tail, 0))
        if place:
            place += len(file.readline(LONGEST))
        for line in _lines(file.read(tail)):
            if line.endswith(b"\n") and (record := parse(without_loads(line))):
                samples.take(record, place)
                self._loaded = place if b'"expert_load":[[' in line else self._loaded
            place += len(line)
        with self._lock:
            self._samples = samples if samples.count else None


def _lines(block: bytes) -> list[bytes]:
    lines = block.split(b"\n")
    return [line + b"\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])


def without_loads(line: bytes) -> bytes:
    """A record's line without its expert loads, which are most of a large model's: they are read again where they are shown."""
    start = line.find(b'"expert_load":[[')
    end = line.find(b"]]", start) + 2 if start >= 0 else 1
    if end < 2:
        return line
    if line[end : end + 1] == b",":
        return line[:start] + line[end + 1 :]
    return line[: start - 1] + line[end:] if line[start - 1 : start] == b"," else line
