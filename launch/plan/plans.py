"""A plan: one layout with its step, its run, its memory, as it stands in plan.json and in the tables. All of it is projected."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...conf import said
from ...conf.errors import ConfigError
from ...conf.schema import Config
from ...train import cost
from ...train.metrics import StepRecord, replace_file, to_plain
from ..simulate import Interval, RunEstimate, StepEstimate, in_all, project_run, project_step
from .layouts import Layout
from .phases import PhasePlan, price_phases, with_layout
from .request import Asked
from .search import fullest_rank

FORMAT = "shoestring plan 1"
IMBALANCES = (1.0, 1.5, 2.0)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """`words`: the command line's, from the model to the layout. `memory_gb`: of the fullest rank, by imbalance (1e9 bytes)."""

    layout: Layout
    config: Config
    words: tuple[str, ...]
    step: StepEstimate
    run: RunEstimate
    memory_gb: Mapping[float, float]
    peak_at: str
    main: str  # phase that `config`, `step` and speeds are of
    phases: tuple[PhasePlan, ...]  # of a run that has several, or a batch that grows; `run` is their sum
    notes: tuple[str, ...]

    def to_plain(self) -> dict[str, Any]:
        run, step, c = self.run, self.step, self.config
        ideal = cost.num_devices(c) * step.ideal / 3600 / step.tokens * 1e12
        return {
            "layout": str(self.layout),
            "words": list(self.words),
            "gpus": run.gpus,
            "tokens": run.tokens,
            "step_seconds": step.expected.likely,
            "step_seconds_interval": _pair(step.expected),
            "step_seconds_ideal": step.ideal,
            "tokens_per_second_per_gpu": run.tokens_per_second_per_gpu.likely,
            "gpu_hours_per_trillion_tokens": run.gpu_hours_per_trillion_tokens.likely,
            "gpu_hours_per_trillion_tokens_interval": _pair(run.gpu_hours_per_trillion_tokens),
            "gpu_hours_per_trillion_tokens_ideal": ideal,
            "dollars_total": run.dollars.likely,
            "dollars_total_interval": _pair(run.dollars),
            "dollars_per_trillion_tokens": run.dollars.likely / run.tokens * 1e12,
            "days": run.days.likely,
            "days_interval": _pair(run.days),
            "kwh": run.kwh.likely,
            "effective_time": run.effective,
            "gpu_hours_total": run.gpu_hours.likely,
            "main_phase": self.main,
            "phases": [phase.to_plain() for phase in self.phases],
            "mfu_causal": run.mfu.likely if run.mfu else None,
            "mfu_non_causal": run.mfu_full.likely if run.mfu_full else None,
            "peak_tflops": c.cluster.peak_tflops.get(c.precision.products),
            "bubble_seconds": step.parts["bubble"],
            "exposed_communication_seconds": step.parts["exposed communication"],
            "optimizer_seconds": step.parts["optimizer"],
            "memory_gb_peak": self.memory_gb[1.0],
            "memory_gb_by_imbalance": {f"{imbalance:g}": value for imbalance, value in self.memory_gb.items()},
            "memory_peak_at": self.peak_at,
            "breakdown": step.breakdown,
            "record": to_plain(record(self)),
            "terms": {name: {"low": t.low, "likely": t.likely, "high": t.high} for name, t in step.terms.items()},
        }


def record(plan: Plan) -> StepRecord:
    """The step as a run's metrics have it, to be laid over measured ones. What nobody can project is NaN, and written as null."""
    step, run, c, nan = plan.step, plan.run, plan.config, math.nan
    seconds, sequences = step.expected.likely, c.sequences_per_step
    speed = run.tokens_per_second_per_gpu.likely
    return StepRecord(
        step=1, tokens=step.tokens, samples=sequences, batch_tokens=step.tokens, seq_len=c.data.seq_len, loss=nan, lr=c.optim.lr,
        grad_norm=nan, clip_coef=nan, step_seconds=seconds, tokens_per_second=speed * run.gpus, tokens_per_second_per_gpu=speed,
        mfu=run.mfu.likely if run.mfu else None, seconds=seconds, dollars=cost.dollars(seconds, run.gpus, c.cluster),
        dollars_per_billion_tokens=run.dollars.likely / run.tokens * 1e9, eta_seconds=run.days.likely * 86400,
        bubble=step.parts["bubble"] / step.ideal, exposed_seconds=step.parts["exposed communication"], memory_gb=plan.memory_gb[1.0],
        time_unix=nan,
    )  # fmt: skip


def _pair(interval: Interval) -> list[float]:
    return [interval.low, interval.high]


def planned(asked: Asked, layout: Layout, config: Config) -> Plan:
    """With all terms, where a search had the ideal step alone; and with all phases. `config`: of the main one. Raises ConfigError."""
    phases = price_phases(_stretches(asked, layout, config), adapt=asked.request.search, recorded=asked.recorded)
    main = next((phase for phase in phases if phase.name == asked.main), None)
    step = main.step if main else project_step(config, recorded=asked.recorded)
    fullest = {imbalance: fullest_rank(config, imbalance) for imbalance in IMBALANCES}
    return Plan(
        layout=layout,
        config=config,
        words=(*asked.words_of(layout, config), *(word for phase in phases for word in phase.words)),
        step=step,
        run=in_all([phase.run for phase in phases], main.run) if main else project_run(config, step, asked.tokens),
        memory_gb={imbalance: found.total / 1e9 for imbalance, found in fullest.items()},
        peak_at=fullest[1.0].peak_at,
        main=asked.main,
        phases=tuple(phases),
        notes=tuple(f"phase {phase.name}: {note}" for phase in phases for note in phase.notes),
    )


def _stretches(asked: Asked, layout: Layout, config: Config) -> dict[str, Config]:
    """None where all steps are alike."""
    if len(asked.phases) > 1:
        return {phase.name: with_layout(asked.run, phase.config, layout) for phase in asked.phases}
    return {asked.main: config} if asked.phases and config.train.ramp.tokens else {}


def write(path: Path, plans: Sequence[Plan], request: Mapping[str, Any], notes: Sequence[str]) -> None:
    content = {"format": FORMAT, "projected": True, "request": dict(request), "notes": list(notes), "plans": [p.to_plain() for p in plans]}
    replace_file(path, json.dumps(content, indent=1) + "\n")


def read_words(path: Path, number: int = 1) -> list[str]:
    """The command line of plan `number` of a file (1 is the best). Raises ConfigError for a file that is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        words = [plan["words"] for plan in content["plans"]] if content["format"] == FORMAT else None
    except OSError as error:
        raise ConfigError("plan", str(path), f"cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        words = None
    if words is None or not all(isinstance(plan, list) and all(isinstance(word, str) for word in plan) for plan in words):
        raise ConfigError("plan", str(path), "is no file that `shoestring plan ... output=FILE` wrote")
    if not 1 <= number <= len(words):
        raise ConfigError("number", number, f"{path} has {len(words)} plans", min(max(number, 1), len(words)) or None)
    for word in words[number - 1]:
        if said.is_one(word.partition("=")[0].lstrip("+~")):
            raise ConfigError("plan", str(path), f"has {word.partition('=')[0]}, which a file cannot say for you: type it")
    return words[number - 1]


def launch_words(words: Sequence[str]) -> list[str]:
    """Of a run that may be a plan's: those of its file, then the others. Raises ConfigError."""
    own = {key: value for key, equals, value in (word.partition("=") for word in words) if key in ("plan", "number")}
    if "plan" not in own:
        if "number" in own:
            raise ConfigError("number", own["number"], "is that of a plan in a file: plan=plan.json must be given with it")
        return list(words)
    if not own.get("number", "1").isdecimal():
        raise ConfigError("number", own["number"], "must be a whole number: 1 is the best plan", 1)
    others = [word for word in words if word.partition("=")[0] not in own]
    return [*read_words(Path(own["plan"]), int(own.get("number", "1"))), *others]
