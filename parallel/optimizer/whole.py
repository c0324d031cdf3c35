"""Engine `whole`, the default: flat buffers cut into one contiguous range per owner, reduced and published in place.

One buffer per (replica group, stage, dtype). Parameters and main gradients are views of it, so nothing is ever copied together:

    weights [ w1 ........ | w2 ........ | norm | padding ]
             <- owner 0 -> <- owner 1 -> <- owner 2 ---->        a piece is the part of one parameter inside one owner's range

Under AdamW a unit is one element, and the cut is even (ZeRO-1). Under Muon it falls between matrices, balanced by what orthogonalising
costs, over all stages and groups. With `optim.offload` masters and moments are on the host: gradients go there, weights come back.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.distributed as dist
from torch import Tensor

from ...conf.schema import OptimConfig
from .._torch import all_gather, reduce_scatter
from ..transport import Named
from .host import HostLink
from .updates import adamw_, muon_, orthogonal_cost
from .zero import Chunk, ShardedOptimizer, Spec, grad_dtype, in_collective_order

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
ALIGNMENT = 64  # elements: each owner's range of an even cut starts on a cache line


@dataclass(frozen=True)
class _Buffer:
    group: dist.ProcessGroup
    stage: int
    weights: Tensor  # (N,) in the parameters' dtype
    grads: Tensor  # (N,) FP32 or FP64
    cuts: list[int]  # owner r holds [cuts[r], cuts[r + 1])
    even: bool  # all ranges are equally long
    master: Tensor  # this rank's range; a view of `weights` where dtype and place allow it

    def range_of(self, rank: int) -> slice:
        return slice(self.cuts[rank], self.cuts[rank + 1])

    @property
    def owned(self) -> slice:
        return self.range_of(dist.get_rank(self.group))


@dataclass(frozen=True)
class _Piece:
    """Part of one parameter that this rank owns; all tensors (n,)."""

    spec: Spec
    offset: int  # in the flattening of the whole parameter
    weights: Tensor
    grad: Tensor  # FP32 or FP64, as the master
    master: Tensor
    exp_avg: Tensor  # under Muon its momentum, as wide as the master
    exp_avg_sq: Tensor | None  # None under Muon
    grad_there: Tensor  # where the master is: `grad` itself, or its copy on the host
    weights_there: Tensor | None  # on the host, in the dtype of the weights: what is sent back. None: masters are not offloaded


class WholeOptimizer(ShardedOptimizer):
    """AdamW and Muon over owned pieces (`ShardedOptimizer` has the contract).

    `in_one_call` sums an even buffer with one reduce-scatter and publishes it with one all-gather, instead of one reduce and one
    broadcast per owner. That is right for NCCL; gloo's reduce-scatter is an all-reduce of a copy, four times slower than what it replaces.
    None chooses by the device of the weights.
    """

    def __init__(self, specs: Sequence[Spec], optim: OptimConfig, *, in_one_call: bool | None = None):
        self._in_one_call = in_one_call
        super().__init__(specs, optim)

    def _allocate(self, specs):
        if self._in_one_call is None:
            self._in_one_call = self._device().type != "cpu"
        self._link = HostLink(self._device()) if self.optim.offload else None
        self._pieces: list[_Piece] = []
        self._pending: list[Named] = []
        keyed: dict[tuple, list[Spec]] = {}
        for s in specs:
            keyed.setdefault((s.group, s.stage, s.param.dtype, s.matrices == ()), []).append(s)
        order = in_collective_order(keyed)
        cuts = all_cuts([keyed[k] for k in order])
        self._buffers = [self._add_buffer(keyed[k], c) for k, c in zip(order, cuts)]

    @torch.no_grad()
    def _add_buffer(self, specs: list[Spec], cuts: list[int]) -> _Buffer:
        first, sizes = specs[0], [s.param.numel() for s in specs]
        weights = torch.zeros(cuts[-1], dtype=first.param.dtype, device=first.param.device)
        grads = torch.zeros_like(weights, dtype=grad_dtype(weights.dtype))
        starts = [0, *accumulate(sizes)]
        for s, low, high in zip(specs, starts, starts[1:]):
            weights[low:high].copy_(s.param.detach().view(-1))
            s.param.data = weights[low:high].view(s.param.shape)
            self.main_grad[s.name] = s.param.main_grad = grads[low:high].view(s.param.shape)
        owned = slice(*cuts[dist.get_rank(first.group) :][:2])
        if self._link:
            master = self._link.empty(owned.stop - owned.start, grads.dtype).copy_(weights[owned])
        else:
            master = weights[owned].to(grads.dtype)
        for s, start in zip(specs, starts):
            low, high = max(start, owned.start), min(start + s.param.numel(), owned.stop)
            if low < high:
                here = slice(low - owned.start, high - owned.start)
                self._pieces.append(self._piece(s, s.offset + low - start, weights[low:high], grads[low:high], master[here]))
        return _Buffer(first.group, first.stage, weights, grads, cuts, not first.matrices, master)

    def _piece(self, spec: Spec, offset: int, weights: Tensor, grad: Tensor, master: Tensor) -> _Piece:
        link, muon = self._link, bool(spec.matrices)
        dtype = master.dtype if muon else DTYPES[self.optim.moment_precision(NAMES[weights.dtype])]
        moments = [torch.zeros_like(master, dtype=dtype), None if muon else torch.zeros_like(master, dtype=dtype)]
        copies = (link.empty(len(grad), t.dtype) for t in (grad, weights)) if link else (grad, None)
        return _Piece(spec, offset, weights, grad, master, *moments, *copies)

    def _start(self, stages):
        for b in self._buffers:
            if b.stage in stages:
                if b.even and self._in_one_call:
                    work = reduce_scatter(b.grads[b.owned], b.grads, group=b.group, async_op=True)
                    self._pending.append(Named(work, "reduction of gradients", b.group))
                else:
                    self._each_owner(b, b.grads, dist.reduce, "group_dst")

    def _each_owner(self, buffer: _Buffer, tensor: Tensor, collective, end: str) -> None:
        for rank in range(len(buffer.cuts) - 1):
            part = tensor[buffer.range_of(rank)]
            if len(part):
                work = collective(part, group=buffer.group, async_op=True, **{end: rank})
                self._pending.append(Named(work, f"{collective.__name__} of rank {rank}'s share", buffer.group))

    def _wait(self):
        with self.waiting:
            while self._pending:
                self._pending.pop().wait()

    def _owned_grads(self):
        self._wait()
        return [p.grad for p in self._pieces]

    def _update(self, lr):
        if self._link:
            self._update_on_host(lr)
        else:
            self._advance(self._pieces, lr)
            self._cast()
        self._publish()
        self._clear()

    def _clear(self):
        for b in self._buffers:
            b.grads.zero_()

    def _update_on_host(self, lr: float) -> None:
        """Piece by piece: while one is updated, the next ones' gradients and the last ones' weights travel."""
        arrivals = [self._link.download(p.grad_there, p.grad) for p in self._pieces]
        for p, arrived in zip(self._pieces, arrivals):
            arrived()
            self._advance([p], lr)
            self._link.upload(p.weights, p.weights_there.copy_(p.master))
        self._link.join()

    def _advance(self, pieces: list[_Piece], lr: float) -> None:
        o = self.optim
        for decay in (True, False):
            if adam := [p for p in pieces if p.exp_avg_sq is not None and p.spec.decay == decay]:
                columns = zip(*((p.master, p.grad_there, p.exp_avg, p.exp_avg_sq) for p in adam))
                weight_decay = o.weight_decay if decay else 0.0
                adamw_(*columns, step=self.steps, lr=lr, betas=(o.beta1, o.beta2), eps=o.eps, weight_decay=weight_decay)
        for p in (p for p in pieces if p.exp_avg_sq is None):
            weight_decay = o.weight_decay if p.spec.decay else 0.0
            muon_(
                p.master, p.grad_there, p.exp_avg, p.spec.matrices,
                lr=lr, beta=o.muon_momentum, weight_decay=weight_decay, device=p.grad.device,
            )  # fmt: skip

    def _cast(self) -> None:
        """Owned masters to this rank's weights."""
        for b in self._buffers:
            if b.master.dtype != b.weights.dtype or self._link:
                b.weights[b.owned].copy_(b.master)

    def _publish(self) -> None:
        """Owned weights to every replica."""
        for b in self._buffers:
            if b.even and self._in_one_call:
                work = all_gather(b.weights, b.weights[b.owned], group=b.group, async_op=True)
                self._pending.append(Named(work, "gathering of weights", b.group))
            else:
                self._each_owner(b, b.weights, dist.broadcast, "group_src")
        self._wait()

    def _gradients(self):
        return {p.spec.name: Chunk(p.spec.numel, p.offset, p.grad) for p in self._pieces}

    def _state(self):
        return {
            f"{p.spec.name}.{key}": Chunk(p.spec.numel, p.offset, getattr(p, key))
            for p in self._pieces
            for key in ("master", "exp_avg", "exp_avg_sq")
            if getattr(p, key) is not None
        }

    def at_rest(self):
        moments = [t for p in self._pieces for t in (p.exp_avg, p.exp_avg_sq) if t is not None]
        return [b.master for b in self._buffers if not _same(b.master, b.weights)] + moments

    def on_host(self) -> list[Tensor]:
        """What stays there under `optim.offload`, and what travels."""
        if not self._link:
            return []
        state = [chunk.data for chunk in self._state().values()]
        return state + [t for p in self._pieces for t in (p.grad_there, p.weights_there)]

    def _load(self):
        self._cast()
        self._publish()


def _same(part: Tensor, whole: Tensor) -> bool:
    """Whether it is a view of it."""
    return part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()


# ---------------------------------------------------------------- cuts


def all_cuts(buffers: Sequence[list[Spec]]) -> list[list[int]]:
    """Borders (ranks + 1) of each buffer, given its specs. Ranks that share a group get the same, without asking each other."""
    ranks = (dist.get_process_group_ranks(specs[0].group) for specs in buffers)
    return range_cuts([(of, [(s.param.numel(), s.matrices) for s in specs]) for of, specs in zip(ranks, buffers)])


def range_cuts(buffers: Sequence[tuple[list[int], list[tuple[int, Sequence[tuple[int, int]]]]]]) -> list[list[int]]:
    """Borders (ranks + 1) of each buffer, given the ranks of its group, and elements and a unit's matrices of what is in it.

    What a rank has to do for one group counts in another that all of that group belong to (experts' replicas are among the dense
    weights' replicas): nobody can know more of the others. So large groups come first.
    """
    done: list[tuple[list[int], list[float]]] = []  # ranks of a group, what each has to do for it
    cuts: dict[int, list[int]] = {}
    for i in sorted(range(len(buffers)), key=lambda i: -len(buffers[i][0])):
        ranks, parts = buffers[i]
        if not parts[0][1]:
            cuts[i] = even_cuts(sum(numel for numel, _ in parts), len(ranks))
            continue
        load = [sum(work[theirs.index(r)] for theirs, work in done if set(ranks) <= set(theirs)) for r in ranks]
        units = [sum(rows * columns for rows, columns in matrices) for _, matrices in parts]
        runs = [(numel // unit, unit, orthogonal_cost(matrices)) for (numel, matrices), unit in zip(parts, units)]
        cuts[i], work = unit_cuts(runs, load)
        done.append((ranks, work))
    return [cuts[i] for i in range(len(buffers))]


def even_cuts(total: int, ranks: int) -> list[int]:
    """Borders (ranks + 1) of equal, aligned ranges that cover `total` elements; the last border says how long to pad."""
    share = -(-total // (ranks * ALIGNMENT)) * ALIGNMENT
    return [share * r for r in range(ranks + 1)]


def unit_cuts(runs: Sequence[tuple[int, int, int]], load: Sequence[float]) -> tuple[list[int], list[float]]:
    """Borders (ranks + 1) over `runs` of (units, elements of a unit, cost of a unit), none inside a unit, and what each rank gets.

    `load`: cost that each rank bears already; the sums are evened out.
    """
    total, ranks = sum(units * cost for units, _, cost in runs), len(load)
    fair = (sum(load) + total) / ranks
    wanted = list(accumulate(max(0.0, fair - borne) for borne in load))
    starts = [0, *accumulate(units * cost for units, _, cost in runs)]
    firsts = [0, *accumulate(units * size for units, size, _ in runs)]
    cuts, costs = [0], [0]
    for target in wanted[:-1]:
        target = min(total, total * target / wanted[-1])
        run = max(0, bisect_left(starts, target) - 1)
        units, size, cost = runs[run]
        count = min(units, round((target - starts[run]) / cost))
        cuts.append(firsts[run] + count * size)
        costs.append(starts[run] + count * cost)
    return [*cuts, firsts[-1]], [high - low for low, high in zip(costs, [*costs[1:], total])]
