"""One FP8 matrix product per expert over rows sorted by expert; `fp8_linear.py` has the recipe.

Each expert's rows are padded to a multiple of 128 with zeros: the weight gradient sums blocks of 128 rows, and none may belong to two
experts. The kernels are those of `fp8_linear.py`, told where each expert's rows end.

R rows, padding included   e experts on this rank   I input dim   O output dim
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .fp8_linear import add_fp8_outer_reference, add_outer_triton, fp8_matmul_reference, matmul_triton
from .grouped import RowGroups, by_expert, sizes
from .quantise import BLOCK, Quantised


def fp8_grouped_matmul_reference(a: Quantised, b: Quantised, ends_e: Tensor, dtype: torch.dtype) -> Tensor:
    """(R, K) by rows, (e, N, K) by blocks -> (R, N) in `dtype`. Nobody's rows are NaN: who reads them shows."""
    own = sizes(ends_e).tolist()
    rows = zip(by_expert(a.codes, own), by_expert(a.scales, own, 1))
    experts = zip(b.codes.unbind(0), b.scales.unbind(0))
    products = [fp8_matmul_reference(Quantised(*row), Quantised(*expert), dtype) for row, expert in zip(rows, experts)]
    return torch.cat([*products, a.scales.new_full((len(a.codes) - sum(own), b.codes.shape[1]), torch.nan).to(dtype)])


def add_fp8_grouped_outer_reference(main_eMN: Tensor, a: Quantised, b: Quantised, ends_e: Tensor) -> None:
    """main[e] += a b^T over the rows of expert e: (M, R) and (N, R), both by rows."""
    own = sizes(ends_e).tolist()
    parts = lambda q: zip(by_expert(q.codes, own, 1), by_expert(q.scales, [size // BLOCK for size in own]))
    for main_MN, own_a, own_b in zip(main_eMN.unbind(0), parts(a), parts(b)):
        add_fp8_outer_reference(main_MN, Quantised(*own_a), Quantised(*own_b))


# ---------------------------------------------------------------- the operators, over plain tensors


@torch.library.custom_op("shoestring::fp8_grouped_matmul", mutates_args=())
def _matmul(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, ends: Tensor, dtype: torch.dtype) -> Tensor:
    a, b = Quantised(a, a_scales), Quantised(b, b_scales)
    return matmul_triton(a, b, dtype, ends) if ends.is_cuda else fp8_grouped_matmul_reference(a, b, ends, dtype)


@_matmul.register_fake
def _(a, a_scales, b, b_scales, ends, dtype):
    return a.new_empty(len(a), b.shape[1], dtype=dtype)


@torch.library.custom_op("shoestring::add_fp8_grouped_outer", mutates_args={"main"})
def _add_outer(main: Tensor, a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, ends: Tensor) -> None:
    add_outer = add_outer_triton if main.is_cuda else add_fp8_grouped_outer_reference
    add_outer(main, Quantised(a, a_scales), Quantised(b, b_scales), ends)


@_add_outer.register_fake
def _(main, a, a_scales, b, b_scales, ends):
    return None


@register_flop_formula(torch.ops.shoestring.fp8_grouped_matmul)
def _matmul_flops(a_shape, a_scales_shape, b_shape, *_, **__) -> int:
    return 2 * a_shape[0] * a_shape[1] * b_shape[1]


@register_flop_formula(torch.ops.shoestring.add_fp8_grouped_outer)
def _add_outer_flops(main_shape, a_shape, *_, **__) -> int:
    return 2 * main_shape[1] * main_shape[2] * a_shape[1]


def fp8_grouped_matmul(a: Quantised, b: Quantised, groups: RowGroups, dtype: torch.dtype) -> Tensor:
    """(R, K) quantised by rows, (e, N, K) by 128 x 128 blocks -> (R, N): each row times its expert's matrix, in `dtype`. R may be 0."""
    return _matmul(a.codes, a.scales, b.codes, b.scales, groups.ends_e, dtype)


def add_fp8_grouped_outer(main_eMN: Tensor, a: Quantised, b: Quantised, groups: RowGroups) -> None:
    """main[e] += a b^T over expert e's rows, FP32: (M, R) and (N, R), both quantised by rows."""
    _add_outer(main_eMN, a.codes, a.scales, b.codes, b.scales, groups.ends_e)
