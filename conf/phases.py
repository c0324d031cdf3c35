"""How a run unfolds: its phases, each with its steps, its batches and its place in the data, from the configuration alone.

    phase     steps                                    batch
    ramp      |2k, 2k, 2k|4k, 4k|6k|8k, 8k ...         grows by equal increments over the first `train.ramp.tokens`
    constant  |8k, 8k, 8k ...                          `train.global_batch_tokens`
A run that names no phases is one phase.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from .schema import Config, TrainConfig


@dataclass(frozen=True, kw_only=True)
class Level:
    """`num_steps` steps of one batch size, from step `first_step` of the phase on."""

    first_step: int
    num_steps: int
    batch_tokens: int


@dataclass(frozen=True, kw_only=True)
class Phase:
    """`config` is complete and has no phases. Phases that read the same data at the same sequence length share a stream of samples."""

    name: str
    config: Config
    first_step: int  # of the run
    levels: tuple[Level, ...]
    stream: int  # number of the stream

    @property
    def num_steps(self) -> int:
        return sum(level.num_steps for level in self.levels)

    @property
    def end_step(self) -> int:
        """Steps of the run when this phase is over."""
        return self.first_step + self.num_steps

    @property
    def num_tokens(self) -> int:
        return sum(level.num_steps * level.batch_tokens for level in self.levels)

    def batch_tokens(self, step: int) -> int:
        """Of step `step` of the run (0 is the first); of the phase's last for any later one."""
        begun = [level for level in self.levels if level.first_step <= step - self.first_step]
        return (begun or self.levels)[-1 if begun else 0].batch_tokens

    def micro_batches(self, batch_tokens: int) -> int:
        """Of each pipeline, for a batch of this size."""
        c = self.config
        return batch_tokens // (c.data.seq_len * c.parallel.dp * c.train.micro_batch_sequences)


def phases(config: Config) -> tuple[Phase, ...]:
    """The phases of a run, in order."""
    configs = config.phases or {"main": config}
    made: list[Phase] = []
    for name, phase in configs.items():
        before = made[-1] if made else None
        made.append(
            Phase(
                name=name,
                config=phase,
                first_step=before.end_step if before else 0,
                levels=tuple(levels(phase.train)),
                stream=0 if not before else before.stream + (before.config.data != phase.data),
            )
        )
    return tuple(made)


def num_steps(config: Config) -> int:
    return phases(config)[-1].end_step


def num_tokens(config: Config) -> int:
    return sum(phase.num_tokens for phase in phases(config))


def phase_at(config: Config, step: int) -> Phase:
    """The phase that step `step` (0 is the first) belongs to; the last one for a finished run."""
    made = phases(config)
    return next((phase for phase in made if step < phase.end_step), made[-1])


def levels(train: TrainConfig) -> Iterator[Level]:
    """The steps of a phase, by batch size. Its last step may pass its length in tokens."""
    step = done = 0
    for end, batch in _sizes(train):
        num = -(-(end - done) // batch) if end is not None else train.steps - step
        if train.tokens:
            num = min(num, -(-(train.tokens - done) // batch))
        else:
            num = min(num, train.steps - step)
        if num > 0:
            yield Level(first_step=step, num_steps=num, batch_tokens=batch)
            step, done = step + num, done + num * batch


def _sizes(train: TrainConfig) -> Iterator[tuple[int | None, int]]:
    """(tokens of the phase after which it ends, None: the phase's own end; batch size)."""
    ramp, full = train.ramp, train.global_batch_tokens
    if ramp.tokens:
        count = (full - ramp.start_tokens) // ramp.increment_tokens
        for k in range(count):
            yield -(-ramp.tokens * (k + 1) // count), ramp.start_tokens + k * ramp.increment_tokens
    yield train.tokens or None, full
