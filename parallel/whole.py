"""Engine `whole`, the default: flat buffers cut into one contiguous range per owner, reduced and published in place.

One buffer per (replica group, stage, dtype). Parameters and main gradients are views of it, so nothing is ever copied together:

    weights [ w1 ........ | w2 ........ | norm | padding ]
             <- owner 0 -> <- owner 1 -> <- owner 2 ---->        a piece is the part of one parameter inside one owner's range

Where every unit is one element the cut is even (ZeRO-1). Where units are matrices it falls between them, balanced over the stages.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from ._torch import adamw, all_gather, reduce_scatter
from .zero import AdamW, Chunk, ShardedOptimizer, Spec, grad_dtype, in_collective_order

ALIGNMENT = 64  # elements: each owner's range of an even cut starts on a cache line


@dataclass(frozen=True)
class _Buffer:
    group: dist.ProcessGroup
    stage: int
    weights: Tensor  # (N,) in the parameters' dtype
    grads: Tensor  # (N,) FP32 or FP64
    cuts: list[int]  # owner r holds [cuts[r], cuts[r + 1])
    even: bool  # all ranges are equally long
    master: Tensor  # this rank's range; a view of `weights` where the dtype allows it

    def range_of(self, rank: int) -> slice:
        return slice(self.cuts[rank], self.cuts[rank + 1])

    @property
    def owned(self) -> slice:
        return self.range_of(dist.get_rank(self.group))


@dataclass(frozen=True)
class _Piece:
    """Part of one parameter that this rank owns; all tensors (n,), FP32 or FP64."""

    spec: Spec
    offset: int  # in the flattening of the whole parameter
    master: Tensor
    grad: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor


class WholeOptimizer(ShardedOptimizer):
    """AdamW over owned pieces (`ShardedOptimizer` has the contract).

    `in_one_call` sums an even buffer with one reduce-scatter and publishes it with one all-gather, instead of one reduce and one
    broadcast per owner. That is right for NCCL; gloo's reduce-scatter is an all-reduce of a copy, four times slower than what it replaces.
    None chooses by the device of the weights.
    """

    def __init__(self, specs: Sequence[Spec], hyper: AdamW, *, in_one_call: bool | None = None):
        super().__init__(specs, hyper)
        self._in_one_call = self._device().type != "cpu" if in_one_call is None else in_one_call
        self._pieces: list[_Piece] = []
        self._pending: list[dist.Work] = []
        keyed: dict[tuple, list[Spec]] = {}
        for s in specs:
            keyed.setdefault((s.group, s.stage, s.param.dtype, s.unit == 1), []).append(s)
        load: dict[dist.ProcessGroup, list[int]] = {}
        self._buffers = [self._add_buffer(keyed[k], load) for k in in_collective_order(keyed)]

    @torch.no_grad()
    def _add_buffer(self, specs: list[Spec], load: dict) -> _Buffer:
        first, even = specs[0], specs[0].unit == 1
        ranks, sizes = dist.get_world_size(first.group), [s.param.numel() for s in specs]
        if even:
            cuts = even_cuts(sum(sizes), ranks)
        else:
            cuts = unit_cuts([(s.param.numel(), s.unit) for s in specs], load.setdefault(first.group, [0] * ranks))
        weights = torch.zeros(cuts[-1], dtype=first.param.dtype, device=first.param.device)
        grads = torch.zeros_like(weights, dtype=grad_dtype(weights.dtype))
        starts = [0, *accumulate(sizes)]
        for s, low, high in zip(specs, starts, starts[1:]):
            weights[low:high].copy_(s.param.detach().view(-1))
            s.param.data = weights[low:high].view(s.param.shape)
            self.main_grad[s.name] = s.param.main_grad = grads[low:high].view(s.param.shape)
        owned = slice(*cuts[dist.get_rank(first.group) :][:2])
        master = weights[owned] if weights.dtype == grads.dtype else weights[owned].to(grads.dtype)
        self._add_pieces(specs, starts, owned, master, grads[owned])
        return _Buffer(first.group, first.stage, weights, grads, cuts, even, master)

    def _add_pieces(self, specs, starts, owned, master, grads) -> None:
        for s, start in zip(specs, starts):
            low, high = max(start, owned.start), min(start + s.param.numel(), owned.stop)
            if low < high:
                here = slice(low - owned.start, high - owned.start)
                moments = (torch.zeros_like(master[here]) for _ in range(2))
                self._pieces.append(_Piece(s, s.offset + low - start, master[here], grads[here], *moments))

    def _start(self, stages):
        for b in self._buffers:
            if b.stage in stages:
                if b.even and self._in_one_call:
                    self._pending.append(reduce_scatter(b.grads[b.owned], b.grads, group=b.group, async_op=True))
                else:
                    self._each_owner(b, b.grads, dist.reduce, "group_dst")

    def _each_owner(self, buffer: _Buffer, tensor: Tensor, collective, end: str) -> None:
        for rank in range(len(buffer.cuts) - 1):
            part = tensor[buffer.range_of(rank)]
            if len(part):
                self._pending.append(collective(part, group=buffer.group, async_op=True, **{end: rank}))

    def _wait(self):
        while self._pending:
            self._pending.pop().wait()

    def _owned_grads(self):
        self._wait()
        return [p.grad for p in self._pieces]

    def _update(self, lr):
        for decay in (True, False):
            pieces = [p for p in self._pieces if p.spec.decay == decay]
            if pieces:
                self._adamw(pieces, lr, self.hyper.weight_decay if decay else 0.0)
        self._publish()
        for b in self._buffers:
            b.grads.zero_()

    def _adamw(self, pieces: list[_Piece], lr: float, weight_decay: float) -> None:
        # The kernel counts the step itself, once per tensor. Filled on the device: no copy from the host to wait for.
        steps = torch.full((len(pieces),), self.steps - 1.0, device=self._device()).unbind()
        adamw(
            [p.master for p in pieces],
            [p.grad for p in pieces],
            [p.exp_avg for p in pieces],
            [p.exp_avg_sq for p in pieces],
            [],
            list(steps),
            fused=True,
            amsgrad=False,
            maximize=False,
            beta1=self.hyper.beta1,
            beta2=self.hyper.beta2,
            lr=lr,
            weight_decay=weight_decay,
            eps=self.hyper.eps,
        )

    def _publish(self) -> None:
        """Owned masters to every replica's weights."""
        for b in self._buffers:
            if b.master.dtype != b.weights.dtype:
                b.weights[b.owned].copy_(b.master)
            if b.even and self._in_one_call:
                self._pending.append(all_gather(b.weights, b.weights[b.owned], group=b.group, async_op=True))
            else:
                self._each_owner(b, b.weights, dist.broadcast, "group_src")
        self._wait()

    def state(self):
        return {
            f"{p.spec.name}.{key}": Chunk(p.spec.numel, p.offset, getattr(p, key))
            for p in self._pieces
            for key in ("master", "exp_avg", "exp_avg_sq")
        }

    @torch.no_grad()
    def load_state(self, steps):
        self.steps = steps
        self._publish()


def even_cuts(total: int, ranks: int) -> list[int]:
    """Borders (ranks + 1) of equal, aligned ranges that cover `total` elements; the last border says how long to pad."""
    share = -(-total // (ranks * ALIGNMENT)) * ALIGNMENT
    return [share * r for r in range(ranks + 1)]


def unit_cuts(runs: Sequence[tuple[int, int]], load: list[int]) -> list[int]:
    """Borders (ranks + 1) over `runs` of (elements, unit), none inside a unit, that even out what each rank owns.

    `load` is what each rank owns already, of earlier stages; it is brought up to date.
    """
    total, ranks = sum(n for n, _ in runs), len(load)
    fair = (sum(load) + total) / ranks
    wanted = list(accumulate(max(0.0, fair - owned) for owned in load))
    starts = [0, *accumulate(n for n, _ in runs)]
    cuts = [0]
    for target in wanted[:-1]:
        target = min(total, total * target / wanted[-1])
        run = max(0, bisect_left(starts, target) - 1)
        numel, unit = runs[run]
        cuts.append(min(starts[run] + round((target - starts[run]) / unit) * unit, starts[run] + numel))
    cuts.append(total)
    load[:] = [owned + high - low for owned, low, high in zip(load, cuts, cuts[1:])]
    return cuts
