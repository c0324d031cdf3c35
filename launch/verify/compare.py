"""Two sessions side by side: where they deviate most, and by how much of what their precision allows.

The limits are derived in docs/verify.md. A gradient or a moment is measured matrix by matrix, each expert's on its own: the length of the
difference over the length of the reference. A weight is measured by the way that it has gone since the first step, a number by itself.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .evidence import Evidence, Step

# Below these shares of a tensor's typical unit, and of the typical tensor, a length is no measure of the rounding behind it: the gradient
# of a gate whose weights are constant is zero, and what is left is noise.
UNIT_FLOOR, TENSOR_FLOOR = 1e-3, 1e-4


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Relative, all of them. `drift`: what each step adds, whose weights are not exactly those of the reference any more. `tie`: scores
    nearer to each other than this may be ordered either way."""

    number: float
    gradient: float
    moment: float
    update: float
    drift: float
    tie: float

    def of(self, name: str, step: int) -> float:
        """Of a tensor, or of a number, in step `step` (1 is the first)."""
        drift = self.drift * (step - 1)
        tensors = {
            "grad": self.gradient + drift, "exp_avg": self.moment + drift, "exp_avg_sq": 2 * (self.moment + drift),  # a square
            "master": self.update, "ema": 10 * self.update,  # an average goes a tenth of the way
        }  # fmt: skip
        return tensors.get(name.rpartition(".")[2], self.number + drift / 4)


LIMITS = {
    "fp64": Limits(number=1e-11, gradient=1e-10, moment=1e-10, update=1e-7, drift=0.0, tie=1e-12),
    "fp32": Limits(number=2e-6, gradient=1e-5, moment=1e-5, update=2e-3, drift=2e-5, tie=1e-5),
    # BF16 is part of the algorithm: moments that are kept in it, and Muon's orthogonalisation, which is computed in it
    "fp32 with bf16 inside": Limits(number=2e-6, gradient=1e-5, moment=5e-3, update=0.2, drift=3e-3, tie=1e-5),
    "bf16": Limits(number=1e-3, gradient=2e-2, moment=2e-2, update=0.7, drift=0.1, tie=2e-2),
    "fp8": Limits(number=1e-3, gradient=0.1, moment=0.1, update=0.9, drift=1.0, tie=0.1),
}


@dataclass(frozen=True, kw_only=True)
class Deviation:
    """`value` is relative, except of counts, where it is their number. A fault has the limit 0."""

    quantity: str
    where: str
    value: float
    limit: float

    @property
    def share(self) -> float:
        """Of the limit; above 1 it is broken."""
        if math.isnan(self.value):
            return math.inf
        return self.value / self.limit if self.limit else math.inf if self.value else 0.0

    @property
    def passed(self) -> bool:
        return self.share <= 1

    def __str__(self) -> str:
        bound = f"limit {self.limit:.0e}" if self.limit else "must be equal"
        value = f"{self.value:.0f}" if not self.limit and self.value.is_integer() else f"{self.value:.1e}"
        return f"{self.quantity} of {self.where}: {value} ({bound})"


def worst(deviations: list[Deviation]) -> Deviation:
    return max(deviations, key=lambda d: d.share)


def compare(got: Evidence, want: Evidence, limits: Limits, num_experts: int, first_step: int = 1) -> Iterator[Deviation]:
    """Of every step that both have, numbered from `first_step` on, up to the first whose tokens chose other experts."""
    for fault in got.faults:
        yield Deviation(quantity="fault", where=fault, value=math.inf, limit=0.0)
    if len(got.steps) != len(want.steps):
        yield Deviation(quantity="fault", where=f"{len(got.steps)} steps were taken, not {len(want.steps)}", value=math.inf, limit=0.0)
    yield from _equal("first weight", got.first, want.first, "before the first step")
    for number, (mine, theirs) in enumerate(zip(got.steps, want.steps), first_step):
        chosen = list(_choices(mine, theirs, number))
        yield from chosen
        yield from _numbers(mine, theirs, number, limits)
        yield from _loads(mine, theirs, number)
        yield from _tensors(mine, theirs, number, got, want, limits, num_experts)
        if chosen:
            return


def _choices(got: Step, want: Step, step: int) -> Iterator[Deviation]:
    for layer in sorted(got.choices.keys() & want.choices.keys()):
        other_NS = (got.choices[layer] != want.choices[layer]).any(-1)
        if other_NS.any():
            yield Deviation(quantity="choice of experts", where=f"layer {layer}, step {step}", value=float(other_NS.sum()), limit=0.0)


def near_ties(got: Evidence, want: Evidence, limits: Limits) -> list[str] | None:
    """Where tokens chose other experts in the first step that differs, if each of them stood between scores that rounding can swap and
    no earlier layer had decided already; else None."""
    for number, (mine, theirs) in enumerate(zip(got.steps, want.steps), 1):
        for layer in sorted(mine.choices.keys() & theirs.choices.keys()):
            other_NS = (mine.choices[layer] != theirs.choices[layer]).any(-1)
            if other_NS.any():
                margins = theirs.margins[layer][other_NS] if layer in theirs.margins else torch.full((1,), math.inf)
                if margins.max() > limits.tie:
                    return None
                where = f"step {number}, layer {layer}"
                places = zip(other_NS.nonzero().tolist(), margins.tolist())
                return [f"{where}, sample {n}, token {s}: {margin:.0e} apart" for (n, s), margin in places]
    return None


def _numbers(got: Step, want: Step, step: int, limits: Limits) -> Iterator[Deviation]:
    for name in got.numbers.keys() & want.numbers.keys():
        mine, theirs = got.numbers[name], want.numbers[name]
        value = abs(mine - theirs) / max(abs(theirs), 1e-12) if mine != theirs else 0.0
        yield Deviation(quantity=name, where=f"step {step}", value=value, limit=limits.of(name, step))


def _loads(got: Step, want: Step, step: int) -> Iterator[Deviation]:
    for row, (mine, theirs) in enumerate(zip(got.loads_LE, want.loads_LE)):
        count = (mine - theirs).abs().sum().item()
        yield Deviation(quantity="expert load", where=f"MoE layer {row}, step {step}", value=float(count), limit=0.0)


def _tensors(got: Step, want: Step, step: int, mine: Evidence, theirs: Evidence, limits: Limits, num_experts: int) -> Iterator[Deviation]:
    grads = [t for name, t in want.tensors.items() if name.endswith(".grad")]
    typical = torch.stack([t.double().norm() for t in grads]).square().mean().sqrt().item() if grads else 0.0
    for name in sorted(got.tensors.keys() | want.tensors.keys()):
        if name not in got.tensors or name not in want.tensors:
            if mine.complete and name in want.tensors:
                yield Deviation(quantity=kind_of(name), where=f"{name}, step {step}: nobody has it", value=math.inf, limit=0.0)
            continue
        a, b = got.tensors[name].double(), want.tensors[name].double()
        floor = TENSOR_FLOOR * typical if name.endswith(".grad") else 0.0
        if name.endswith((".master", ".ema")):
            begun = name.rpartition(".")[0] + ".master"
            a, b = a - mine.first[begun].double(), b - theirs.first[begun].double()
        units = num_experts if ".experts." in name else 1
        lengths = b.view(units, -1).norm(dim=1)
        usual = lengths.square().mean().sqrt().item()
        differences = (a - b).view(units, -1)
        values = differences.norm(dim=1) / lengths.clamp(min=max(UNIT_FLOOR * usual, floor, 1e-30))
        unit = int(values.nan_to_num(math.inf).argmax())
        yield Deviation(
            quantity=kind_of(name),
            where=_place(name, unit, units, differences[unit].abs(), step, mine),
            value=values[unit].item(),
            limit=limits.of(name, step),
        )


def kind_of(name: str) -> str:
    kinds = {"grad": "gradient", "master": "weight", "ema": "average", "exp_avg": "first moment", "exp_avg_sq": "second moment"}
    return kinds.get(name.rpartition(".")[2], "selection bias")


def _place(name: str, unit: int, units: int, difference: Tensor, step: int, evidence: Evidence) -> str:
    """Parameter, expert, the rank that owns the element that is furthest off, step."""
    at = unit * difference.numel() + int(difference.nan_to_num(math.inf).argmax())
    rank = next((rank for begin, end, rank in evidence.owners.get(name, ()) if begin <= at < end), None)
    expert = f" of expert {unit}" if units > 1 else ""
    return f"{name.rpartition('.')[0]}{expert}, step {step}" + (f", rank {rank}" if rank is not None else "")


def _equal(quantity: str, got: Mapping[str, Tensor], want: Mapping[str, Tensor], when: str) -> Iterator[Deviation]:
    """Bit for bit, as far as both have them."""
    for name in got.keys() & want.keys():
        a, b = got[name].double(), want[name].double()
        off = (a != b) & ~(a.isnan() & b.isnan())  # an average that has not begun
        if off.any():
            value = ((a - b).norm() / b.norm().clamp(min=1e-30)).item()
            yield Deviation(quantity=quantity, where=f"{name} {when} ({int(off.sum())} elements)", value=value, limit=0.0)


def resumed(got: Evidence, want: Step, when: str) -> Iterator[Deviation]:
    """What a session began with, against the state after the step that it went on from: bit for bit."""
    state = {name: t for name, t in want.tensors.items() if not name.endswith(".grad")}
    missing = [name for name in state if name not in got.first]
    for name in missing:
        yield Deviation(quantity="resumed state", where=f"{name} {when}: nobody has it", value=math.inf, limit=0.0)
    yield from _equal("resumed state", got.first, state, when)
