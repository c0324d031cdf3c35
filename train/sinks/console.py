"""The terminal: a live bar for a person, lines for a log file."""

import math
import statistics
from collections import deque

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from .. import units
from ..metrics import StepRecord
from .sink import Sink

LEAST_BAR = 7  # columns, with the space around it
RECENT = 32  # steps, whose median speed the time to go is told by


class ConsoleSink(Sink):
    """A live bar in a terminal; elsewhere a line for every `log_interval`-th step, the first, the last and each evaluation."""

    def __init__(self, total_steps: int, *, log_interval: int = 1, console: Console | None = None):
        self.total, self.interval = total_steps, log_interval
        self.console = console or Console()
        self._bar, self._first, self._held_out = None, True, None
        self._speeds: deque[float] = deque(maxlen=RECENT)

    def _write(self, record):
        self._speeds.append(record.tokens_per_second)
        if self.console.is_terminal:
            self._show(record)
        elif self._first or record.step % self.interval == 0 or record.step == self.total or record.eval_loss is not None:
            self.say(self.line(record))
        self._first = False

    def say(self, text: str) -> None:
        """A line of its own, above the bar where there is one."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def line(self, record: StepRecord) -> str:
        """The whole record's news, for a log file."""
        r = record
        parts = [f"step {self._at(r)}", f"loss {r.loss:.4f}"]
        if r.eval_loss is not None:
            parts.append(f"eval {r.eval_loss:.4f}")
        parts += [f"lr {r.lr:.2e}", f"grad {r.grad_norm:.3g}", f"{units.count(r.tokens_per_second)} tokens/s"]
        price = f"({units.money(r.dollars_per_billion_tokens)}/B tokens)"
        parts += [f"MFU {units.percent(r.mfu)}", f"{units.money(r.dollars)} {price}", f"ETA {self._to_go(r)}"]
        return "  ".join(parts)

    def _at(self, r: StepRecord) -> str:
        return f"{r.step:>{len(str(self.total))}}/{self.total}"

    def _to_go(self, r: StepRecord) -> str:
        usual = statistics.median(self._speeds or [r.tokens_per_second])
        return units.duration(r.eta_seconds * r.tokens_per_second / usual if r.eta_seconds is not None and usual > 0 else r.eta_seconds)

    def _show(self, r: StepRecord) -> None:
        self._held_out = r.eval_loss if r.eval_loss is not None else self._held_out
        if self._bar is None:
            columns = (TextColumn("{task.fields[at]}"), BarColumn(bar_width=None), TextColumn("{task.fields[news]}"))
            self._bar = Progress(*columns, console=self.console, expand=True, refresh_per_second=4)
            self._task = self._bar.add_task("train", total=self.total, at="", news="")
        self._bar.update(self._task, completed=r.step, at=self._at(r), news=self._news(r))
        self._bar.start()
        if r.eval_loss is not None or not math.isfinite(r.loss):
            self.say(self.line(r))

    def _news(self, r: StepRecord) -> str:
        """As much as the terminal is wide enough for: what matters least goes first."""
        parts = [  # in their order; how little each matters, and its style
            (f"loss {r.loss:.3f}", 0, "bold"), (f"held-out {self._held_out:.3f}" if self._held_out is not None else "", 4, ""),
            (f"{units.count(r.tokens_per_second)} tokens/s", 3, ""), (f"MFU {units.percent(r.mfu)}", 2, ""),
            (units.money(r.dollars), 1, "green"), (f"{units.money(r.dollars_per_billion_tokens)}/B tokens", 5, ""),
            (f"ETA {self._to_go(r)}", 0, ""),
        ]  # fmt: skip
        parts = [part for part in parts if part[0]]
        room = self.console.width - len(self._at(r)) - LEAST_BAR
        while sum(len(text) + 2 for text, *_ in parts) > room and any(little for _, little, _ in parts):
            parts.remove(max(parts, key=lambda part: part[1]))
        return "  ".join(f"[{style}]{text}[/]" if style else text for text, _, style in parts)

    def _close(self):
        if self._bar is not None:
            self._bar.stop()
