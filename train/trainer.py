"""The training loop: phase by phase, step by step, with evaluations, records and checkpoints; begun anew or gone on with.

    runs/NAME/  config.yaml  metrics.jsonl  summary.json  tokenizer.json  checkpoints/  traces/

A new phase is a resume: the last one ends with a checkpoint, and the next one, perhaps of another layout, loads it.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..conf.compose import to_yaml
from ..conf.phases import Phase, num_steps, phase_at
from ..conf.schema import Config, ConfigError
from ..parallel import world
from ..parallel.optimizer.zero import Chunk, may_lack
from . import describe, left_out, metrics, units
from .books import Books
from .checkpoint.checkpointer import Checkpointer, read_extra
from .checkpoint.folder import mend, torn
from .checkpoint.manifest import CheckpointError, DamagedError, understood
from .checkpoint.saves import Saves, State
from .data.corpus import open_corpus
from .guard import GoBack
from .metrics import StepRecord, Summary
from .phase_run import PhaseRun
from .records import make_record
from .resume import Progress, check_same_run, find_start, kept, progress_of, trusted
from .sinks.opening import open_sinks
from .sinks.sink import Sinks
from .sound import Sound
from .step import Beat, Watch, silent
from .stragglers import Busy
from .traces import Traces


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a session ended. `summary` is None where no step was ever taken."""

    summary: Summary | None
    step: int
    stopped: bool  # by `stop()`, or with the budget: saved, and to be continued
    spent: str = ""  # which limit of the budget the run has come to
    wants: int = 0  # ranks that the next phase runs on, where they are not as many as these; else 0


def run(
    config: Config,
    device: torch.device,
    *,
    stop: Callable[[], bool] = lambda: False,
    log: Callable[[str], None] = print,
    watch: Watch | None = None,
    beat: Beat = silent,
    job: str = "",
    webhook: str = "",
    hide: Callable[[str], str] = str,
) -> Outcome:
    """Train until the last step, `train.stop_after` steps, or until `stop()` is true on any rank (saved at that step's end).

    Collective: every rank of an initialised world calls it. `log` is used on rank 0; `beat` is told what this rank is at: start, data,
    replay, forward and backward, reduce, update, evaluation, checkpoint, end. `webhook`: what `launch.alerts.webhook` stands for. `hide`:
    takes secrets out of what an error says before an alert tells of it.

    Raises ConfigError, DataError, CheckpointError, FloatingPointError; whatever was saved before stays.
    """
    try:
        return _Session(config, device, stop, log if dist.get_rank() == 0 else lambda line: None, watch, beat, job, webhook, hide).run()
    except _OtherSize as error:
        return Outcome(summary=None, step=error.step, stopped=False, wants=error.wants)


class _OtherSize(Exception):
    """The newest checkpoint that is whole is of a phase on `wants` ranks, which are not as many as these."""

    def __init__(self, step: int, wants: int):
        super().__init__(f"step {step}: {wants} ranks")
        self.step, self.wants = step, wants


class _Session:
    def __init__(
        self,
        config: Config,
        device: torch.device,
        stop: Callable[[], bool],
        log: Callable[[str], None],
        watch: Watch | None = None,
        beat: Beat = silent,
        job: str = "",
        webhook: str = "",
        hide: Callable[[str], str] = str,
    ):
        self.config, self.device, self.stop, self.log, self.watch, self.webhook, self.hide = config, device, stop, log, watch, webhook, hide
        self.beat = Busy(beat, on_gpu=device.type == "cuda")
        self.books, self.spent = Books(config, Path(config.run_dir), job), ""
        self.rank, self.is_main = dist.get_rank(), dist.get_rank() == 0
        self.run_dir = Path(config.run_dir)
        self.checkpointer = Checkpointer(
            self.run_dir / "checkpoints",
            keep_last=config.checkpoint.keep_last,
            async_save=config.checkpoint.async_save,
            group=world.on_hosts("checkpoints"),
        )
        mttf_s = config.cluster.mttf_gpu_hours * 3600 / dist.get_world_size()
        self.saves = Saves(self.checkpointer, config.checkpoint, mttf_s=mttf_s, log=self.log)
        self.traces = Traces(self.run_dir / "traces", config.launch.trace_interval, device, self.beat, self.log)
        self.progress, self.part = Progress(), None
        self.sinks = Sinks([])
        windows, alert = self._of_first(lambda: left_out.read(self.run_dir)), lambda text: self.sinks.trouble("loss", text)
        self.sound = Sound(config.guard, windows, self.run_dir, log, alert)
        self.guard = self.sound.guard
        self._go_on_from_newest()
        if self.is_main:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            metrics.replace_file(self.run_dir / "config.yaml", to_yaml(config))
            self.part.corpus.tokenizer.save(self.run_dir / "tokenizer.json")
            self.books.begin(self.phase.config, self.progress.step)

    @property
    def phase(self) -> Phase:
        return self.part.phase

    # ------------------------------------------------------------ start and end

    def _go_on_from_newest(self) -> Path | None:
        """Into the state of the newest checkpoint that is whole, and its phase. Those found damaged before it are set aside: of this run's
        own directory; of another, that is an error. Nothing slow comes before a wrong directory is refused."""
        begun, aside = self.part is not None, False
        while True:
            try:
                start, step = self._of_first(lambda: self._find_start(begun))
                phase = phase_at(self.config, step)
                if aside and phase.config.parallel.world_size != dist.get_world_size():
                    raise _OtherSize(step, phase.config.parallel.world_size)
                self._enter(phase, start)
            except DamagedError as damage:
                self.log(self.checkpointer.set_aside(damage))
                aside = True
                continue
            if not begun:
                self.log(describe.model(self.phase.config))
                if start is not None:
                    self.log(f"resumed at step {self.progress.step} from {start}; the next sample is number {self.progress.sample}")
            self._describe_phase()
            return start

    def _find_start(self, begun: bool) -> tuple[Path | None, int]:
        """And the steps that it has done."""
        mend(self.checkpointer.folder)
        start = find_start(self.config, begun=begun)
        if start is None and (left := torn(self.checkpointer.folder)):
            self.log(f"{left[-1]} is a save that was cut short, and no checkpoint was ever complete: this run begins anew")
        if start is not None and (told := trusted(self.config, start).told):
            self.log(told)
        return start, progress_of(start, read_extra(start)).step if start else 0

    def _of_first(self, ask: Callable[[], Any]) -> Any:
        """The first rank's answer, on all ranks; or its error."""
        answer: list[Any] = [None]
        if self.is_main:
            try:
                answer = [ask()]
            except (ConfigError, CheckpointError, OSError) as error:
                answer = [error]
        dist.broadcast_object_list(answer, group=self.checkpointer.group, group_src=0)
        if isinstance(answer[0], Exception):
            raise answer[0]
        return answer[0]

    def _enter(self, phase: Phase, start: Path | None) -> None:
        """Make this rank's part of a phase, with the state of the checkpoint `start`."""
        self.beat("start")
        c = phase.config
        if c.parallel.world_size != dist.get_world_size():
            rule = f"phase {phase.name} is next, of {c.parallel.world_size} ranks; {dist.get_world_size()} were started"
            raise ConfigError("number of processes", dist.get_world_size(), rule, c.parallel.world_size)
        mesh = None
        if self.part is not None:
            before = self.phase.config
            if before.parallel == c.parallel:
                mesh = self.part.engine.mesh
            else:
                self.part.engine.mesh.close()
            self.part = None  # its weights go before the next are made
            gc.collect()  # stages and their phases hold one another
        corpus = open_corpus(c.data, vocab_size=c.model.vocab_size, seed=c.train.seed, extra=c.model.mtp_depth, log=self.log)
        self.part = PhaseRun(phase, corpus, self.device, mesh=mesh, watch=self.watch, beat=self.beat, log=self.log)
        if start is not None:
            self._load(start)
        self.part.engine.watch.begun(self.part.engine)
        if self.progress.step == phase.first_step:
            self.guard.begin()  # other data, another batch: nothing to compare with
        if phase.stream != self.progress.stream:
            self.progress.stream, self.progress.sample = phase.stream, 0

    def _load(self, start: Path) -> None:
        rng = torch.get_rng_state()
        chunks = self.part.engine.chunks(saving=False) | {f"rng.{self.rank}": Chunk(rng.numel(), 0, rng)}
        # Random state belongs to a rank: under another layout some of it has no owner, and some ranks keep their own.
        extra = self.checkpointer.load(start, chunks, optional=lambda name: name.startswith("rng.") or may_lack(name))
        with understood(start, passing=(ConfigError,)):
            self._take_state(start, extra)
        torch.set_rng_state(rng)

    def _take_state(self, start: Path, extra: dict[str, Any]) -> None:
        """What a checkpoint keeps beside tensors."""
        progress = progress_of(start, extra)
        for told in check_same_run(self.config, self.phase, self.part.corpus, start, extra):
            self.log(told)
        self.part.engine.optimizer.load_state(progress.step)
        self.part.engine.placement.load_state(extra)
        if self.part.engine.sentinel:
            self.part.engine.sentinel.load_state(extra)
        self.guard.load_state(extra)
        self.part.replay.load_state(extra)
        self.progress = progress

    def _state(self) -> State:
        """What a checkpoint holds."""
        rng = torch.get_rng_state()
        chunks = self.part.engine.chunks(saving=True) | {f"rng.{self.rank}": Chunk(rng.numel(), 0, rng)}
        extra = {
            **kept(self.config, self.phase, self.part.corpus, self.progress),
            **self.part.engine.placement.state(),
            **(self.part.engine.sentinel.state() if self.part.engine.sentinel else {}),
            **self.guard.state(),
            **self.part.replay.state(),
        }
        return chunks, extra

    def _describe_phase(self) -> None:
        for line in describe.phase(self.config, self.part):
            self.log(line)

    def _summary(self) -> Summary | None:
        if not self.is_main or not self.books.metrics_path.exists():
            return None
        summary = metrics.summarize(self.phase.config, metrics.scan_records(self.books.metrics_path, lambda *bad: None))
        if summary is not None:
            summary.write(self.run_dir / "summary.json")
        return summary

    # ------------------------------------------------------------ the loop

    def run(self) -> Outcome:
        c, saved, stopping, wants = self.config, self.progress.step, False, 0
        last = num_steps(c)
        if c.train.stop_after:
            last = min(last, self.progress.step + c.train.stop_after)
        self.spent = self._of_first(self.books.spent) if self.progress.step < last else ""
        stopping = bool(self.spent)
        self.sinks = self._open_sinks()
        try:
            while self.progress.step < last and not stopping and not wants:
                began = time.monotonic()
                try:
                    record, sums = self._step()
                except GoBack as error:
                    self._go_back(error)
                    continue
                self.sinks.write(record)
                self.beat("checkpoint")
                step, stopping = self.progress.step, sums["stop"] > 0 or self._budget_is_spent(sums)
                due, over = self.saves.due(step, sums, dist.get_world_size()), step == self.phase.end_step
                if stopping or over or step == last:
                    self.saves.save_last(step, self._state)
                    saved = step
                elif due:
                    self.saves.save(step, self._state)
                self.books.budget.step_took(time.monotonic() - began)
                if over and self.progress.step < last and not stopping:
                    wants = self._go_on()
            self.beat("end")
            if self.is_main:
                self.books.end(self.saves.news()["checkpoint_seconds"] or 0.0)
        except Exception as error:
            words = str(error).removesuffix(str(error.__cause__ or "")).rstrip(": ")  # without what a library adds
            self.sinks.trouble("failure", self.hide(f"after step {self.progress.step}: {type(error).__name__}: {words}").splitlines()[0])
            raise
        finally:
            self.sinks.close()
        assert saved == self.progress.step
        return Outcome(
            summary=self._summary(), step=self.progress.step, stopped=stopping, spent=self.spent * (self.progress.step < last), wants=wants
        )

    def _budget_is_spent(self, sums: dict[str, float]) -> bool:
        """Alike on all ranks."""
        c, p = self.config, self.progress
        if c.max_tokens and p.step < num_steps(c) and p.tokens + phase_at(c, p.step).batch_tokens(p.step) > c.max_tokens:
            self.spent = f"max_tokens={c.max_tokens}: {units.count(p.tokens)} are trained, and the next step's would be too many"
        elif sums["spent"] and not self.spent:
            self.spent = "budget"
        if self.spent:
            self.log(f"stopping: {self.spent}")
        return bool(self.spent)

    def _go_on(self) -> int:
        """Into the next phase; or the number of ranks that it wants, if that is another."""
        upcoming = phase_at(self.config, self.progress.step)
        if upcoming.config.parallel.world_size != dist.get_world_size():
            return upcoming.config.parallel.world_size
        self._enter(upcoming, self.checkpointer.latest())
        self._describe_phase()
        return 0

    def _open_sinks(self) -> Sinks:
        return open_sinks(self.config, self.run_dir, self.books.metrics_path, webhook=self.webhook) if self.is_main else Sinks([])

    def _step(self) -> tuple[StepRecord, dict[str, float]]:
        began, p, phase = time.monotonic(), self.progress, self.phase
        batch_tokens = phase.batch_tokens(p.step)
        lr = self.part.learning_rate(p.step)
        sentinel = self.part.engine.sentinel
        self.traces.begin(p.step + 1, self.part.engine.executor)
        found, heard, samples = self.sound.gradients(self.part, p, batch_tokens // phase.config.data.seq_len, self._signals)
        for sentence in self.part.late(p.step, heard) if self.is_main else ():
            self.log(sentence)
        result = self.part.apply(p.step, found)
        self.guard.taken(found.loss, found.grad_norm)
        look = sentinel.report(p.step) if sentinel else None
        for block in look.left_out if look else ():
            self.log(look.sentence(block, phase.config.precision.sentinel_max_error))
        p.step += 1
        p.tokens += result.tokens
        p.samples += len(samples)
        p.sample = int(samples[-1]) + 1
        seconds, interval = time.monotonic() - began, phase.config.train.eval_interval
        traced = self.traces.finish(p.step, self.part.engine.executor, self.part.stragglers, seconds)
        held_out = self.part.evaluate() if p.step == phase.end_step or (interval and p.step % interval == 0) else None
        spent = {**self.books.so_far(), "session": self.books.session}
        record = make_record(
            self.config, phase, p, result, heard, lr=lr, step_seconds=seconds, held_out=held_out, look=look, sentinel=sentinel,
            **spent, **traced, **self.saves.news(),
        )  # fmt: skip
        return record, heard.sums

    def _signals(self) -> dict[str, float]:
        """What this rank tells the others beside what it found."""
        if self.is_main:
            self.spent = self.books.spent()
        return {"stop": self.stop(), "spent": bool(self.spent), **self.saves.signals()}

    def _go_back(self, error: GoBack) -> None:
        """To the last checkpoint, or to the beginning where there is none."""
        step, upto = self.progress.step, self.progress.sample
        self.sinks.trouble("rollback", f"step {step + 1}: {error}; the run goes back to its last checkpoint")
        self.guard.going_back(str(error), step)
        self.saves.finish()
        stream, self.progress = self.phase.stream, Progress()
        start = self._go_on_from_newest()
        self.log(f"step {step + 1}: {error}; back to {start.name if start else 'the beginning'}")
        if start is None:
            self.guard.begin()
        if error.without_since and self.progress.stream == stream and self.progress.sample < upto:
            self.sound.leave_out(stream, self.progress.sample, upto - 1, str(error))
        if self.is_main:
            self.sinks.close()
            self.books.back(self.phase.config, self.progress.step)
            self.sinks = self._open_sinks()
