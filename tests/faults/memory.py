"""Faults of memory, on purpose: bits of a rank's weights, gradients and moments that change by themselves, and experts nobody goes to."""

import math
import random
from collections.abc import Callable, Sequence

import torch
from shoestring.train.engine import Engine
from shoestring.train.step import Watch
from torch import Tensor


class Looking(Watch):
    """Gives faults the engine. In a step of `starved`, no token goes to the experts of a rank, whoever sends it."""

    def __init__(self, starved: dict[int, tuple[int, int]]):
        """`starved`: by step (1 is the first), a rank, and the number of ranks that share the experts."""
        self.engine: Engine | None = None
        self._starved = starved

    def begun(self, engine: Engine) -> None:
        self.engine = engine

    def routing(self, step: int, samples: Sequence[int]) -> Callable | None:
        if step + 1 not in self._starved:
            return None
        rank, ep = self._starved[step + 1]

        def choose(layer, select, score_TE):
            away_E = torch.zeros(score_TE.shape[1], dtype=score_TE.dtype)
            away_E.view(ep, -1)[rank % ep] = 10.0  # below any score
            return select(score_TE - away_E)

        return choose


# Each tells whether there was something to harm.


def nan(engine: Engine, rng: random.Random) -> bool:
    """In a gradient that backward has begun to add up."""
    if not (begun := _begun(engine)):
        return False
    grad = rng.choice(begun)
    grad[rng.randrange(len(grad))] = math.nan
    return True


def flip_gradient(engine: Engine, rng: random.Random) -> bool:
    """A bit in the upper half of the mantissa of a gradient that backward has begun to add up: far too small for the norm to show."""
    if not (begun := _begun(engine)):
        return False
    grad = rng.choice(begun)
    _flip(grad, int(grad.abs().argmax()), rng.randrange(12, 20))
    return True


def _begun(engine: Engine) -> list[Tensor]:
    return [grad.view(-1) for grad in engine.optimizer.main_grad.values() if grad.any()]


def flip_weight(engine: Engine, rng: random.Random) -> bool:
    """Any bit."""
    weight = rng.choice(list(engine.parameters().values())).detach().view(-1)
    _flip(weight, rng.randrange(len(weight)), rng.randrange(8 * weight.element_size()))
    return True


def flip_state(engine: Engine, rng: random.Random) -> bool:
    """Any bit, of a moment."""
    moments = [chunk.data for name, chunk in engine.chunks(saving=True).items() if ".exp_avg" in name and chunk.data.numel()]
    moment = rng.choice(moments).view(-1)
    _flip(moment, rng.randrange(len(moment)), rng.randrange(8 * moment.element_size()))
    return True


def _flip(flat: Tensor, index: int, bit: int) -> None:
    flat.view(torch.uint8)[index * flat.element_size() + bit // 8] ^= 1 << bit % 8  # little-endian


KINDS: dict[str, Callable[[Engine, random.Random], bool]] = {
    "nan": nan, "flip_gradient": flip_gradient, "flip_weight": flip_weight, "flip_state": flip_state,
}  # fmt: skip
MID_BACKWARD = ("nan", "flip_gradient")
