"""A training step as seen from outside: what it gives, and who may look on while it runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..parallel.dispatch import Dispatcher

Beat = Callable[..., None]  # (phase, step): this rank begins a phase ("": goes on in it) of step `step` (1 is the first; None: the same)


def silent(phase: str, step: int | None = None) -> None:
    """A `Beat` that nobody hears."""


@dataclass(frozen=True, kw_only=True)
class StepResult:
    """The job's step, equal on all ranks. Loads: (MoE layers, experts), int64, of the global batch."""

    loss: float  # mean over tokens
    mtp_losses: list[float]  # of each prediction module, likewise, before their weight
    tokens: int
    grad_norm: float
    clip_coef: float
    balance_loss: float  # as added to the loss: coefficient included, summed over layers
    z_loss: float
    router_entropy: float  # of the normalised scores, nats, mean over tokens and layers; 0 where there is no router
    loads: Tensor
    rank_overload: list[float]  # of each MoE layer: the busiest expert-parallel rank's load over the mean
    bias_norm: float
    flags: Tensor  # sums over ranks of the caller's `flags`


@dataclass(frozen=True, kw_only=True)
class Totals:
    losses: list[float]
    tokens: int
    router_sums: list[float]
    flags: Tensor
    loads: Tensor


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """Of one step, summed, scaled and not applied yet; all alike on all ranks but the gradients themselves, which are the optimizer's."""

    loss: float
    grad_norm: float
    norm: Tensor
    totals: Totals

    @property
    def flags(self) -> Tensor:
        return self.totals.flags


@dataclass(frozen=True, kw_only=True)
class Blame:
    """Of one rank: weights whose gradients are not finite, and micro-batches whose loss is not (known where they end)."""

    weights: list[str]
    micro_batches: list[int]

    def sentence(self, samples: Sequence[Sequence[int]]) -> str:
        """`samples`: of each micro-batch."""
        layers = sorted({int(name.split(".")[1]) for name in self.weights if name.startswith("layers.")})
        where = []
        if self.weights:
            more = f" and {len(self.weights) - 1} more" if len(self.weights) > 1 else ""
            where.append(f"gradients of {self.weights[0]}{more}" + (f", layers {layers[0]} to {layers[-1]}" if len(layers) > 1 else ""))
        if self.micro_batches:
            where.append(f"the loss of samples {', '.join(str(n) for i in self.micro_batches for n in samples[i])}")
        return "; ".join(where)


class Watch:
    """Looks on at each step, and may decide which experts tokens go to, and by what way: for proofs. This one decides nothing.

    `engine`: this rank's `Engine`.
    """

    def routing(self, step: int, samples: Sequence[int]) -> Callable[..., Tensor] | None:
        """`MicroBatch.choose` of the micro-batch that holds these samples of the stream, in step `step` of the run (0 is the first)."""
        return None

    def dispatcher(self, made: Dispatcher) -> Dispatcher:
        """What takes its place."""
        return made

    def begun(self, engine: Any) -> None:
        """Weights are as initialised, or as loaded."""

    def reduced(self, engine: Any, norm: Tensor) -> None:
        """`engine.optimizer.gradients()` are whole, and not clipped yet."""

    def stepped(self, engine: Any, result: StepResult) -> None:
        """Weights, moments and biases are those after the step."""
