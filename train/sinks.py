"""Where step records go: a file, the terminal, Weights & Biases. None of them can stop a run: one that fails says so and goes quiet."""

import contextlib
import math
import os
import sys
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn

from ..conf.compose import to_yaml
from ..conf.schema import Config
from . import metrics, units
from .metrics import StepRecord


class Sink:
    """Takes each step's record. Subclasses implement `_write` and, where they hold something, `_close`; both may raise."""

    hint = ""  # what a person can do when this one fails
    _stopped = _closed = False

    def write(self, record: StepRecord) -> None:
        self._guard(self._write, record)

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

    def _close(self) -> None:
        pass


class Sinks(Sink):
    """Several sinks as one."""

    def __init__(self, sinks: Iterable[Sink]):
        self.sinks = list(sinks)

    def _write(self, record):
        for sink in self.sinks:
            sink.write(record)

    def _close(self):
        for sink in self.sinks:
            sink.close()


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
            self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        self._file.write(metrics.to_line(record))
        self._file.flush()

    def _close(self):
        if self._file is not None:
            self._file.close()


def _mend_last_line(path: Path) -> None:
    """Cut a torn last line off, or the next record would be glued to it and lost too."""
    if not path.exists():
        return
    with open(path, "rb+") as file:
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
            self.console.print(self.line(record), markup=False, highlight=False, soft_wrap=True)
        self._first = False

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


class WandbSink(Sink):
    """Weights & Biases: `disabled`, `offline` (sync later with `wandb sync`) or `online`. A resumed run continues the same W&B run.

    Its id is kept in `wandb_id.txt` of the run directory. Nothing waits longer than `timeout_s` for the server (None: 20 s, and
    far less than the other ranks wait for this one): where it does not answer at the start, this session's records stay on this machine, as
    with `offline`.
    """

    hint = "launch.wandb=offline records on this machine, for `wandb sync` later; launch.wandb=disabled does without."

    def __init__(self, config: Config, run_dir: str | Path, *, mode: str, project: str, timeout_s: float | None = None):
        self._run = None
        if mode == "disabled":
            self._stopped = True
            return
        seconds = min(20.0, config.launch.timeout_s / 4) if timeout_s is None else timeout_s
        self._guard(self._reach, config, Path(run_dir), mode, project, seconds)

    def _reach(self, config: Config, run_dir: Path, mode: str, project: str, timeout_s: float) -> None:
        try:
            self._start(config, run_dir, mode, project, timeout_s)
        except Exception as error:
            if mode != "online" or isinstance(error, ImportError):
                raise
            sys.modules["wandb"].teardown()  # its process still has the run that it could not begin
            self._start(config, run_dir, "offline", project, timeout_s)
            why = (str(error).strip().splitlines() or [type(error).__name__])[0]
            print(f"W&B does not answer ({why}): this session is kept in {run_dir / 'wandb'}; `wandb sync` sends it later", file=sys.stderr)

    def _start(self, config: Config, run_dir: Path, mode: str, project: str, timeout_s: float) -> None:
        import wandb  # 1 s of imports that runs without it need not pay

        run_dir.mkdir(parents=True, exist_ok=True)
        id_file = run_dir / "wandb_id.txt"
        if not id_file.exists():
            metrics.replace_file(id_file, uuid.uuid4().hex[:12] + "\n")
        seconds = max(1, math.ceil(timeout_s))
        self._run = wandb.init(
            project=project, name=config.name, id=id_file.read_text().strip(), dir=run_dir, mode=mode,
            resume="allow" if mode == "online" else None, config={"yaml": to_yaml(config)},
            settings=wandb.Settings(init_timeout=seconds, login_timeout=seconds, finish_timeout=seconds, console="off", quiet=True),
        )  # fmt: skip
        # Steps that a restart repeats would be refused on W&B's own counter: the record's step is the axis.
        self._run.define_metric("*", step_metric="step")

    def _write(self, record):
        self._run.log(wandb_values(record))

    def _close(self):
        if self._run is not None:
            self._run.finish()


def wandb_values(record: StepRecord) -> dict[str, Any]:
    """Stable W&B names of a record. Loads by expert stay in the run directory: thousands of keys would drown the rest."""
    r = record
    values = {
        "step": r.step, "tokens": r.tokens, "samples": r.samples,
        "loss/train": r.loss, "loss/eval": r.eval_loss, "loss/balance": r.balance_loss, "loss/z": r.z_loss,
        "loss/eval_bits_per_byte": r.eval_bits_per_byte,
        **{f"loss/mtp_{k + 1}": loss for k, loss in enumerate(r.mtp_loss or ())},
        **{f"loss/eval/{name}": loss for name, loss in (r.eval_loss_by_source or {}).items()},
        "batch/tokens": r.batch_tokens, "batch/seq_len": r.seq_len,
        "optim/lr": r.lr, "optim/grad_norm": r.grad_norm, "optim/clip_coef": r.clip_coef,
        "speed/step_seconds": r.step_seconds, "speed/tokens_per_second": r.tokens_per_second,
        "speed/tokens_per_second_per_gpu": r.tokens_per_second_per_gpu, "speed/mfu": r.mfu, "speed/eta_seconds": r.eta_seconds,
        "cost/dollars": r.dollars, "cost/dollars_per_billion_tokens": r.dollars_per_billion_tokens, "cost/seconds": r.seconds,
        "router/max_vio_worst": max(r.max_vio) if r.max_vio else None,
        "router/max_vio_mean": r.max_vio_mean, "router/rank_overload_worst": max(r.rank_overload) if r.rank_overload else None,
        "router/dead_experts": r.dead_experts, "router/bias_norm": r.bias_norm, "router/entropy": r.router_entropy,
        "memory/peak_gb": r.memory_gb, "session": r.session,
    }  # fmt: skip
    return {name: value for name, value in values.items() if value is not None}
