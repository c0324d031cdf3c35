"""The terminal: a live bar for a person, lines for a log file."""

import math

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

from .. import units
from ..metrics import StepRecord
from .sink import Sink


class ConsoleSink(Sink):
    """A live bar in a terminal; elsewhere a line for every `log_interval`-th step, the first, the last and each evaluation."""

    def __init__(self, total_steps: int, *, log_interval: int = 1, console: Console | None = None):
        self.total, self.interval = total_steps, log_interval
        self.console = console or Console()
        self._bar, self._first = None, True

    def _write(self, record):
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
        r, width = record, len(str(self.total))
        parts = [f"step {r.step:>{width}}/{self.total}", f"loss {r.loss:.4f}"]
        if r.eval_loss is not None:
            parts.append(f"eval {r.eval_loss:.4f}")
        parts += [f"lr {r.lr:.2e}", f"grad {r.grad_norm:.3g}", *self._speed_and_money(r)]
        return "  ".join(parts)

    def _speed_and_money(self, r: StepRecord) -> list[str]:
        return [
            f"{units.count(r.tokens_per_second)} tokens/s", f"MFU {units.percent(r.mfu)}",
            f"{units.money(r.dollars)} ({units.money(r.dollars_per_billion_tokens)}/B tokens)", f"ETA {units.duration(r.eta_seconds)}",
        ]  # fmt: skip

    def _show(self, r: StepRecord) -> None:
        if self._bar is None:
            columns = (SpinnerColumn(), MofNCompleteColumn(), BarColumn(bar_width=None), TextColumn("{task.fields[news]}"))
            self._bar = Progress(*columns, console=self.console, expand=True, refresh_per_second=4)
            self._task = self._bar.add_task("train", total=self.total, news="")
            self._bar.start()
        speed, mfu, money, eta = self._speed_and_money(r)
        wide = self.console.width >= 110
        news = [f"[bold]loss {r.loss:.3f}[/]", speed, mfu, f"[green]{money if wide else units.money(r.dollars)}[/]", eta]
        self._bar.update(self._task, completed=r.step, news="  ".join(news))
        if r.eval_loss is not None or not math.isfinite(r.loss):
            self._bar.console.print(self.line(r), markup=False, highlight=False)

    def _close(self):
        if self._bar is not None:
            self._bar.stop()
