"""One matrix product per expert over rows sorted by expert: y[r] = x[r] W[expert of r]^T.

Rows come padded: each expert's share is a multiple of `row_alignment`, the padding rows are zero. Besides what FP8 tiles need,
this keeps the number of distinct matrix shapes small: CPU libraries prepare (and cache) code by shape, and routing would hand
them a new shape for every expert in every step (measured: bf16 eight times slower).

How many rows that makes depends on the routing, which the host need not know: there may be more than the experts have.

    ends 4 8 8; 12 rows      0 . . .   0 1 2 .   . . . .      . a row of zeros
                             expert 0  expert 1  nobody's     (expert 2 has none)

Nobody's rows may hold anything, NaN included, after any product: neither results nor weight gradients are made of them.

R rows, padding and nobody's included   e experts on this rank   I input dim   O output dim
"""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from .weight_grad import WeightGradStore, add_outer


@dataclass(frozen=True, kw_only=True)
class RowGroups:
    """How rows are shared out: where those of each expert end (e,), int32, on their device; every share is a multiple of `align` rows.

    `on_host`: the rows of each expert, where the host knows them.
    """

    ends_e: Tensor
    align: int
    on_host: list[int] | None = None

    @classmethod
    def of(cls, sizes: list[int], device: torch.device | str = "cpu") -> "RowGroups":
        """From the rows of each expert (perhaps none)."""
        ends = list(itertools.accumulate(sizes))
        return cls(ends_e=torch.tensor(ends, dtype=torch.int32, device=device), align=math.gcd(*sizes))

    @cached_property
    def sizes(self) -> list[int]:
        """Makes the host wait for the device where it does not know them: for references, and for tests."""
        return sizes(self.ends_e).tolist() if self.on_host is None else self.on_host


def sizes(ends_e: Tensor) -> Tensor:
    return ends_e.diff(prepend=ends_e.new_zeros(1))


def by_expert(rows: Tensor, sizes: list[int], dim: int = 0) -> tuple[Tensor, ...]:
    """Each expert's rows; nobody's are left out."""
    return rows.split([*sizes, rows.shape[dim] - sum(sizes)], dim)[:-1]


def row_alignment(dtype: torch.dtype, *, fp8: bool = False) -> int:
    """Rows of each expert are padded to a multiple of this. `fp8`: products are made in FP8, of blocks of 128 rows."""
    if fp8:
        return 128
    return 32 if dtype == torch.bfloat16 else 16


def grouped_mm_reference(rows_RI: Tensor, weight_eIO: Tensor, groups: RowGroups) -> Tensor:
    """A loop over experts, in any dtype: FP64 runs it, which `F.grouped_mm` refuses. Nobody's rows are NaN: who reads them shows."""
    products = [rows @ w for rows, w in zip(by_expert(rows_RI, groups.sizes), weight_eIO.unbind(0))]
    return torch.cat([*products, rows_RI.new_full((len(rows_RI) - sum(groups.sizes), weight_eIO.shape[2]), torch.nan)])


def grouped_mm(rows_RI: Tensor, weight_eIO: Tensor, groups: RowGroups) -> Tensor:
    if len(rows_RI) == 0:
        return rows_RI.new_empty(0, weight_eIO.shape[2])
    if rows_RI.dtype == torch.float64:
        return grouped_mm_reference(rows_RI, weight_eIO, groups)
    return F.grouped_mm(rows_RI, weight_eIO, offs=groups.ends_e)


def add_grouped_outer_reference(main_eOI: Tensor, grad_RO: Tensor, rows_RI: Tensor, groups: RowGroups) -> None:
    """main[e] += grad^T rows, over the rows of expert e."""
    for main, grad, rows in zip(main_eOI.unbind(0), by_expert(grad_RO, groups.sizes), by_expert(rows_RI, groups.sizes)):
        if len(rows):
            add_outer(main, grad, rows)


def add_grouped_outer(main_eOI: Tensor, grad_RO: Tensor, rows_RI: Tensor, groups: RowGroups) -> None:
    """The same in one product, rounded to the rows' dtype, whose sizes the host does not ask for."""
    product_eOI = F.grouped_mm(grad_RO.t(), rows_RI, offs=groups.ends_e)
    empty_e = sizes(groups.ends_e) == 0  # over no rows, Blackwell's product is not zero (pytorch issue 172439)
    main_eOI.add_(product_eOI.masked_fill_(empty_e[:, None, None], 0))


def add_grouped_weight_grad(main_eOI: Tensor, grad_RO: Tensor, rows_RI: Tensor, groups: RowGroups) -> None:
    if rows_RI.is_cpu or rows_RI.dtype != torch.bfloat16:  # only BF16 has kernels for it
        add_grouped_outer_reference(main_eOI, grad_RO, rows_RI, groups)
    elif len(rows_RI):
        add_grouped_outer(main_eOI, grad_RO, rows_RI, groups)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RI, weight_eOI, groups, store, again):
        if again is None:
            ctx.save_for_backward(rows_RI)
        ctx.weight, ctx.groups, ctx.store, ctx.again = weight_eOI, groups, store, again
        return grouped_mm(rows_RI, weight_eOI.transpose(1, 2), groups)

    @staticmethod
    def backward(ctx, grad_RO):
        (rows_RI,), weight, groups = (ctx.again(),) if ctx.again else ctx.saved_tensors, ctx.weight, ctx.groups
        rows_RI, grad_RO = rows_RI.detach(), grad_RO.contiguous()
        ctx.store.append(lambda: add_grouped_weight_grad(weight.main_grad, grad_RO, rows_RI, groups))
        return grouped_mm(grad_RO, weight, groups), None, None, None, None


def grouped_linear(
    rows_RI: Tensor,
    weight_eOI: Tensor,
    groups: RowGroups,
    store: WeightGradStore,
    *,
    again: Callable[[], Tensor] | None = None,
) -> Tensor:
    """(R, I), (e, O, I) -> (R, O). Backward leaves the weight's gradient to `store`, as `linear` does, which has `again`. R may be 0.

    BF16 on a GPU never makes the host wait.
    """
    return _GroupedLinear.apply(rows_RI, weight_eOI, groups, store, again)
