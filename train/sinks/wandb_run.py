"""Weights & Biases: one run there for one run directory, however often it is started again."""

import math
import os
import sys
import uuid
from pathlib import Path
from typing import Any

import yaml

from ...conf import files
from ...conf.compose import to_yaml
from ...conf.schema import Config
from .. import metrics
from ..metrics import StepRecord
from .sink import Sink

FILES = ("config.yaml", "metrics.jsonl", "sessions.jsonl", "alerts.jsonl", "tokenizer.json", "checkpoints", "traces")  # of a run
SUMMARIES = {
    "loss/train": "min,last", "loss/eval": "min,last", "speed/tokens_per_second_per_gpu": "mean,last", "speed/mfu": "mean,last",
    "cost/dollars": "last", "cost/dollars_per_billion_tokens": "min,last", "router/max_vio_worst": "mean,last", "memory/peak_gb": "max",
}  # fmt: skip
# Of itself W&B would keep the command line, the names of host and user, paths, the git remote and what differs from its commit.
WITHOUT = {"disable_git": True, "disable_code": True, "x_disable_meta": True}


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

        self._run_dir = run_dir
        run_dir.mkdir(parents=True, exist_ok=True)
        id_file = run_dir / "wandb_id.txt"
        if not os.path.lexists(id_file):
            metrics.replace_file(id_file, uuid.uuid4().hex[:12] + "\n")
        seconds = max(1, math.ceil(timeout_s))
        self._run = wandb.init(
            project=project, name=config.name, id=files.read(id_file, 64).decode(errors="replace").strip(), dir=run_dir, mode=mode,
            group=config.launch.wandb_group or None,
            resume="allow", config=settings_of(config), job_type="train",
            settings=wandb.Settings(init_timeout=seconds, login_timeout=seconds, finish_timeout=seconds, console="off", quiet=True,
                                    **WITHOUT),
        )  # fmt: skip
        # Steps that a restart repeats would be refused on W&B's own counter: the record's step is the axis.
        self._run.define_metric("*", step_metric="step")
        for name, summary in SUMMARIES.items():
            self._run.define_metric(name, step_metric="step", summary=summary)

    def _write(self, record):
        self._run.log(wandb_values(record))

    def alert(self, title: str, text: str) -> None:
        """As W&B sends it on: by mail, or to Slack."""
        if self._run is not None:
            self._guard(lambda: self._run.alert(title=title, text=text))

    def _close(self):
        if self._run is None:
            return
        try:
            self._refer()
        except Exception as error:  # what was recorded is there without it
            print(f"W&B has no references to this run's files ({type(error).__name__}: {error})", file=sys.stderr)
        self._run.finish()

    def _refer(self) -> None:
        """An artifact that says where the run's files are; none is sent."""
        import wandb

        artifact = wandb.Artifact(f"run-{self._run.id}", type="run", description="where this run's files are; they stay there")
        for name in FILES:
            if (path := self._run_dir / name).exists():
                artifact.add_reference(path.resolve().as_uri(), name=name, checksum=False)
        self._run.log_artifact(artifact)


def settings_of(config: Config) -> dict[str, Any]:
    """Sections of sections, by which W&B compares and filters runs; of environment variables the names only: one may hold a secret."""
    tree = yaml.safe_load(to_yaml(config))
    for part in (tree, *tree.get("phases", {}).values()):
        if env := part.get("cluster", {}).get("env"):
            part["cluster"]["env"] = sorted(env)
    return tree


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
        "memory/peak_gb": r.memory_gb, "session": r.session, "speed/data_seconds": r.data_seconds, "cost/gpu_hours": r.gpu_hours,
        "pipeline/bubble": r.bubble, "pipeline/exposed_seconds": r.exposed_seconds, "pipeline/hidden_share": r.hidden_share,
        "checkpoint/seconds": r.checkpoint_seconds,
        **{f"fp8/{name}": value for name, value in (r.fp8_sentinel or {}).items()},
        **{f"step/{part}": seconds for part, seconds in (r.breakdown or {}).items()},
    }  # fmt: skip
    return {name: value for name, value in values.items() if value is not None}
