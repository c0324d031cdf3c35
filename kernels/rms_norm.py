"""Root-mean-square norm: x / sqrt(mean(x^2) + eps) * weight, statistics in FP32 or wider.

`rms_norm` is a step of autograd. `rms_norm_quantised` is what an FP8 linear fuses before its product: norm and 1x128 cast in one pass.

R rows   D dim
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import FP8_TENSOR_CORES, KernelConfig, choose
from .fused import fused
from .quantise import ACTIVATION_FLOOR, BLOCK, Quantised, quantise_rows, rows_bytes, scale_of, to_codes


def rms_norm_reference(x_RD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    wide = x_RD.to(torch.promote_types(x_RD.dtype, torch.float32))
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight_D).to(x_RD.dtype)


@fused
def _forward(x_RD, weight_D, eps):
    wide = x_RD.to(torch.promote_types(x_RD.dtype, torch.float32))
    scale_R1 = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale_R1 * weight_D).to(x_RD.dtype), scale_R1


@fused
def _backward(grad_RD, x_RD, weight_D, scale_R1):
    unit_RD, wide = x_RD * scale_R1, grad_RD.to(scale_R1.dtype)
    grad_weight = (wide * unit_RD).flatten(0, -2).sum(0)
    wide = wide * weight_D
    along_R1 = (wide * unit_RD).mean(-1, keepdim=True)
    return ((wide - unit_RD * along_R1) * scale_R1).to(x_RD.dtype), grad_weight.to(weight_D.dtype)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RD, weight_D, eps, compiled):
        out_RD, scale_R1 = _forward(x_RD, weight_D, eps, compiled=compiled)
        ctx.save_for_backward(x_RD, weight_D, scale_R1)
        ctx.compiled = compiled
        return out_RD

    @staticmethod
    def backward(ctx, grad_RD):
        return *_backward(grad_RD, *ctx.saved_tensors, compiled=ctx.compiled), None, None


def rms_norm(x_RD: Tensor, weight_D: Tensor, eps: float, *, compiled: bool = False) -> Tensor:
    """(R, D), (D,) -> (R, D) in x's dtype. Differentiable in x and weight. Any leading dims."""
    return _RMSNorm.apply(x_RD, weight_D, eps, compiled)


def rms_norm_backward(
    grad_RD: Tensor, x_RD: Tensor, weight_D: Tensor, scale_R1: Tensor, *, compiled: bool = False
) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight; `scale_R1` is 1 / sqrt(mean(x^2) + eps), (R, 1) in FP32 or wider."""
    return _backward(grad_RD, x_RD, weight_D, scale_R1, compiled=compiled)


# ---------------------------------------------------------------- with a cast to FP8


def rms_norm_quantised_reference(x_RD: Tensor, weight_D: Tensor, eps: float, power_of_two: bool = False) -> tuple[Quantised, Tensor]:
    """In FP32 up to the cast: the normalised rows are not rounded to BF16 on the way."""
    out_RD, scale_R1 = _forward(x_RD.float(), weight_D, eps, compiled=False)
    return quantise_rows(out_RD, power_of_two=power_of_two), scale_R1


@triton.jit
def _rms_norm_quantised_kernel(
    x, weight, codes, scales, norms, R, D, eps, floor, POWER_OF_TWO: tl.constexpr, BLOCKS: tl.constexpr
):  # fmt: skip
    """One row, of at most BLOCKS blocks of 128, held in registers: it is read once."""
    row, block = tl.program_id(0), tl.arange(0, BLOCKS)
    cols = block[:, None] * 128 + tl.arange(0, 128)[None, :]
    here = row.to(tl.int64) * D + cols
    value = tl.load(x + here, mask=cols < D, other=0.0).to(tl.float32)
    norm = tl.rsqrt(tl.sum(tl.sum(value * value, 1), 0) / D + eps)
    value *= norm * tl.load(weight + cols, mask=cols < D, other=0.0).to(tl.float32)
    scale = scale_of(tl.max(tl.abs(value), 1), floor, POWER_OF_TWO)
    tl.store(codes + here, to_codes(value, scale[:, None]), mask=cols < D)
    tl.store(scales + block * R + row, scale, mask=block * 128 < D)
    tl.store(norms + row, norm)


CONFIGS = tuple(
    KernelConfig(
        kernel=_rms_norm_quantised_kernel,
        name=f"rms_norm, quantised, {128 * blocks} wide{', power of two' if power_of_two else ''}{f', {warps} warps' if warps else ''}",
        signature={"x": "*bf16", "weight": "*bf16", "codes": "*fp8e4nv", "scales": "*fp32", "norms": "*fp32"}
        | {"R": "i32:16", "D": "i32:16", "eps": "fp32", "floor": "fp32"},
        meta={"POWER_OF_TWO": power_of_two, "BLOCKS": blocks},
        num_warps=warps or max(1, min(8, blocks // 8)),
        architectures=(90,) if warps else FP8_TENSOR_CORES,
    )
    for warps in (0, 4, 16)  # 0: by width. Launched is the first: `shoestring bench kernels --tune` says which should be
    for power_of_two in (False, True)
    for blocks in ((64,) if warps else (4, 16, 64))  # a latent of 512; of 1536; a model of 7168
)


def rms_norm_quantised_triton(x_RD: Tensor, weight_D: Tensor, eps: float, power_of_two: bool) -> tuple[Tensor, Tensor, Tensor]:
    codes, scales, norms = out = _empty(x_RD)
    rows, dim = x_RD.shape
    widths = [c for c in CONFIGS if c.meta["BLOCKS"] * BLOCK >= dim]
    if not widths:
        raise ValueError(f"rms_norm of rows {dim} wide: this kernel holds a row in registers, {CONFIGS[-1].meta['BLOCKS'] * BLOCK} at most")
    config = choose(tuple(widths), _rms_norm_quantised_kernel, POWER_OF_TWO=power_of_two)
    if rows:
        args = (x_RD, weight_D, codes, scales, norms, rows, dim, eps, ACTIVATION_FLOOR)
        _rms_norm_quantised_kernel[(rows,)](*args, **config.options)
    return out


def _empty(x_RD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, dim = x_RD.shape
    scales = x_RD.new_empty(-(-dim // BLOCK), rows, dtype=torch.float32)
    return x_RD.new_empty(rows, dim, dtype=torch.float8_e4m3fn), scales, x_RD.new_empty(rows, 1, dtype=torch.float32)


@torch.library.custom_op("shoestring::rms_norm_quantised", mutates_args=())
def _quantised_op(x_RD: Tensor, weight_D: Tensor, eps: float, power_of_two: bool) -> tuple[Tensor, Tensor, Tensor]:
    if x_RD.is_cuda:
        return rms_norm_quantised_triton(x_RD.contiguous(), weight_D, eps, power_of_two)
    out, scale_R1 = rms_norm_quantised_reference(x_RD, weight_D, eps, power_of_two)
    return out.codes, out.scales, scale_R1


_quantised_op.register_fake(lambda x_RD, weight_D, eps, power_of_two: _empty(x_RD))


def rms_norm_quantised(x_RD: Tensor, weight_D: Tensor, eps: float, *, power_of_two: bool = False) -> tuple[Quantised, Tensor]:
    """(R, D) in BF16 or FP32, (D,) -> the norm's 1x128 cast, and FP32 (R, 1) for `rms_norm_backward`. Not a step of autograd.

    ValueError on a GPU for rows wider than 8192.
    """
    codes, scales, scale_R1 = _quantised_op(x_RD, weight_D, eps, power_of_two)
    return Quantised(codes, scales), scale_R1


def rms_norm_bytes(rows: int, dim: int) -> int:
    """BF16 rows and weight read; BF16 rows and one FP32 each written."""
    return 4 * rows * dim + 2 * dim + 4 * rows


def rms_norm_backward_bytes(rows: int, dim: int) -> int:
    """BF16 gradient, rows and weight and one FP32 a row read; gradients of rows and weight written."""
    return 6 * rows * dim + 4 * dim + 4 * rows


def rms_norm_quantised_bytes(rows: int, dim: int) -> int:
    """BF16 rows and weight read; codes, scales and one FP32 a row written."""
    return 2 * rows * dim + 2 * dim + rows_bytes(rows, dim) + 4 * rows
