"""What a rank did during a step, and when: each compute phase, each exchange, each pipeline transfer.

The executor tells a `Tracer`; the one it has by default does nothing. A `Recorder` keeps spans, and rank 0 gathers those of all ranks:
a file that Chrome and Perfetto open, a Gantt picture (`launch/figures/gantt.py`), and what was measured (`trace_measure.py`).

    compute    a phase's forward or backward, its weight gradients, and what an exchange's bytes are packed and unpacked by
    exchange   an all-to-all: from when it was issued until its work was over, waited for or not
    link       a pipeline transfer: "recv" from when it was posted until it was over, or (gloo does not tell) until it had been waited for;
               "send" until its bytes had left, or, where nobody tells, a moment
    pair       an action that overlaps two ops
    recompute  the part of a phase's backward that computes its forward again
    reduce     sums of a stage's gradients are being started, under the rest of the step
    section    what the step around the executor is at: its phase is data, forward and backward, reduce, update ...

On a GPU all of these are events of the streams, so that they say when kernels ran, not when the host asked for them.
"""

import json
import time
from collections.abc import Iterable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ..conf import files
from .phases import Pending
from .schedule.ops import Action, Op
from .transport import Work

FORMAT = "shoestring trace 1"
PIPELINE = ("compute", "exchange", "link", "pair")  # of the executor: what Gantt pictures show, and bubbles are a share of


class Span(NamedTuple):
    rank: int
    what: str  # compute | exchange | link | pair | recompute | reduce | section
    kind: str  # F, B, I or W; "send" or "recv" of a link; "F&B" of a pair
    stage: int
    micro_batch: int
    phase: str
    start: float  # seconds since the step began, alike on all ranks
    end: float


_NOTHING = nullcontext()


class Tracer:
    """What the executor tells of its work. This one does nothing."""

    def action(self, action: Action) -> AbstractContextManager:
        """Around the ops of one action."""
        return _NOTHING

    def compute(self, op: Op, phase: str) -> AbstractContextManager:
        """Around a compute phase's forward or backward."""
        return _NOTHING

    def weights(self, op: Op, phase: str) -> AbstractContextManager:
        """Around the weight gradients that a phase's backward left."""
        return _NOTHING

    def recompute(self, op: Op, phase: str) -> AbstractContextManager:
        """Around the part of `compute` in which a phase that kept nothing runs forward again."""
        return _NOTHING

    def reduce(self, stage: int) -> AbstractContextManager:
        """Around the start of a stage's sums over replicas."""
        return _NOTHING

    def pack(self, op: Op, phase: str) -> AbstractContextManager:
        """Around what a communication phase computes before its bytes are sent, up to their issue."""
        return _NOTHING

    def issue(self, op: Op, phase: str, pending: Pending) -> Pending:
        """A communication phase's pending, just issued; the executor goes on with the one returned."""
        return pending

    def link(self, kind: str, op: Op, work: Work) -> Work:
        """A pipeline transfer just posted, "send" or "recv"; the executor goes on with the work returned."""
        return work


class Recorder(Tracer):
    """Keeps this rank's spans of one step, from `begin` on."""

    def __init__(self, rank: int, device: torch.device | str = "cpu"):
        self.rank = rank
        self.clock = _DeviceClock() if torch.device(device).type == "cuda" else _HostClock()
        self.spans: list[list] = []  # as Span, with the clock's moments; an end of None: not known to be over
        self._section: list | None = None

    def begin(self, group: dist.ProcessGroup | None = None) -> None:
        """Collective. All ranks leave a barrier at one moment: the origin of their clocks."""
        self.spans.clear()
        self._section = None
        self.clock.settle()
        dist.barrier(group)
        self.clock.begin()

    def finish(self, group: dist.ProcessGroup | None = None) -> list[Span] | None:
        """Collective over a gloo group (None: the default one): the spans of all ranks by start on rank 0, None elsewhere."""
        self.clock.settle()
        seconds = self.clock.seconds
        mine = [tuple(span[:6]) + (seconds(span[6]), seconds(span[6] if span[7] is None else span[7])) for span in self.spans]
        gathered = [None] * dist.get_world_size(group) if self.rank == 0 else None
        dist.gather_object(mine, gathered, dst=0, group=group)
        return sorted((Span(*s) for spans in gathered for s in spans), key=lambda s: (s.start, s.end)) if self.rank == 0 else None

    def action(self, action: Action) -> AbstractContextManager:
        return self._span("pair", "F&B", action[0], "") if len(action) > 1 else _NOTHING

    def compute(self, op: Op, phase: str) -> AbstractContextManager:
        return self._span("compute", op.kind, op, phase)

    def weights(self, op: Op, phase: str) -> AbstractContextManager:
        return self._span("compute", "W", op, phase)

    def recompute(self, op: Op, phase: str) -> AbstractContextManager:
        return self._span("recompute", op.kind, op, phase)

    def reduce(self, stage: int) -> AbstractContextManager:
        return self._span("reduce", "", Op("B", stage, 0), "")

    def pack(self, op: Op, phase: str) -> AbstractContextManager:
        return self._span("compute", op.kind, op, phase)

    def section(self, name: str) -> None:
        """The step has come to this; "": to nothing that has a name."""
        if self._section is not None:
            self._section[7] = self.clock.now()
        self._section = self._open("section", "", Op("", 0, 0), name) if name else None

    def issue(self, op: Op, phase: str, pending: Pending) -> Pending:
        if pending.work is None:
            return pending

        def finish() -> tuple:
            with self._span("compute", op.kind, op, phase):
                return pending.finish()

        work = _Watched(pending.work, self._open("exchange", op.kind, op, phase), self.clock, told=True)
        return replace(pending, work=work, finish=finish)

    def link(self, kind: str, op: Op, work: Work) -> Work:
        return _Watched(work, self._open("link", kind, op, ""), self.clock, told=False, sending=kind == "send")

    def _open(self, what: str, kind: str, op: Op, phase: str) -> list:
        span = [self.rank, what, kind, op.stage, op.micro_batch, phase, self.clock.now(), None]
        self.spans.append(span)
        return span

    @contextmanager
    def _span(self, what: str, kind: str, op: Op, phase: str):
        span = self._open(what, kind, op, phase)
        yield
        span[7] = self.clock.now()


class _Watched:
    """A work whose span ends when it is over. `told`: its future says when; gloo's point-to-point works have none."""

    def __init__(self, work: Work, span: list, clock: "_HostClock | _DeviceClock", *, told: bool, sending: bool = False):
        self.work, self.span, self.clock, self.sending = work, span, clock, sending
        # On gloo the callback runs in its thread when the bytes are there; on NCCL at once, on a stream that follows the collective.
        self.moment = work.get_future().then(lambda _: clock.now()) if told and hasattr(work, "get_future") else None

    def wait(self) -> Any:
        result = self.work.wait()
        if self.moment is not None:
            self.span[7] = self.moment.wait()
        elif getattr(self.work, "ended", None) is not None:  # the link of a `Fabric`
            self.span[7] = self.work.ended
        elif not self.sending:
            self.span[7] = self.clock.now()
        return result

    def is_completed(self) -> bool:
        return self.work.is_completed()


class _HostClock:
    def settle(self) -> None:
        pass

    def begin(self) -> None:
        self.origin = time.monotonic()

    def now(self) -> float:
        return time.monotonic()

    def seconds(self, moment: float) -> float:
        return moment - self.origin


class _DeviceClock:
    """Moments are events of the current stream."""

    def settle(self) -> None:
        torch.cuda.synchronize()

    def begin(self) -> None:
        self.origin = self.now()

    def now(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, moment: torch.cuda.Event) -> float:
        return self.origin.elapsed_time(moment) / 1e3


# ---------------------------------------------------------------- the file

LANES = ("compute", "exchange F", "exchange B", "link", "pair", "step")  # of a rank, as threads of a process
_LANE = {"recompute": "compute", "reduce": "step", "section": "step"}  # of others than the one of their name


def write_trace(path: Path, spans: Iterable[Span], **facts: Any) -> None:
    """Chrome's trace format (chrome://tracing, ui.perfetto.dev): a process per rank. `facts` stand beside the events."""
    files.folder(path.parent.parent, path.parent.name)
    events = [event for rank in sorted({s.rank for s in spans}) for event in _names(rank)] + [_event(s) for s in spans]
    document = {"traceEvents": events, "displayTimeUnit": "ms", "otherData": {"format": FORMAT, **facts}}
    files.replace(path, json.dumps(document, separators=(",", ":")) + "\n")


def _names(rank: int) -> list[dict]:
    named = [{"ph": "M", "pid": rank, "name": "process_name", "args": {"name": f"rank {rank}"}}]
    return named + [{"ph": "M", "pid": rank, "tid": i, "name": "thread_name", "args": {"name": lane}} for i, lane in enumerate(LANES)]


def _event(s: Span) -> dict:
    lane = f"exchange {'F' if s.kind == 'F' else 'B'}" if s.what == "exchange" else _LANE.get(s.what, s.what)
    name = f"{s.stage}{s.kind}{s.micro_batch} {s.phase}".rstrip() if s.what in PIPELINE else s.phase or s.what
    times = {"ts": round(s.start * 1e6, 1), "dur": round((s.end - s.start) * 1e6, 1)}
    args = {"what": s.what, "kind": s.kind, "stage": s.stage, "micro_batch": s.micro_batch, "phase": s.phase}
    return {"ph": "X", "pid": s.rank, "tid": LANES.index(lane), "name": name, "cat": s.what, **times, "args": args}


def read_trace(path: Path) -> tuple[list[Span], dict[str, Any]]:
    """The spans of a file that `write_trace` wrote, and its facts. Raises ValueError for any other file."""
    document = json.loads(path.read_text(encoding="utf-8"))
    facts = document.get("otherData", {}) if isinstance(document, dict) else {}
    if facts.get("format") != FORMAT:
        raise ValueError(f"{path} is not a trace of ours: otherData.format is {facts.get('format')!r}, not {FORMAT!r}")
    spans = [
        Span(e["pid"], **e["args"], start=e["ts"] / 1e6, end=(e["ts"] + e["dur"]) / 1e6) for e in document["traceEvents"] if e["ph"] == "X"
    ]
    return spans, {name: value for name, value in facts.items() if name != "format"}
