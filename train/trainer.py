"""The training loop: read samples, step, evaluate, record, checkpoint; begin anew or go on where the run directory says.

    runs/NAME/  config.yaml  metrics.jsonl  summary.json  tokenizer.json  checkpoints/
"""

import dataclasses
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..conf.compose import to_yaml
from ..conf.schema import Config, ConfigError
from ..parallel.phases import IGNORED, MicroBatch
from ..parallel.zero import Chunk, may_lack
from . import cost, metrics
from .checkpoint import Checkpointer, find_latest
from .data import open_corpus
from .engine import Engine, StepResult, learning_rate
from .metrics import StepRecord, Summary
from .sinks import ConsoleSink, JsonlSink, Sinks, WandbSink


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a session ended. `summary` is None where no step was ever taken."""

    summary: Summary | None
    step: int
    stopped: bool  # by `stop()`: saved, and to be continued


@dataclass(kw_only=True)
class Progress:
    """Where the run stands: what a checkpoint keeps beside tensors. `sample` is the next one of the phase's stream to be read."""

    step: int = 0
    tokens: int = 0
    samples: int = 0
    phase: int = 0
    sample: int = 0


def run(config: Config, device: torch.device, *, stop: Callable[[], bool] = lambda: False, log: Callable[[str], None] = print) -> Outcome:
    """Train until the last step, `train.stop_after` steps, or until `stop()` is true on any rank (saved at that step's end).

    Collective: every rank of an initialised world calls it. `log` is used on rank 0. Raises ConfigError, DataError, CheckpointError,
    FloatingPointError; whatever was saved before stays.
    """
    return _Session(config, device, stop, log if dist.get_rank() == 0 else lambda line: None).run()


class _Session:
    def __init__(self, config: Config, device: torch.device, stop: Callable[[], bool], log: Callable[[str], None]):
        self.config, self.device, self.stop, self.log = config, device, stop, log
        self.began = time.monotonic()
        self.rank, self.is_main = dist.get_rank(), dist.get_rank() == 0
        self.run_dir = Path(config.run_dir)
        self.checkpointer = Checkpointer(
            self.run_dir / "checkpoints",
            keep_last=config.checkpoint.keep_last,
            async_save=config.checkpoint.async_save,
            group=dist.new_group(backend="gloo"),
        )
        start = self._find_start()  # before anything slow: a wrong directory is refused at once
        self.corpus = open_corpus(config.data, vocab_size=config.model.vocab_size, seed=config.train.seed, log=log)
        self.engine = Engine(config, device)
        self.progress = self._restore(start)
        self.past = metrics.Rewound(session=0, seconds=0.0, dollars=0.0, kept=0, lost=0)
        if self.is_main:
            self.run_dir.mkdir(parents=True, exist_ok=True)
            metrics.replace_file(self.run_dir / "config.yaml", to_yaml(config))
            self.corpus.tokenizer.save(self.run_dir / "tokenizer.json")
            self.past = metrics.rewind(self.metrics_path, self.progress.step)
        self._describe(start)

    @property
    def metrics_path(self) -> Path:
        return self.run_dir / "metrics.jsonl"

    # ------------------------------------------------------------ start and end

    def _find_start(self) -> Path | None:
        """The checkpoint to go on from: the run directory's newest, else the one that `checkpoint.resume` names (or the newest in it)."""
        resume, found = self.config.checkpoint.resume, self.checkpointer.latest()
        if found and resume == "never":
            rule = f"{found} is there; to begin anew, choose another `name` or remove the folder"
            raise ConfigError("checkpoint.resume", "never", rule, "auto")
        if found or resume in ("auto", "never"):
            return found
        named = find_latest(Path(resume) / "checkpoints") or Path(resume)
        if not named.is_dir():
            raise ConfigError("checkpoint.resume", resume, "must be auto, never, or an existing checkpoint or run directory", "auto")
        return named

    def _restore(self, start: Path | None) -> Progress:
        if start is None:
            return Progress()
        rng = torch.get_rng_state()
        chunks = self.engine.chunks(saving=False) | {f"rng.{self.rank}": Chunk(rng.numel(), 0, rng)}
        # Random state belongs to a rank: under another layout some of it has no owner, and some ranks keep their own.
        extra = self.checkpointer.load(start, chunks, optional=lambda name: name.startswith("rng.") or may_lack(name))
        self._check_same_run(start, extra)
        self.engine.optimizer.load_state(extra["progress"]["step"])
        self.engine.placement.load_state(extra)
        torch.set_rng_state(rng)
        return Progress(**extra["progress"])

    def _check_same_run(self, start: Path, extra: dict[str, Any]) -> None:
        """Layout, precision, learning rate and length may change between sessions; model and data may not."""
        for name, value in dataclasses.asdict(self.config.model).items():
            if name != "name" and extra["model"][name] != value:
                raise ConfigError(f"model.{name}", value, f"{start} was trained with another", extra["model"][name])
        for name, value in (("train.seed", self.config.train.seed), ("data", self.corpus.fingerprint)):
            saved = extra.get(name)
            if saved is not None and saved != value:
                rule = f"{start} was trained on another stream of samples; choose another `name` for a new run"
                raise ConfigError(name, value, rule, saved)

    def _save(self) -> None:
        rng = torch.get_rng_state()
        chunks = self.engine.chunks(saving=True) | {f"rng.{self.rank}": Chunk(rng.numel(), 0, rng)}
        extra = {
            "progress": dataclasses.asdict(self.progress),
            "model": dataclasses.asdict(self.config.model),
            "train.seed": self.config.train.seed,
            "data": self.corpus.fingerprint,
            "layout": metrics.layout_name(self.config.parallel),
            "precision": self.config.precision.compute,
            **self.engine.placement.state(),
        }
        self.checkpointer.save(self.progress.step, chunks, extra)

    def _describe(self, start: Path | None) -> None:
        c, p = self.config, cost.num_params(self.config.model)
        self.log(
            f"{c.model.name}: {p.total / 1e6:,.1f} M parameters, {p.active / 1e6:,.1f} M active; {metrics.layout_name(c.parallel)}, "
            f"{c.parallel.world_size} x {c.cluster.device}, {c.precision.compute}, optimizer {c.optim.engine}"
        )
        self.log(
            f"{c.sequences_per_step} sequences of {c.data.seq_len} a step ({c.num_micro_batches} micro-batches of "
            f"{c.train.micro_batch_sequences} on each of {c.parallel.dp} data-parallel ranks), {c.train.steps} steps"
        )
        if start is not None:
            self.log(f"resumed at step {self.progress.step} from {start}; the next sample is number {self.progress.sample}")

    def _summary(self) -> Summary | None:
        if not self.is_main or not self.metrics_path.exists():
            return None
        summary = metrics.summarize(self.config, metrics.scan_records(self.metrics_path, lambda *bad: None))
        if summary is not None:
            summary.write(self.run_dir / "summary.json")
        return summary

    # ------------------------------------------------------------ the loop

    def run(self) -> Outcome:
        c, saved, stopping = self.config, self.progress.step, False
        last = min(c.train.steps, self.progress.step + c.train.stop_after) if c.train.stop_after else c.train.steps
        sinks = self._open_sinks()
        try:
            while self.progress.step < last and not stopping:
                record, stopping = self._step()
                sinks.write(record)
                due = c.checkpoint.interval and self.progress.step % c.checkpoint.interval == 0
                if due or stopping or self.progress.step == last:
                    self._save()
                    saved = self.progress.step
            self.checkpointer.wait()
        finally:
            sinks.close()
        assert saved == self.progress.step
        return Outcome(summary=self._summary(), step=self.progress.step, stopped=stopping)

    def _open_sinks(self) -> Sinks:
        c = self.config
        if not self.is_main:
            return Sinks([])
        console = ConsoleSink(c.train.steps, log_interval=c.launch.log_interval)
        wandb = WandbSink(c, self.run_dir, mode=c.launch.wandb, project=c.launch.wandb_project)
        return Sinks([JsonlSink(self.metrics_path), console, wandb])

    def _step(self) -> tuple[StepRecord, bool]:
        c, began = self.config, time.monotonic()
        lr = learning_rate(c.optim, self.progress.step, c.train.steps)
        result = self.engine.train_step(self._read_step(), lr, flags=self._flags())
        self.progress.step += 1
        self.progress.tokens += result.tokens
        self.progress.samples += c.sequences_per_step
        self.progress.sample += c.sequences_per_step
        seconds = time.monotonic() - began
        step, interval = self.progress.step, c.train.eval_interval
        eval_loss = self._evaluate() if step == c.train.steps or (interval and step % interval == 0) else None
        return self._record(result, lr, seconds, eval_loss), bool(result.flags[0] > 0)

    def _read_step(self) -> list[MicroBatch]:
        """This rank's samples: micro-batch i of data-parallel rank r holds (i * dp + r) * B and on, so any layout reads the same set."""
        c = self.config
        size, dp = c.train.micro_batch_sequences, c.parallel.dp
        first = self.progress.sample + self.engine.mesh.dp_rank * size
        starts = torch.arange(c.num_micro_batches) * (dp * size) + first
        indices = starts[:, None] + torch.arange(size)
        rows = self.corpus.train(indices.flatten().numpy(), phase=self.progress.phase)
        return [_micro_batch(part, self.device) for part in rows.split(size)]

    def _evaluate(self) -> float | None:
        """Mean loss on the first `train.eval_sequences` held-out samples (all, where there are fewer); None where there are none."""
        c, mesh = self.config, self.engine.mesh
        wanted = min(c.train.eval_sequences, self.corpus.num_eval_samples)
        size, dp, per_round = c.train.micro_batch_sequences, c.parallel.dp, c.sequences_per_step
        loss, tokens = 0.0, 0
        for first in range(0, wanted, per_round):
            batches = []
            for i in range(c.num_micro_batches):
                start = first + (i * dp + mesh.dp_rank) * size
                rows = self.corpus.eval([min(index, wanted - 1) for index in range(start, start + size)])
                rows[max(0, wanted - start) :, 1:] = IGNORED  # past the last: every rank still runs every micro-batch
                batches.append(_micro_batch(rows, self.device, counted=False))
            part, count = self.engine.evaluate(batches)
            loss, tokens = loss + part, tokens + count
        return loss / tokens if tokens else None

    def _flags(self) -> Tensor:
        """Beside the step's counts: whether this rank was asked to stop, and each rank's peak memory in its own slot, bytes."""
        flags = torch.zeros(1 + dist.get_world_size(), dtype=torch.float64)
        flags[0] = float(self.stop())
        flags[1 + self.rank] = peak_memory(self.device)
        return flags

    def _record(self, result: StepResult, lr: float, seconds: float, eval_loss: float | None) -> StepRecord:
        c, p, loads = self.config, self.progress, result.loads.tolist()
        devices, held = cost.num_devices(c), time.monotonic() - self.began
        per_device = result.tokens / seconds / devices
        return StepRecord(
            step=p.step,
            tokens=p.tokens,
            samples=p.samples,
            loss=result.loss,
            lr=lr,
            grad_norm=result.grad_norm,
            clip_coef=result.clip_coef,
            step_seconds=seconds,
            tokens_per_second=result.tokens / seconds,
            tokens_per_second_per_gpu=per_device,
            mfu=cost.mfu(per_device, c),
            seconds=self.past.seconds + held,
            dollars=self.past.dollars + cost.dollars(held, devices, c.cluster),
            dollars_per_billion_tokens=cost.dollars_per_billion_tokens(per_device, c.cluster),
            eta_seconds=(c.train.steps - p.step) * seconds,
            eval_loss=eval_loss,
            balance_loss=result.balance_loss,
            z_loss=result.z_loss,
            expert_load=loads,
            max_vio=metrics.max_violation(loads),
            dead_experts=metrics.count_dead(loads),
            bias_norm=result.bias_norm,
            memory_gb=result.flags[1:].max().item() / 1e9,
            time_unix=time.time(),
            session=self.past.session,
        )


def _micro_batch(rows_BS1: Tensor, device: torch.device, counted: bool = True) -> MicroBatch:
    """(B, S + 1) consecutive tokens -> inputs and next tokens. An IGNORED target's own input is never looked at as a target."""
    rows = rows_BS1.to(device)
    tokens = rows[:, :-1].clamp(min=0).contiguous()  # IGNORED, where it stands in a row, is no token
    return MicroBatch(tokens_BS=tokens, targets_BN=rows[:, 1:].contiguous(), counted=counted)


def peak_memory(device: torch.device) -> int:
    """Bytes that this rank has held at most: of the GPU, or of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


