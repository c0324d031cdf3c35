"""silu(gate) * up, times the routing weight of the row where there is one. Only the input is kept: backward computes the rest again.

Three forms. `swiglu` is a step of autograd, in any dtype.
`swiglu_quantised` and `swiglu_backward` are what an FP8 layer fuses between its two matrix products: activation, routing weight and 1x128
quantisation in one pass over the rows, from BF16 or from the FP8 that was kept; and both gradients from the FP8 that was kept.

R rows   F hidden dim   P = 2F, [gate | up]   B blocks of 128 channels
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .configs import FP8_TENSOR_CORES, KernelConfig, choose
from .fused import fused
from .quantise import ACTIVATION_FLOOR, BLOCK, Quantised, dequantise_rows, quantise_rows, rows_bytes, scale_of, to_codes


def swiglu_reference(gate_up: Tensor, weight_R: Tensor | None = None) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    hidden = F.silu(gate) * up
    return hidden if weight_R is None else (hidden * weight_R[:, None]).to(gate_up.dtype)


@fused
def _forward(gate_up, weight_R):
    gate, up = gate_up.chunk(2, -1)
    hidden = F.silu(gate).mul_(up)
    return hidden if weight_R is None else hidden.mul_(weight_R[:, None])


@fused
def _backward(grad, gate_up, weight_R):
    gate, up = gate_up.chunk(2, -1)
    act, grad_weight = F.silu(gate), None
    if weight_R is not None:
        grad_weight = (grad * act).mul_(up).sum(-1, dtype=weight_R.dtype)
        grad = grad * weight_R[:, None].to(grad.dtype)
    return torch.cat([torch.ops.aten.silu_backward(grad * up, gate), grad * act], -1), grad_weight


def _wide(gate_up: Tensor | Quantised) -> Tensor:
    return dequantise_rows(gate_up, torch.float32) if isinstance(gate_up, Quantised) else gate_up.float()


def swiglu_quantised_reference(gate_up: Tensor | Quantised, weight_R: Tensor | None = None) -> Quantised:
    """In FP32 up to the cast: the hidden rows are not rounded to BF16 on the way."""
    return quantise_rows(swiglu_reference(_wide(gate_up), weight_R))


def swiglu_backward_reference(cached: Quantised, grad_RF: Tensor, weight_R: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    grad_RP, grad_R = _backward(grad_RF.float(), _wide(cached), weight_R, compiled=False)
    return grad_RP.to(grad_RF.dtype), grad_R


# ---------------------------------------------------------------- Triton


@triton.jit
def _load(values, scales, rows, start, R, P, inside, FROM_FP8: tl.constexpr):
    """128 columns from `start` of a (R, P) matrix in FP32; FP8 is multiplied by its 1x128 scales, (P / 128, R)."""
    cols = start + tl.arange(0, 128)
    x = tl.load(values + rows.to(tl.int64)[:, None] * P + cols[None, :], mask=inside, other=0.0).to(tl.float32)
    if FROM_FP8:
        first = start // 128
        scale = tl.load(scales + first * R + rows, mask=rows < R, other=0.0)
        straddles = (start % 128 != 0) & ((first + 1) * 128 < P)  # where the up half starts inside a block
        after = tl.load(scales + (first + 1) * R + rows, mask=(rows < R) & straddles, other=0.0)
        x *= tl.where((cols // 128 == first)[None, :], scale[:, None], after[:, None])
    return x


@triton.jit
def _swiglu_quantised_kernel(
    gate_up, in_scales, weight_R, codes, scales, R, F, floor, FROM_FP8: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    rows, block = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    cols = block * 128 + tl.arange(0, 128)
    inside = (rows < R)[:, None] & (cols < F)[None, :]
    gate = _load(gate_up, in_scales, rows, block * 128, R, 2 * F, inside, FROM_FP8)
    up = _load(gate_up, in_scales, rows, F + block * 128, R, 2 * F, inside, FROM_FP8)
    hidden = gate * tl.sigmoid(gate) * up
    if WEIGHTED:
        hidden *= tl.load(weight_R + rows, mask=rows < R, other=0.0)[:, None]
    scale = scale_of(tl.max(tl.abs(hidden), 1), floor, False)
    tl.store(codes + rows.to(tl.int64)[:, None] * F + cols[None, :], to_codes(hidden, scale[:, None]), mask=inside)
    tl.store(scales + block * R + rows, scale, mask=rows < R)


@triton.jit
def _swiglu_backward_kernel(
    codes, scales, grad, weight_R, grad_gate_up, grad_weight_R, R, F, WEIGHTED: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """One program has whole rows: the weight's gradient is their sum."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    along = tl.zeros((ROWS,), tl.float32)
    if WEIGHTED:
        weight = tl.load(weight_R + rows, mask=rows < R, other=0.0)[:, None]
    for block in range(0, tl.cdiv(F, 128)):
        cols = block * 128 + tl.arange(0, 128)
        inside = (rows < R)[:, None] & (cols < F)[None, :]
        gate = _load(codes, scales, rows, block * 128, R, 2 * F, inside, True)
        up = _load(codes, scales, rows, F + block * 128, R, 2 * F, inside, True)
        g = _load(grad, scales, rows, block * 128, R, F, inside, False)
        sigmoid = tl.sigmoid(gate)
        act = gate * sigmoid
        if WEIGHTED:
            along += tl.sum(g * act * up, 1)
            g *= weight
        out = grad_gate_up + rows.to(tl.int64)[:, None] * (2 * F) + cols[None, :]
        tl.store(out, (g * up * sigmoid * (1 + gate * (1 - sigmoid))).to(grad_gate_up.dtype.element_ty), mask=inside)
        tl.store(out + F, (g * act).to(grad_gate_up.dtype.element_ty), mask=inside)
    if WEIGHTED:
        tl.store(grad_weight_R + rows, along, mask=rows < R)


def _forward_config(from_fp8: bool, weighted: bool, rows: int) -> KernelConfig:
    tensors = {"gate_up": "*fp8e4nv" if from_fp8 else "*bf16", "codes": "*fp8e4nv", "scales": "*fp32"}
    tensors |= ({"in_scales": "*fp32"} if from_fp8 else {}) | ({"weight_R": "*fp32"} if weighted else {})
    absent = {name: None for name in ("in_scales", "weight_R") if name not in tensors}
    return KernelConfig(
        kernel=_swiglu_quantised_kernel,
        name=f"swiglu, quantised, from {'fp8' if from_fp8 else 'bf16'}{', weighted' if weighted else ''}{_of(rows, 16)}",
        signature=tensors | {"R": "i32:16", "F": "i32:16", "floor": "fp32"},
        meta=absent | {"FROM_FP8": from_fp8, "WEIGHTED": weighted, "ROWS": rows},
        architectures=FP8_TENSOR_CORES if rows == 16 else (90,),
    )


def _backward_config(weighted: bool, rows: int) -> KernelConfig:
    tensors = {"codes": "*fp8e4nv", "scales": "*fp32", "grad": "*bf16", "grad_gate_up": "*bf16"}
    weights = {"weight_R": "*fp32", "grad_weight_R": "*fp32"}
    return KernelConfig(
        kernel=_swiglu_backward_kernel,
        name=f"swiglu, backward from fp8{', weighted' if weighted else ''}{_of(rows, 8)}",
        signature=tensors | (weights if weighted else {}) | {"R": "i32:16", "F": "i32:16"},
        meta=({} if weighted else dict.fromkeys(weights)) | {"WEIGHTED": weighted, "ROWS": rows},
        architectures=FP8_TENSOR_CORES if rows == 8 else (90,),
    )


def _of(rows: int, usual: int) -> str:
    return "" if rows == usual else f", {rows} rows"


CONFIGS = (  # of the rows, the first are launched: `shoestring bench kernels --tune` says which should be
    *(_forward_config(from_fp8, weighted, rows) for rows in (16, 8) for from_fp8 in (False, True) for weighted in (False, True)),
    *(_backward_config(weighted, rows) for rows in (8, 4) for weighted in (False, True)),
)


def swiglu_quantised_triton(gate_up: Tensor, in_scales: Tensor | None, weight_R: Tensor | None) -> tuple[Tensor, Tensor]:
    codes, scales = _empty_quantised(gate_up)
    config = choose(CONFIGS, _swiglu_quantised_kernel, FROM_FP8=in_scales is not None, WEIGHTED=weight_R is not None)
    tensors = dict(gate_up=gate_up, in_scales=in_scales, weight_R=weight_R, codes=codes, scales=scales)
    if codes.numel():
        grid = (triton.cdiv(codes.shape[0], config.meta["ROWS"]), len(scales))
        _swiglu_quantised_kernel[grid](**tensors | config.options, R=codes.shape[0], F=codes.shape[1], floor=ACTIVATION_FLOOR)
    return codes, scales


def swiglu_backward_triton(codes: Tensor, scales: Tensor, grad: Tensor, weight_R: Tensor | None) -> tuple[Tensor, Tensor]:
    grad_gate_up, grad_weight_R = _empty_backward(grad)
    config = choose(CONFIGS, _swiglu_backward_kernel, WEIGHTED=weight_R is not None)
    tensors = dict(codes=codes, scales=scales, grad=grad, weight_R=weight_R, grad_gate_up=grad_gate_up, grad_weight_R=grad_weight_R)
    if grad.numel():
        grid = (triton.cdiv(grad.shape[0], config.meta["ROWS"]),)
        _swiglu_backward_kernel[grid](**tensors | config.options, R=grad.shape[0], F=grad.shape[1])
    return grad_gate_up, grad_weight_R


# ---------------------------------------------------------------- operators: rehearsal traces them with fake tensors


def _empty_quantised(gate_up: Tensor) -> tuple[Tensor, Tensor]:
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    codes = gate_up.new_empty(rows, width, dtype=torch.float8_e4m3fn)
    return codes, gate_up.new_empty(-(-width // BLOCK), rows, dtype=torch.float32)


def _empty_backward(grad: Tensor) -> tuple[Tensor, Tensor]:
    rows, width = grad.shape
    return grad.new_empty(rows, 2 * width), grad.new_zeros(rows, dtype=torch.float32)


@torch.library.custom_op("shoestring::swiglu_quantised", mutates_args=())
def _quantised_op(gate_up: Tensor, in_scales: Tensor | None, weight_R: Tensor | None) -> tuple[Tensor, Tensor]:
    if gate_up.is_cuda:
        return swiglu_quantised_triton(gate_up.contiguous(), in_scales, weight_R)
    out = swiglu_quantised_reference(gate_up if in_scales is None else Quantised(gate_up, in_scales), weight_R)
    return out.codes, out.scales


@torch.library.custom_op("shoestring::swiglu_backward", mutates_args=())
def _backward_op(codes: Tensor, scales: Tensor, grad: Tensor, weight_R: Tensor | None) -> tuple[Tensor, Tensor]:
    if grad.is_cuda:
        return swiglu_backward_triton(codes, scales, grad.contiguous(), weight_R)
    grad_gate_up, grad_weight_R = swiglu_backward_reference(Quantised(codes, scales), grad, weight_R)
    return grad_gate_up, grad.new_zeros(len(grad), dtype=torch.float32) if grad_weight_R is None else grad_weight_R


_quantised_op.register_fake(lambda gate_up, in_scales, weight_R: _empty_quantised(gate_up))
_backward_op.register_fake(lambda codes, scales, grad, weight_R: _empty_backward(grad))


def swiglu_quantised(gate_up: Tensor | Quantised, weight_R: Tensor | None = None) -> Quantised:
    """(R, 2F) BF16, or as it was kept in FP8, and FP32 (R,) -> (R, F) with scales (F / 128, R), floor 1e-4. Not a step of autograd."""
    kept = isinstance(gate_up, Quantised)
    return Quantised(*_quantised_op(gate_up.codes if kept else gate_up, gate_up.scales if kept else None, weight_R))


def swiglu_backward(cached: Quantised, grad_RF: Tensor, weight_R: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Input as kept (R, 2F), gradient (R, F) of the weighted output -> gradient (R, 2F) in its dtype, and FP32 (R,) of the weight."""
    grad_gate_up, grad_weight_R = _backward_op(cached.codes, cached.scales, grad_RF, weight_R)
    return grad_gate_up, None if weight_R is None else grad_weight_R


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_up, weight_R, compiled):
        ctx.save_for_backward(gate_up, weight_R)
        ctx.compiled = compiled
        return _forward(gate_up, weight_R, compiled=compiled)

    @staticmethod
    def backward(ctx, grad):
        return *_backward(grad, *ctx.saved_tensors, compiled=ctx.compiled), None


def swiglu(gate_up_R2F: Tensor, weight_R: Tensor | None = None, *, compiled: bool = False) -> Tensor:
    """(R, 2F) holding [gate | up], optional FP32 (R,) -> (R, F) in the input's dtype. Differentiable in both."""
    return _SwiGLU.apply(gate_up_R2F, weight_R, compiled)


# ---------------------------------------------------------------- what they move


def swiglu_quantised_bytes(rows: int, hidden_dim: int, *, from_fp8: bool, weighted: bool) -> int:
    """Read and written by `swiglu_quantised`, each once."""
    read = rows_bytes(rows, 2 * hidden_dim) if from_fp8 else 2 * rows * 2 * hidden_dim
    return read + rows_bytes(rows, hidden_dim) + 4 * rows * weighted


def swiglu_bytes(rows: int, hidden_dim: int, *, weighted: bool) -> int:
    """Read and written by `swiglu` of BF16, each once."""
    return 2 * rows * hidden_dim * 3 + 4 * rows * weighted


def swiglu_backward_bytes(rows: int, hidden_dim: int, *, weighted: bool, from_fp8: bool = True) -> int:
    """Read and written for the gradients, of a BF16 gradient and the input in FP8 (`swiglu_backward`) or BF16 (`swiglu`), each once."""
    read = rows_bytes(rows, 2 * hidden_dim) if from_fp8 else 4 * rows * hidden_dim
    return read + 2 * rows * hidden_dim * 3 + 8 * rows * weighted
