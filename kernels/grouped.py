"""One matrix product per expert over rows sorted by expert: y[r] = x[r] W[expert of r]^T.

Rows come padded: each expert's share is a multiple of `row_alignment`, the padding rows are zero. Besides what FP8 tiles need,
this keeps the number of distinct matrix shapes small: CPU libraries prepare (and cache) code by shape, and routing would hand
them a new shape for every expert in every step (measured: bf16 eight times slower).

R rows, padding included   e experts on this rank   I input dim   O output dim
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .weight_grad import WeightGradStore, add_outer


@dataclass(frozen=True, kw_only=True)
class RowGroups:
    """How the R rows are shared out: `sizes[e]` rows for each expert (perhaps none), `ends_e` their running sum, int32."""

    sizes: list[int]
    ends_e: Tensor

    @classmethod
    def of(cls, sizes: list[int], device: torch.device | str = "cpu") -> "RowGroups":
        if sum(sizes) > torch.iinfo(torch.int32).max:
            raise ValueError(f"{sum(sizes)} rows for one rank's experts, and grouped_mm counts in int32: lower train.micro_batch_sequences")
        return cls(sizes=sizes, ends_e=torch.tensor(sizes, device=device).cumsum(0).to(torch.int32))


def row_alignment(dtype: torch.dtype, *, fp8: bool = False) -> int:
    """Rows of each expert are padded to a multiple of this. `fp8`: products are made in FP8, of blocks of 128 rows."""
    if fp8:
        return 128
    return 32 if dtype == torch.bfloat16 else 16


def grouped_mm_reference(rows_RI: Tensor, weight_eIO: Tensor, groups: RowGroups) -> Tensor:
    """A loop over experts, in any dtype: FP64 runs it, which `F.grouped_mm` refuses."""
    return torch.cat([rows @ w for rows, w in zip(rows_RI.split(groups.sizes), weight_eIO.unbind(0))])


def _grouped_mm(rows_RI: Tensor, weight_eIO: Tensor, groups: RowGroups) -> Tensor:
    if len(rows_RI) == 0 or rows_RI.dtype == torch.float64:
        return grouped_mm_reference(rows_RI, weight_eIO, groups)
    return F.grouped_mm(rows_RI, weight_eIO, offs=groups.ends_e)


def _add_weight_grad(main_eOI: Tensor, grad_RO: Tensor, rows_RI: Tensor, groups: RowGroups) -> None:
    for main, grad, rows in zip(main_eOI.unbind(0), grad_RO.split(groups.sizes), rows_RI.split(groups.sizes)):
        if len(rows):
            add_outer(main, grad, rows)


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RI, weight_eOI, groups, store, again):
        if again is None:
            ctx.save_for_backward(rows_RI)
        ctx.weight, ctx.groups, ctx.store, ctx.again = weight_eOI, groups, store, again
        return _grouped_mm(rows_RI, weight_eOI.transpose(1, 2), groups)

    @staticmethod
    def backward(ctx, grad_RO):
        (rows_RI,), weight, groups = (ctx.again(),) if ctx.again else ctx.saved_tensors, ctx.weight, ctx.groups
        grad_RO = grad_RO.contiguous()
        ctx.store.append(lambda: _add_weight_grad(weight.main_grad, grad_RO, rows_RI, groups))
        return _grouped_mm(grad_RO, weight, groups), None, None, None, None


def grouped_linear(
    rows_RI: Tensor,
    weight_eOI: Tensor,
    groups: RowGroups,
    store: WeightGradStore,
    *,
    again: Callable[[], Tensor] | None = None,
) -> Tensor:
    """(R, I), (e, O, I) -> (R, O). Backward leaves the weight's gradient to `store`, as `linear` does, which has `again`. R may be 0."""
    return _GroupedLinear.apply(rows_RI, weight_eOI, groups, store, again)
