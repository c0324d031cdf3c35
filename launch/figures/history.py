"""A run's records as curves that can be drawn, in memory that does not grow with their number.

Records lie in buckets of equally many. Of each field a bucket keeps the least value and the greatest, and which records had them, so that
no peak is lost; when the buckets are all full, two become one. With fewer records than buckets, each is there as it was.
"""

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...conf.outside import parse_json

AXES = ("step", "tokens", "seconds", "dollars")
BUCKETS = 2048
MAX_FIELDS = 256  # of all fields, items of lists and dictionaries counted: a hostile file has more
MAX_ITEMS = 96  # of a list or dictionary
RECENT = 64
LARGEST = 1e40  # more than any FP32
_LISTS = ("max_vio", "rank_overload", "mtp_loss")
_WORST = ("max_vio", "rank_overload")  # of whose items the largest is a field of its own
_SKIPPED = (*AXES, "session", "samples", "time_unix", "eta_seconds", "gpu_hours", "expert_load", "fp8_left_out", "nonfinite")


@dataclass(frozen=True, kw_only=True)
class Curve:
    """A field's values in the order of their records, and where they were: arrays of one length, float64."""

    values: np.ndarray
    at: Mapping[str, np.ndarray]  # by `AXES`

    def __len__(self) -> int:
        return len(self.values)


class History:
    """Of one metrics.jsonl. `take` is given its records as they lie in the file; everything else may be asked at any time."""

    def __init__(self, buckets: int = BUCKETS):
        self._buckets, self._width = buckets, 1
        self._fields: dict[str, int] = {}
        self._low = self._high = np.empty((0, 0))  # (buckets, fields)
        self._at_low = self._at_high = np.empty((0, 0), dtype=np.int64)
        self._ends = np.empty((0, 2, len(AXES) + 1))  # first and last record of each bucket: axes, and its place in the file
        self._open: list[tuple[tuple[float, ...], dict[str, float]]] = []
        self.count = 0
        self.first: dict[str, Any] | None = None
        self.last: dict[str, Any] | None = None
        self.recent: deque[dict[str, Any]] = deque(maxlen=RECENT)

    def take(self, record: Mapping[str, Any], place: int = 0) -> None:
        """`record`: the object of a line, checked by `reading.parse`. `place`: where the line begins in the file."""
        record = dict(record)
        self.first = self.first or record
        self.last = record
        self.recent.append(record)
        self.count += 1
        self._open.append(((*(_number(record.get(axis)) for axis in AXES), float(place)), numbers(record)))
        if len(self._open) >= max(self._width, 256):
            self._close_full()

    @property
    def fields(self) -> list[str]:
        """Names of all that has been seen, such as loss, max_vio[3] or eval_loss_by_source[web]."""
        self._close_full()
        return [*self._fields, *sorted({name for _, values in self._open for name in values} - self._fields.keys())]

    def curve(self, field: str, *, gaps: bool = False) -> Curve:
        """Of what was never recorded: an empty one. `gaps`: what most records have is NaN, once, where some in a row have none."""
        self._close_full()
        low, high, at_low, at_high, ends = self._with_open(field)
        lengths = np.full(len(low), self._width)
        if self._open:
            lengths[-1] = len(self._open)
        known = ~np.isnan(low)
        if gaps and 2 * known.sum() > len(known):
            first_unknown = ~known & np.append(True, known[:-1])
            at_low, at_high = (np.where(known, at, np.arange(len(at)) * self._width) for at in (at_low, at_high))
            known |= first_unknown
        low, high, at_low, at_high, ends, lengths = (array[known] for array in (low, high, at_low, at_high, ends, lengths))
        first_is_low = at_low <= at_high
        values = np.stack([np.where(first_is_low, low, high), np.where(first_is_low, high, low)], axis=1)
        where = np.stack([np.minimum(at_low, at_high), np.maximum(at_low, at_high)], axis=1)
        keep = np.stack([np.ones(len(low), dtype=bool), at_low != at_high], axis=1)
        start = np.flatnonzero(known) * self._width
        share = (where - start[:, None]) / np.maximum(1, lengths - 1)[:, None]
        at = {axis: (ends[:, :1, i] + share * (ends[:, 1:, i] - ends[:, :1, i]))[keep] for i, axis in enumerate(AXES)}
        at["step"] = np.round(at["step"])
        return Curve(values=values[keep], at=at)

    def place_before(self, step: float) -> int:
        """Where in the file to begin to look for a step's record."""
        self._close_full()
        starts = self._ends[:, 0, 0]
        found = int(np.searchsorted(starts, step, side="right")) - 1
        return int(self._ends[found, 0, -1]) if 0 <= found < len(starts) else 0

    # ------------------------------------------------------------ buckets

    def _close_full(self) -> None:
        while len(self._open) >= self._width:
            take = min(len(self._open) // self._width, self._buckets - len(self._low)) * self._width
            if not take:
                self._halve()
                continue
            rows, self._open = self._open[:take], self._open[take:]
            for name in {name for _, values in rows for name in values}:
                if name not in self._fields and len(self._fields) < MAX_FIELDS:
                    self._fields[name] = len(self._fields)
            begun = len(self._low) * self._width
            self._append(*_reduce(self._matrix(rows), self._width, begun), _ends(rows, self._width))

    def _matrix(self, rows: Sequence[tuple]) -> np.ndarray:
        values = np.full((len(rows), len(self._fields)), np.nan)
        for i, (_, row) in enumerate(rows):
            for name, value in row.items():
                if (j := self._fields.get(name)) is not None:
                    values[i, j] = value
        return values

    def _append(self, low, high, at_low, at_high, ends) -> None:
        grown = [_widened(array, len(self._fields)) for array in (self._low, self._high, self._at_low, self._at_high)]
        self._low, self._high, self._at_low, self._at_high = (np.concatenate(pair) for pair in zip(grown, (low, high, at_low, at_high)))
        self._ends = np.concatenate([self._ends, ends])

    def _halve(self) -> None:
        """Two buckets become one."""
        self._width *= 2
        n = len(self._low) // 2
        low, high = self._low.reshape(n, 2, -1), self._high.reshape(n, 2, -1)
        pick_low = np.where(np.isnan(low[:, 0]) | (low[:, 1] < low[:, 0]), 1, 0)[:, None]
        pick_high = np.where(np.isnan(high[:, 0]) | (high[:, 1] > high[:, 0]), 1, 0)[:, None]
        chosen = lambda array, pick: np.take_along_axis(array.reshape(n, 2, -1), pick, axis=1)[:, 0]
        self._at_low, self._at_high = chosen(self._at_low, pick_low), chosen(self._at_high, pick_high)
        self._low, self._high = chosen(low, pick_low), chosen(high, pick_high)
        ends = self._ends.reshape(n, 2, 2, -1)
        self._ends = np.stack([ends[:, 0, 0], ends[:, 1, 1]], axis=1)

    def _with_open(self, field: str):
        """A field's buckets, the unfinished one among them."""
        j = self._fields.get(field)
        n = len(self._low)
        nothing, nowhere = np.full(n, np.nan), np.zeros(n, dtype=np.int64)
        column = lambda array, empty: array[:, j] if j is not None and j < array.shape[1] else empty
        parts = [column(self._low, nothing), column(self._high, nothing), column(self._at_low, nowhere), column(self._at_high, nowhere)]
        if not self._open:
            return *parts, self._ends
        values = np.array([[values.get(field, math.nan)] for _, values in self._open])
        reduced = _reduce(values, len(values), n * self._width)
        ends = np.concatenate([self._ends, _ends(self._open, len(self._open))])
        return *(np.concatenate([part, new[:, 0]]) for part, new in zip(parts, reduced)), ends


def _reduce(values: np.ndarray, width: int, begun: int) -> list[np.ndarray]:
    """Of (records, fields): least, greatest, and the numbers of the records that had them, each (buckets, fields)."""
    block = values.reshape(-1, width, values.shape[1])
    n, _, fields = block.shape
    starts = begun + width * np.arange(n)[:, None]
    if not fields:
        empty = np.empty((n, 0))
        return [empty, empty, empty.astype(np.int64), empty.astype(np.int64)]
    unknown = np.isnan(block)
    at_low = np.where(unknown, np.inf, block).argmin(axis=1)
    at_high = np.where(unknown, -np.inf, block).argmax(axis=1)
    none = unknown.all(axis=1)
    pick = lambda at: np.where(none, np.nan, np.take_along_axis(block, at[:, None], axis=1)[:, 0])
    return [pick(at_low), pick(at_high), at_low + starts, at_high + starts]


def _ends(rows: Sequence[tuple], width: int) -> np.ndarray:
    axes = np.array([axes for axes, _ in rows]).reshape(-1, width, len(AXES) + 1)
    return np.stack([axes[:, 0], axes[:, -1]], axis=1)


def _widened(array: np.ndarray, fields: int) -> np.ndarray:
    more = fields - array.shape[1]
    if not more:
        return array
    fill = np.nan if array.dtype == np.float64 else 0
    return np.concatenate([array, np.full((array.shape[0], more), fill, dtype=array.dtype)], axis=1)


# ---------------------------------------------------------------- a record's numbers


def numbers(record: Mapping[str, Any]) -> dict[str, float]:
    """Its fields that are finite numbers, by name; items of lists and dictionaries as name[item]."""
    found: dict[str, float] = {}
    for name, value in record.items():
        kind = type(value)
        if name in _SKIPPED:
            continue
        if kind is float or kind is int:
            _put(found, name, value)
        elif kind is list and name in _LISTS:
            for i, item in enumerate(value[:MAX_ITEMS]):
                _put(found, f"{name}[{i}]", item)
            if name in _WORST and (known := [item for item in map(_number, value) if item == item]):
                found[f"{name}_worst"] = max(known)
        elif kind is dict:
            for key, item in list(value.items())[:MAX_ITEMS]:
                _put(found, f"{name}[{key}]", item)
    return found


def _put(found: dict[str, float], name: str, value: Any) -> None:
    if (number := _number(value)) == number:
        found[name] = number


def _number(value: Any) -> float:
    """NaN for whatever is not a number of a size that can be measured, and drawn."""
    if type(value) not in (float, int):
        return math.nan
    try:
        number = float(value)
    except OverflowError:
        return math.nan
    return number if abs(number) <= LARGEST else math.nan


def parse(line: bytes) -> dict[str, Any] | None:
    """A line of metrics.jsonl as a record; None where it is none."""
    try:
        record = parse_json(line)
    except (ValueError, RecursionError):
        return None
    if type(record) is not dict or any(_number(record.get(name)) != _number(record.get(name)) for name in ("step", "tokens")):
        return None
    return record if "loss" in record else None
