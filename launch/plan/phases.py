"""A run phase by phase: the steps of each, at its batches, its sequence length and its layout, which may have to be another than the
run's."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...conf.errors import ConfigError, divisors
from ...conf.phases import Level, levels
from ...conf.rules import get, replaced
from ...conf.schema import Config
from ..simulate import Interval, Recorded, RunEstimate, StepEstimate, project_run, project_step
from .layouts import RECOMPUTE, Layout
from .request import BATCH
from .search import check_all, fullest_rank, must_fit

ENDS = ("low", "likely", "high")


@dataclass(frozen=True, kw_only=True)
class PhasePlan:
    """`step`: of the phase's full batch. `memory_gb`: of the fullest rank at even loads (1e9 bytes). `words`: what the phase has to say
    beside the run's, so that it runs as priced; `notes`: why, and what is wrong with it still."""

    name: str
    config: Config
    num_steps: int
    step: StepEstimate
    run: RunEstimate
    memory_gb: float
    words: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def layout(self) -> Layout:
        return Layout.of(self.config)

    def to_plain(self) -> dict[str, Any]:
        run = self.run
        return {
            "name": self.name,
            "layout": str(self.layout),
            "gpus": run.gpus,
            "steps": self.num_steps,
            "tokens": run.tokens,
            "seq_len": self.config.data.seq_len,
            "global_batch_tokens": self.step.tokens,
            "step_seconds": self.step.expected.likely,
            "gpu_hours": run.gpu_hours.likely,
            "gpu_hours_interval": [run.gpu_hours.low, run.gpu_hours.high],
            "days": run.days.likely,
            "dollars": run.dollars.likely,
            "memory_gb_peak": self.memory_gb,
            "notes": list(self.notes),
        }


def price_phases(phases: Mapping[str, Config], *, adapt: bool, recorded: Recorded | None = None) -> list[PhasePlan]:
    """`adapt`: where memory is not enough, a phase takes what needs less. Raises ConfigError where no layout of a phase's kind is valid."""
    made: dict[str, StepEstimate] = {}

    def step_of(config: Config) -> StepEstimate:
        """Phases that differ in how they learn take the same time."""
        t, o = config.train, config.optim
        key = config.model, config.parallel, config.data.seq_len, t.global_batch_tokens, t.micro_batch_sequences, t.recompute
        key = repr((*key, o.engine, o.algorithm, o.moments, o.offload))
        if key not in made:
            made[key] = project_step(config, recorded=recorded)
        return made[key]

    return [_price(name, config, adapt, step_of) for name, config in phases.items()]


def with_layout(run: Config, phase: Config, layout: Layout) -> Config:
    """The phase, in a run of that layout: what it changes itself stays."""
    for key, value in layout.settings.items():
        if get(phase, key) == get(run, key):
            phase = replaced(phase, key, value)
    return phase


def _price(name: str, wanted: Config, adapt: bool, step_of: Callable[[Config], StepEstimate]) -> PhasePlan:
    config, notes = _valid(wanted)
    if adapt:
        config = _fitting(config)
    if (needs := fullest_rank(config, must_fit(config)).total / 1e9) > config.cluster.memory_gb:
        notes.append(f"does not fit: {needs:.1f} GB, at imbalance {must_fit(config):g}, of {config.cluster.memory_gb:g}")
    stages = list(levels(config.train))
    full = step_of(config)
    seconds = _by_batch([*(step_of(replaced(config, BATCH, size)) for size in _samples(stages, full.tokens)), full])
    each = [(level.num_steps, seconds(level.batch_tokens)) for level in stages]
    total = Interval(**{end: sum(num * getattr(interval, end) for num, interval in each) for end in ENDS})
    before = Layout.of(wanted).settings
    changed = [word for word, key in zip(Layout.of(config).words, before) if before[key] != get(config, key)]
    return PhasePlan(
        name=name, config=config, num_steps=sum(level.num_steps for level in stages), step=full, notes=tuple(notes),
        run=project_run(config, full, sum(level.num_steps * level.batch_tokens for level in stages), seconds=total),
        memory_gb=fullest_rank(config, 1.0).total / 1e9, words=tuple(f"phases.{name}.{word}" for word in changed),
    )  # fmt: skip


# ---------------------------------------------------------------- batches that grow


def _samples(stages: Sequence[Level], full: int) -> list[int]:
    """Of a growing batch, the sizes that are simulated beside the full one: a step's time is nearly a line in its micro-batches."""
    sizes = sorted({level.batch_tokens for level in stages} - {full})
    return sorted({sizes[0], sizes[len(sizes) // 2]}) if sizes else []


def _by_batch(steps: Sequence[StepEstimate]) -> Callable[[int], Interval]:
    """Seconds of a step by its tokens, on straight lines between those of `steps`, which ascend."""

    def at(tokens: int) -> Interval:
        above = next(i for i, step in enumerate(steps) if step.tokens >= tokens)
        low, high = steps[max(0, above - 1)], steps[above]
        share = (tokens - low.tokens) / (high.tokens - low.tokens) if tokens < high.tokens else 1.0
        between = lambda end: (1 - share) * getattr(low.expected, end) + share * getattr(high.expected, end)
        return Interval(**{end: between(end) for end in ENDS})

    return at


# ---------------------------------------------------------------- a layout that runs


def _valid(config: Config) -> tuple[Config, list[str]]:
    """As it is, or with the least changed that all of the phase's steps obey the rules; and which rule it was."""
    first_error = None
    for changed in _plainer(config):
        tried = _set(config, changed)
        try:
            check_all(tried)
        except ConfigError as error:
            first_error = first_error or error
        else:
            changes = ", ".join(f"{key}={value or repr(value)}" for key, value in changed.items() if get(config, key) != value)
            return tried, [f"{first_error.field} = {first_error.value}: {first_error.rule}: priced with {changes}"] if first_error else []
    raise first_error


def _plainer(config: Config) -> Iterator[dict[str, object]]:
    """1F1B takes any number of micro-batches; fewer pipelines share out any number of sequences, on fewer devices."""
    p, plain = config.parallel, {"parallel.schedule": "1f1b", "parallel.chunks": 1, "parallel.stages": ""}
    yield {}
    yield plain
    for ep in reversed(divisors(p.ep)):
        for edp in range(p.edp, 0, -1):
            dispatcher = p.dispatcher if ep == p.ep else "auto"
            yield {**plain, "train.micro_batch_sequences": 1, "parallel.ep": ep, "parallel.edp": edp, "parallel.dispatcher": dispatcher}


def _fitting(config: Config) -> Config:
    """The first that fits, or the last."""
    one, again = {"train.micro_batch_sequences": 1}, {"train.recompute": RECOMPUTE[-1]}
    for changed in ({}, one, again, one | again):
        tried = _set(config, changed)
        if fullest_rank(tried, must_fit(tried)).total <= config.cluster.memory_gb * 1e9:
            break
    return tried


def _set(config: Config, values: dict[str, object]) -> Config:
    for key, value in values.items():
        config = replaced(config, key, value)
    return config
