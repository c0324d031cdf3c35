"""What every sharded optimizer promises: sums over replica groups, one global norm, one clip, and state that reshards.

Each element of each parameter has exactly one owner in the world. Scale, norm and clip are written once, here, over the pieces a
rank owns; `state()` hands the same pieces to the checkpoint. So "counted once" and "saved once" are one fact.

    backward adds into main_grad -> reduce(stage) ... -> norm(scale) -> step(norm, lr)
"""

import logging
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...conf.schema import OptimConfig
from .._torch import foreach_mul_, foreach_norm
from ..transport import UNHEARD
from .average import Average

log = logging.getLogger(__name__)

# Plain FP32 norms of long vectors on CPU lose the small terms: -2.3e-4 relative at 8 M elements, -3e-8 in rows of this length.
NORM_ROW = 16384


@dataclass(frozen=True, kw_only=True)
class Spec:
    """One local parameter: whole, or (experts) this rank's slab of it."""

    name: str  # global: the same on every layout, such as "layers.3.experts.down"
    param: nn.Parameter  # contiguous; FP32, BF16, or FP64 for proofs
    group: dist.ProcessGroup  # its replica group: the ranks that hold these same elements
    numel: int  # of the whole parameter, all experts
    offset: int = 0  # where the local slab begins in the flattening of the whole parameter
    stage: int = 0  # pipeline stage that computes its gradient
    decay: bool = True  # weight decay applies (not to norms)
    # Muon: (rows, columns) of the matrices that a unit (the weight, or one expert's) holds, one after another; none: AdamW
    matrices: tuple[tuple[int, int], ...] = ()

    @property
    def unit(self) -> int:
        """Elements that may not be parted: one under AdamW, all of a unit's matrices under Muon."""
        return sum(rows * columns for rows, columns in self.matrices) or 1


@dataclass(frozen=True)
class Chunk:
    """This rank's 1-D piece of a flattened tensor of `numel` elements, from `offset` on. `data` is a live view."""

    numel: int
    offset: int
    data: Tensor


class ShardedOptimizer(ABC):
    """Backward adds into `main_grad[name]`, also found as `param.main_grad`: shaped like the parameter, FP32 (FP64 for FP64 weights).

    One step is `reduce` (of each stage once, in any order that all ranks share), `norm`, `step`. Another order is a RuntimeError.
    `waiting` may be set to what is to be entered while it waits for other ranks.
    """

    waiting: AbstractContextManager = UNHEARD

    def __init__(self, specs: Sequence[Spec], optim: OptimConfig):
        check(specs)
        self.specs = {s.name: s for s in specs}
        self.optim = optim
        self.steps = 0  # taken so far
        self.main_grad: dict[str, Tensor] = {}
        self._unreduced = self._stages = frozenset(s.stage for s in specs)
        self._scaled = False
        self._allocate(specs)
        masters = {name.removesuffix(".master"): c.data for name, c in self._state().items() if name.endswith(".master")}
        self._average = Average(masters, optim.ema_decay) if optim.ema_decay else None

    def reduce(self, stage: int | None = None) -> None:
        """Start the sums of one stage's main gradients over their replica groups (None: of all that remain). Does not wait.

        Nothing may be added to those gradients until `step` returned.
        """
        stages = self._unreduced if stage is None else frozenset([stage])
        if self._scaled or not stages <= self._unreduced:
            raise RuntimeError(f"reduce({stage}) in step {self.steps}: of stages {sorted(self._stages)}, {sorted(self._unreduced)} remain")
        if stages:
            self._unreduced -= stages
            with self.waiting:  # an engine may reduce at once
                self._start(stages)

    def norm(self, scale: float) -> Tensor:
        """Multiply the reduced gradients by `scale`, and the global norm of the result: a scalar tensor, equal on all ranks.

        Waits for the sums; one all-reduce of a scalar over the world; no host synchronisation.
        """
        if self._scaled or self._unreduced:
            raise RuntimeError(f"norm() in step {self.steps}: called twice, or stages {sorted(self._unreduced)} were not reduced")
        self._scaled = True
        grads = self._owned_grads()
        if grads:
            foreach_mul_(grads, scale)
        total = squared_norm(grads, self._device())
        dist.all_reduce(total)
        return total.sqrt().to(self._grad_dtype())

    @torch.no_grad()
    def step(self, norm: Tensor, lr: float) -> Tensor:
        """Clip to `optim.clip`, update the owned masters, publish the weights to every replica, zero the main gradients.

        Returns the clip coefficient, a scalar tensor. A norm that is not finite makes the weights so: look before you step.
        """
        if not self._scaled:
            raise RuntimeError(f"step() before norm() in step {self.steps}: gradients would be neither scaled nor clipped")
        coefficient = (self.optim.clip / (norm + 1e-6)).clamp(max=1.0)
        if grads := self._owned_grads():
            foreach_mul_(grads, coefficient.to(grads[0]))
        self.steps += 1
        if self._average:
            self._average.begin()
        self._update(lr)
        if self._average:
            self._average.update()
        self._unreduced, self._scaled = self._stages, False
        return coefficient

    @torch.no_grad()
    def discard(self) -> None:
        """In place of `step`, after `norm`, or of all that follows backward: main gradients to zero, all else as it was."""
        if self._scaled:
            self._owned_grads()
        elif self._unreduced != self._stages:
            raise RuntimeError(f"discard() before norm() in step {self.steps}: sums are still under way")
        self._clear()
        self._unreduced, self._scaled = self._stages, False

    def gradients(self) -> dict[str, Chunk]:
        """Owned pieces of the reduced and scaled gradients by parameter, between `norm` and `step`. Some may be copies: read only."""
        if not self._scaled:
            raise RuntimeError(f"gradients() before norm() in step {self.steps}: they are neither reduced nor scaled")
        return self._gradients()

    def state(self) -> dict[str, Chunk]:
        """Live owned pieces: "<name>.master", ".exp_avg" (Muon's momentum too), ".exp_avg_sq" (not under Muon), ".ema" (if there is one).

        The same keys before the first step as after it; an average that has not begun is NaN.
        """
        chunks = self._state()
        if self._average:
            masters = {name.removesuffix(".master"): c for name, c in chunks.items() if name.endswith(".master")}
            averages = self._average.read()
            chunks |= {f"{name}.ema": Chunk(c.numel, c.offset, averages[name]) for name, c in masters.items()}
        return chunks

    def at_rest(self) -> list[Tensor]:
        """Masters and moments, contiguous: what, beside weights, nothing changes but `step` and `load_state`."""
        return [chunk.data for chunk in self._state().values()]

    @torch.no_grad()
    def load_state(self, steps: int) -> None:
        """Take the pieces of `state()` as overwritten in place, after `steps` steps; publish the weights. Collective.

        Pieces that `may_lack` allows to be missing: see there what they start as.
        """
        self.steps = steps
        self._begin_moments()
        self._load()
        if self._average:
            self._average.begin(anew=True)

    def _begin_moments(self) -> None:
        """Where a second moment is missing (it is zero, as allocated, beside a first that is not), AdamW starts with neither.

        A first moment of hundreds of gradients over the second of one would make a step of any length. With both at zero steps are at
        most sqrt((1 - beta1)^2 / (1 - beta2) / (1 - beta1^2 / beta2)) learning rates long: 1.2 for (0.9, 0.95).
        """
        state, begun = self._state(), []
        for name, chunk in state.items():
            first = state[name.removesuffix("_sq")].data
            if name.endswith(".exp_avg_sq") and not chunk.data.any() and first.any():
                first.zero_()
                begun.append(name.removesuffix(".exp_avg_sq"))
        if begun:
            log.warning("no second moment in the checkpoint for %d weights (%s ...): AdamW starts anew there", len(begun), begun[0])

    @abstractmethod
    def _allocate(self, specs: Sequence[Spec]) -> None:
        """Masters, moments and `main_grad`."""

    @abstractmethod
    def _state(self) -> dict[str, Chunk]:
        """`state()` without averages."""

    @abstractmethod
    def _gradients(self) -> dict[str, Chunk]:
        """`gradients()`."""

    @abstractmethod
    def _load(self) -> None:
        """Publish the weights of masters that were overwritten, after step number `self.steps`."""

    @abstractmethod
    def _start(self, stages: frozenset[int]) -> None:
        """Start the sums of these stages."""

    @abstractmethod
    def _owned_grads(self) -> list[Tensor]:
        """1-D reduced gradients of the pieces this rank owns, each element once in the world. Waits."""

    @abstractmethod
    def _update(self, lr: float) -> None:
        """Step number `self.steps`: update owned masters, publish, zero the main gradients."""

    @abstractmethod
    def _clear(self) -> None:
        """Zero the main gradients."""

    def _device(self) -> torch.device:
        return next(iter(self.specs.values())).param.device

    def _grad_dtype(self) -> torch.dtype:
        return grad_dtype(next(iter(self.specs.values())).param.dtype)


def may_lack(name: str) -> bool:
    """Whether a checkpoint may lack this piece of state, or hold it for nobody: a run may change algorithm or begin an average.

    A missing average starts at the masters as loaded, a missing second moment at zero, and the first with it.
    """
    return name.endswith((".exp_avg_sq", ".ema"))


def grad_dtype(weights: torch.dtype) -> torch.dtype:
    """Of main gradients and masters: FP32, or FP64 under FP64 weights."""
    return torch.float64 if weights == torch.float64 else torch.float32


def squared_norm(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Sum of squares over 1-D tensors, an FP64 scalar: rows in the tensors' dtype, their sum in FP64."""
    cut = [len(t) // NORM_ROW * NORM_ROW for t in tensors]
    tails = [t[n:] for t, n in zip(tensors, cut) if n < len(t)]
    norms = list(foreach_norm(tails)) if tails else []
    norms += [torch.linalg.vector_norm(t[:n].view(-1, NORM_ROW), dim=1) for t, n in zip(tensors, cut) if n]
    if not norms:
        return torch.zeros((), dtype=torch.float64, device=device)
    return torch.cat([n.double().view(-1) for n in norms]).square().sum().to(device)


def in_collective_order(buckets: dict[tuple, list[Spec]]) -> list[tuple]:
    """The keys of `buckets` (lists of specs of one group each) by the group's ranks, then by the first parameter's name.

    Ranks that belong to several groups (a parameter tied across stages has one of its own) then meet them in one global order,
    whatever order their specs came in: no ring of ranks can wait for one another.
    """
    return sorted(buckets, key=lambda key: (dist.get_process_group_ranks(buckets[key][0].group), buckets[key][0].name))


def check(specs: Sequence[Spec]) -> None:
    """Raises ValueError for specs that no engine could own exactly once."""
    if not specs:
        raise ValueError("an optimizer needs at least one parameter on every rank")
    if twice := [name for name, n in Counter(s.name for s in specs).items() if n > 1]:
        raise ValueError(f"parameters named twice: {', '.join(twice)}")
    for s in specs:
        if s.param.dtype not in (torch.float32, torch.bfloat16, torch.float64):
            raise ValueError(f"{s.name}: weights of {s.param.dtype}; float32, bfloat16 or float64 are possible")
        if not s.param.is_contiguous():
            raise ValueError(f"{s.name}: weights must be contiguous, strides are {s.param.stride()}")
        if not 0 <= s.offset <= s.offset + s.param.numel() <= s.numel:
            raise ValueError(f"{s.name}: a slab of {s.param.numel()} at {s.offset} does not fit into {s.numel} elements")
        if s.unit < 1 or s.param.numel() % s.unit or s.offset % s.unit:
            raise ValueError(f"{s.name}: slab of {s.param.numel()} at {s.offset} is not made of units of {s.unit}")
    if len({s.param.device for s in specs}) > 1 or len({grad_dtype(s.param.dtype) for s in specs}) > 1:
        kinds = sorted({f"{s.param.device}/{s.param.dtype}" for s in specs})
        raise ValueError(f"one optimizer wants one device, and FP64 weights on their own: {', '.join(kinds)}")
