"""y = x W^T in FP8 (DeepSeek-V3 §3.3): forward, input gradient and weight gradient all multiply E4M3 codes.

    forward           x, 1 x 128 along I     W, 128 x 128        y   rounded once to the rows' dtype
    input gradient    g, 1 x 128 along O     W^T, 128 x 128      gx  likewise
    weight gradient   g^T, 1 x 128 along R   x^T, 1 x 128 along R   added to `main_grad` in FP32

Codes of 128 of the summed dim are multiplied, the product is scaled in FP32, and such parts are added in FP32: a tensor core that adds FP8
products keeps too few bits for longer sums. What is kept for backward is x in FP8. Gradients are quantised with a floor far below the
activations', which would flatten small ones to zero.

R rows   I input dim   O output dim   M, N rows and columns of a product   K summed dim
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .fp8_weights import WeightCache
from .quantise import BLOCK, GRADIENT_FLOOR, Quantised, columns_of, quantise_columns, quantise_rows
from .weight_grad import WeightGradStore


def fp8_matmul_reference(a: Quantised, b: Quantised, dtype: torch.dtype) -> Tensor:
    """(M, K) by rows, (N, K) by blocks -> (M, N) in `dtype`."""
    sum_MN = torch.zeros(len(a.codes), len(b.codes), device=a.codes.device)
    scale_kN = b.scales.t().repeat_interleave(BLOCK, 1)[:, : len(b.codes)]
    for a_Mk, a_scale_M, b_Nk, b_scale_N in zip(a.codes.split(BLOCK, 1), a.scales, b.codes.split(BLOCK, 1), scale_kN):
        sum_MN += (a_Mk.float() @ b_Nk.float().t()) * (a_scale_M[:, None] * b_scale_N)
    return sum_MN.to(dtype)


def add_fp8_outer_reference(main_MN: Tensor, a: Quantised, b: Quantised) -> None:
    """main += a b^T in FP32: (M, K) and (N, K), both by rows."""
    sum_MN = torch.zeros(main_MN.shape, device=main_MN.device)
    for a_Mk, a_scale_M, b_Nk, b_scale_N in zip(a.codes.split(BLOCK, 1), a.scales, b.codes.split(BLOCK, 1), b.scales):
        sum_MN += (a_Mk.float() @ b_Nk.float().t()) * a_scale_M[:, None] * b_scale_N
    main_MN.add_(sum_MN)


# ---------------------------------------------------------------- the operators, over plain tensors


@torch.library.custom_op("shoestring::fp8_matmul", mutates_args=())
def _matmul(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, dtype: torch.dtype) -> Tensor:
    return fp8_matmul_reference(Quantised(a, a_scales), Quantised(b, b_scales), dtype)


@_matmul.register_fake
def _(a, a_scales, b, b_scales, dtype):
    return a.new_empty(len(a), len(b), dtype=dtype)


@torch.library.custom_op("shoestring::add_fp8_outer", mutates_args={"main"})
def _add_outer(main: Tensor, a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> None:
    add_fp8_outer_reference(main, Quantised(a, a_scales), Quantised(b, b_scales))


@_add_outer.register_fake
def _(main, a, a_scales, b, b_scales):
    return None


@register_flop_formula(torch.ops.shoestring.fp8_matmul)
def _matmul_flops(a_shape, a_scales_shape, b_shape, *_, **__) -> int:
    return 2 * a_shape[0] * a_shape[1] * b_shape[0]


@register_flop_formula(torch.ops.shoestring.add_fp8_outer)
def _add_outer_flops(main_shape, a_shape, *_, **__) -> int:
    return 2 * main_shape[0] * main_shape[1] * a_shape[1]


def fp8_matmul(a: Quantised, b: Quantised, dtype: torch.dtype) -> Tensor:
    """(M, K) quantised by rows, (N, K) by 128 x 128 blocks -> a b^T, (M, N), summed in FP32 and rounded once to `dtype`. M may be 0."""
    return _matmul(a.codes, a.scales, b.codes, b.scales, dtype)


def add_fp8_outer(main_MN: Tensor, a: Quantised, b: Quantised) -> None:
    """main += a b^T, FP32: (M, K) and (N, K), both quantised by rows. K may be 0."""
    _add_outer(main_MN, a.codes, a.scales, b.codes, b.scales)


# ---------------------------------------------------------------- with gradients


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_RI, weight_OI, casts, store, power_of_two, again):
        quantised = lambda rows_RI: quantise_rows(rows_RI.contiguous(), power_of_two=power_of_two)
        rows, cast = quantised(rows_RI), casts.of(weight_OI)
        if again is None:
            ctx.save_for_backward(rows.codes, rows.scales)
        ctx.again = again and (lambda: quantised(again()))
        ctx.weight, ctx.cast, ctx.store = weight_OI, cast, store
        return fp8_matmul(rows, cast.blocks, rows_RI.dtype)

    @staticmethod
    def backward(ctx, grad_RO):
        weight, grad_RO = ctx.weight, grad_RO.contiguous()  # also where it arrives expanded
        rows = ctx.again() if ctx.again else Quantised(*ctx.saved_tensors)
        columns = quantise_columns(grad_RO, floor=GRADIENT_FLOOR)
        ctx.store.append(lambda: add_fp8_outer(weight.main_grad, columns, columns_of(rows)))
        grad_RI = None
        if ctx.needs_input_grad[0]:
            grad_RI = fp8_matmul(quantise_rows(grad_RO, floor=GRADIENT_FLOOR), ctx.cast.transposed, grad_RO.dtype)
        return grad_RI, None, None, None, None, None


def fp8_linear(
    rows_RI: Tensor,
    weight_OI: Tensor,
    casts: WeightCache,
    store: WeightGradStore,
    *,
    power_of_two: bool = False,
    again: Callable[[], Tensor] | None = None,
) -> Tensor:
    """(R, I) x (O, I) -> (R, O), in the rows' dtype. Backward appends one closure to `store`, as `linear`'s does.

    `power_of_two`: scales of the rows are; the recipe has it for the input of attention's output projection, and for dispatched rows.
    `again`: makes the rows for backward, which are then not kept.
    """
    return _Fp8Linear.apply(rows_RI, weight_OI, casts, store, power_of_two, again)
