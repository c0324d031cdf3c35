"""Weights & Biases: one run there for one run directory, however often it is started again."""

import math
import sys
import uuid
from pathlib import Path
from typing import Any

from ...conf.compose import to_yaml
from ...conf.schema import Config
from .. import metrics
from ..metrics import StepRecord
from .sink import Sink


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
