"""Casts to FP8 (E4M3) by DeepSeek-V3's recipe (its technical report, section 3.3): scales computed online, one for each tile.

    scale = max(largest |x| of the tile, floor) / 448        code = e4m3(clamp(x / scale, +-448))        x is about code * scale

T tokens   K channels (contiguous)   N output channels of a weight
tile: 128 channels of a token, 128 tokens of a channel, or 128 x 128 of a weight

Ragged edges count as zero-padded. NaN stays NaN in its own place and does not enter a scale; an infinity makes the scale of its tile
infinite, so that all of the tile reads back as NaN.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .configs import FP8_TENSOR_CORES, KernelConfig, choose

BLOCK = 128
E4M3_MAX = 448.0
ACTIVATION_FLOOR = 1e-4  # of activations and weights
GRADIENT_FLOOR = 1e-30  # gradients may be small as a whole: under a floor of 1e-4, 1e-10 is noise


@dataclass(frozen=True)
class Quantised:
    """`codes`, float8_e4m3fn, and `scales`, FP32: what a code is to be multiplied by. Never an input or output of an autograd Function: it
    would cast the gradient to FP8."""

    codes: Tensor
    scales: Tensor


# ---------------------------------------------------------------- references


def scales_reference(largest: Tensor, *, power_of_two: bool = False, floor: float = ACTIVATION_FLOOR, top: float = E4M3_MAX) -> Tensor:
    """What makes the largest |x| of a tile into `top`."""
    scales = largest.clamp_min(floor) / top
    if power_of_two:  # 2^ceil(log2(scale)), exactly: a logarithm would round
        mantissa, exponent = torch.frexp(scales)
        rounded = torch.ldexp(torch.ones_like(scales), exponent - (mantissa == 0.5).int())
        scales = torch.where(scales.isinf(), scales, rounded)
    return scales


def largest_reference(tiles: Tensor, dim: int | tuple[int, ...]) -> Tensor:
    return tiles.abs().nan_to_num(nan=0.0, posinf=torch.inf).amax(dim)


def _cast(scaled: Tensor) -> Tensor:
    return scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)


def quantise_rows_reference(x_TK: Tensor, *, power_of_two: bool = False, floor: float = ACTIVATION_FLOOR) -> Quantised:
    T, K = x_TK.shape
    tiles = F.pad(x_TK.float(), (0, -K % BLOCK)).view(T, -(-K // BLOCK), BLOCK)
    scales = scales_reference(largest_reference(tiles, 2), power_of_two=power_of_two, floor=floor)
    codes = _cast(tiles / scales[:, :, None]).flatten(1)[:, :K]
    return Quantised(codes.contiguous(), scales.T.contiguous())


def quantise_blocks_reference(w_NK: Tensor) -> Quantised:
    N, K = w_NK.shape
    padded = F.pad(w_NK.float(), (0, -K % BLOCK, 0, -N % BLOCK))
    tiles = padded.view(-(-N // BLOCK), BLOCK, -(-K // BLOCK), BLOCK)
    scales = scales_reference(largest_reference(tiles, (1, 3)))
    codes = _cast(tiles / scales[:, None, :, None]).view(padded.shape)[:N, :K]
    return Quantised(codes.contiguous(), scales)


def quantise_columns_reference(x_TK: Tensor, *, floor: float = ACTIVATION_FLOOR) -> Quantised:
    """`quantise_rows_reference` of the transpose, without making it in FP32."""
    T, K = x_TK.shape
    tiles = F.pad(x_TK.float(), (0, 0, 0, -T % BLOCK)).view(-(-T // BLOCK), BLOCK, K)
    scales = scales_reference(largest_reference(tiles, 1), floor=floor)
    codes = _cast(tiles / scales[:, None]).flatten(0, 1)[:T]
    return Quantised(codes.t().contiguous(), scales)


def columns_of_reference(q: Quantised, *, floor: float = ACTIVATION_FLOOR) -> Quantised:
    return quantise_columns_reference(dequantise_rows(q, torch.float32), floor=floor)


def decode(codes: Tensor) -> Tensor:
    """`codes.float()`, to the bit. On a CPU torch converts codes one by one: looking them up takes a third of the time."""
    table = torch.arange(256, dtype=torch.uint8, device=codes.device).view(codes.dtype).float()
    return table.index_select(0, codes.contiguous().view(torch.uint8).flatten().int()).view(codes.shape)


def dequantise_rows(q: Quantised, dtype: torch.dtype) -> Tensor:
    """What `quantise_rows` stored, (T, K): the product in FP32, rounded once to `dtype`."""
    return (decode(q.codes) * q.scales.T.repeat_interleave(BLOCK, 1)[:, : q.codes.shape[1]]).to(dtype)


def dequantise_blocks(q: Quantised, dtype: torch.dtype) -> Tensor:
    """What `quantise_blocks` stored, (N, K): the product in FP32, rounded once to `dtype`."""
    N, K = q.codes.shape
    return (decode(q.codes) * q.scales.repeat_interleave(BLOCK, 0)[:N].repeat_interleave(BLOCK, 1)[:, :K]).to(dtype)


# ---------------------------------------------------------------- Triton


@triton.jit
def scale_of(largest, floor, POWER_OF_TWO: tl.constexpr, TOP: tl.constexpr = 448.0):
    """`scales_reference`, to the bit: a correctly rounded division, and the power of two from the exponent's bits."""
    scale = tl.math.div_rn(tl.maximum(largest, floor), TOP)
    if POWER_OF_TWO:
        bits = scale.to(tl.int32, bitcast=True)
        up = ((bits & 0x7FFFFF) != 0).to(tl.int32)
        scale = (((bits >> 23) + up) << 23).to(tl.float32, bitcast=True)
    return scale


@triton.jit
def to_codes(value, scale):
    """E4M3 of value / scale; no clamp, because the hardware's cast saturates."""
    return tl.math.div_rn(value, scale).to(tl.float8e4nv)


@triton.jit
def quantise_rows_kernel(x, codes, scales, T, K, floor, POWER_OF_TWO: tl.constexpr, ROWS: tl.constexpr):
    t, block = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1)
    k = block * 128 + tl.arange(0, 128)
    place, inside = t[:, None].to(tl.int64) * K + k[None, :], (t < T)[:, None] & (k < K)[None, :]
    value = tl.load(x + place, mask=inside, other=0.0).to(tl.float32)
    scale = scale_of(tl.max(tl.abs(value), 1), floor, POWER_OF_TWO)
    tl.store(codes + place, to_codes(value, scale[:, None]), mask=inside)
    tl.store(scales + block.to(tl.int64) * T + t, scale, mask=t < T)


@triton.jit
def quantise_blocks_kernel(w, codes, scales, N, K, floor):
    n, k = tl.program_id(0) * 128 + tl.arange(0, 128), tl.program_id(1) * 128 + tl.arange(0, 128)
    place, inside = n[:, None].to(tl.int64) * K + k[None, :], (n < N)[:, None] & (k < K)[None, :]
    value = tl.load(w + place, mask=inside, other=0.0).to(tl.float32)
    scale = scale_of(tl.max(tl.max(tl.abs(value), 1), 0), floor, False)
    tl.store(codes + place, to_codes(value, scale), mask=inside)
    tl.store(scales + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), scale)


@triton.jit
def quantise_columns_kernel(x, row_scales, codes, scales, T, K, floor, FROM_FP8: tl.constexpr, COLUMNS: tl.constexpr):
    """Reads (128 tokens, COLUMNS channels), channels contiguous; writes the transpose, tokens contiguous. COLUMNS divides 128."""
    block, k = tl.program_id(0), tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    t = block * 128 + tl.arange(0, 128)
    inside = (t < T)[:, None] & (k < K)[None, :]
    value = tl.load(x + t[:, None].to(tl.int64) * K + k[None, :], mask=inside, other=0.0).to(tl.float32)
    if FROM_FP8:
        row_block = (tl.program_id(1) * COLUMNS // 128).to(tl.int64)
        value *= tl.load(row_scales + row_block * T + t, mask=t < T, other=0.0)[:, None]
    scale = scale_of(tl.max(tl.abs(value), 0), floor, False)
    turned = tl.trans(to_codes(value, scale[None, :]))
    tl.store(codes + k[:, None].to(tl.int64) * T + t[None, :], turned, mask=(k < K)[:, None] & (t < T)[None, :])
    tl.store(scales + block.to(tl.int64) * K + k, scale, mask=k < K)


_SIZES = {"T": "i32", "K": "i32:16", "floor": "fp32"}
CONFIGS = (
    *(
        KernelConfig(
            kernel=quantise_rows_kernel,
            name=f"quantise_rows{', powers of two' if power_of_two else ''}{'' if rows == 16 else f', {rows} rows'}",
            signature={"x": "*bf16", "codes": "*fp8e4nv", "scales": "*fp32", **_SIZES},
            meta={"POWER_OF_TWO": power_of_two, "ROWS": rows},
            architectures=FP8_TENSOR_CORES if rows == 16 else (90,),
        )
        for rows in (16, 8, 32)  # launched is the first: `shoestring bench kernels --tune` says which should be
        for power_of_two in (False, True)
    ),
    KernelConfig(
        kernel=quantise_blocks_kernel,
        name="quantise_blocks",
        signature={"w": "*bf16", "codes": "*fp8e4nv", "scales": "*fp32", "N": "i32", "K": "i32:16", "floor": "fp32"},
        meta={},
        num_warps=16,
        architectures=FP8_TENSOR_CORES,
    ),
    *(
        KernelConfig(
            kernel=quantise_columns_kernel,
            name=("columns_of" if from_fp8 else "quantise_columns") + ("" if columns == 64 else f", {columns} columns"),
            signature={"x": "*fp8e4nv" if from_fp8 else "*bf16", "row_scales": "*fp32", "codes": "*fp8e4nv", "scales": "*fp32", **_SIZES},
            meta={"FROM_FP8": from_fp8, "COLUMNS": columns},
            num_warps=8 if columns == 64 else 4,
            architectures=FP8_TENSOR_CORES if columns == 64 else (90,),
        )
        for columns in (64, 32)
        for from_fp8 in (False, True)
    ),
)


def _matrix(x: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    if x.dtype != dtype:
        raise TypeError(f"on a GPU this cast to FP8 reads {dtype}, and was given {x.dtype}: no kernel for that is compiled and checked")
    return x.contiguous()


def _outputs(x: Tensor, shape: tuple[int, int], scales: tuple[int, int]) -> tuple[Tensor, Tensor]:
    return x.new_empty(shape, dtype=torch.float8_e4m3fn), x.new_empty(scales, dtype=torch.float32)


def quantise_rows_triton(x: Tensor, power_of_two: bool, floor: float) -> tuple[Tensor, Tensor]:
    (T, K), x = x.shape, _matrix(x)
    codes, scales = _outputs(x, (T, K), (triton.cdiv(K, BLOCK), T))
    config = choose(CONFIGS, quantise_rows_kernel, POWER_OF_TWO=power_of_two)
    if T:
        grid = triton.cdiv(T, config.meta["ROWS"]), triton.cdiv(K, BLOCK)
        quantise_rows_kernel[grid](x, codes, scales, T, K, floor, **config.options)
    return codes, scales


def quantise_blocks_triton(w: Tensor) -> tuple[Tensor, Tensor]:
    (N, K), w = w.shape, _matrix(w)
    grid = triton.cdiv(N, BLOCK), triton.cdiv(K, BLOCK)
    codes, scales = _outputs(w, (N, K), grid)
    config = choose(CONFIGS, quantise_blocks_kernel)
    quantise_blocks_kernel[grid](w, codes, scales, N, K, ACTIVATION_FLOOR, **config.options)
    return codes, scales


def quantise_columns_triton(x: Tensor, row_scales: Tensor | None, floor: float) -> tuple[Tensor, Tensor]:
    (T, K), x = x.shape, _matrix(x, torch.bfloat16 if row_scales is None else torch.float8_e4m3fn)
    codes, scales = _outputs(x, (K, T), (triton.cdiv(T, BLOCK), K))
    config = choose(CONFIGS, quantise_columns_kernel, FROM_FP8=row_scales is not None)
    if T:
        grid = triton.cdiv(T, BLOCK), triton.cdiv(K, config.meta["COLUMNS"])
        quantise_columns_kernel[grid](x, scales if row_scales is None else row_scales, codes, scales, T, K, floor, **config.options)
    return codes, scales


# ---------------------------------------------------------------- the operators, over plain tensors


@torch.library.custom_op("shoestring::quantise_rows", mutates_args=())
def _rows(x: Tensor, power_of_two: bool, floor: float) -> tuple[Tensor, Tensor]:
    if x.is_cuda:
        return quantise_rows_triton(x, power_of_two, floor)
    q = quantise_rows_reference(x, power_of_two=power_of_two, floor=floor)
    return q.codes, q.scales


@_rows.register_fake
def _(x, power_of_two, floor):
    return _outputs(x, x.shape, (-(-x.shape[1] // BLOCK), x.shape[0]))


@torch.library.custom_op("shoestring::quantise_blocks", mutates_args=())
def _blocks(w: Tensor) -> tuple[Tensor, Tensor]:
    if w.is_cuda:
        return quantise_blocks_triton(w)
    q = quantise_blocks_reference(w)
    return q.codes, q.scales


@_blocks.register_fake
def _(w):
    return _outputs(w, w.shape, (-(-w.shape[0] // BLOCK), -(-w.shape[1] // BLOCK)))


@torch.library.custom_op("shoestring::quantise_columns", mutates_args=())
def _columns(x: Tensor, row_scales: Tensor | None, floor: float) -> tuple[Tensor, Tensor]:
    if x.is_cuda:
        return quantise_columns_triton(x, row_scales, floor)
    q = (
        columns_of_reference(Quantised(x, row_scales), floor=floor)
        if row_scales is not None
        else quantise_columns_reference(x, floor=floor)
    )
    return q.codes, q.scales


@_columns.register_fake
def _(x, row_scales, floor):
    return _outputs(x, (x.shape[1], x.shape[0]), (-(-x.shape[0] // BLOCK), x.shape[1]))


def quantise_rows(x_TK: Tensor, *, power_of_two: bool = False, floor: float = ACTIVATION_FLOOR) -> Quantised:
    """(T, K), BF16 (on CPU, any float) -> codes (T, K), scales (ceil(K / 128), T): K-block-major, so that a tile's scales load together.

    `power_of_two`: scales are rounded up to 2^n, for what is dispatched and for the attention output projection's input. T may be 0.
    """
    return Quantised(*_rows(x_TK, power_of_two, floor))


def quantise_blocks(w_NK: Tensor) -> Quantised:
    """A weight (N, K), BF16 (on CPU, any float) -> codes (N, K), scales (ceil(N / 128), ceil(K / 128))."""
    return Quantised(*_blocks(w_NK))


def quantise_columns(x_TK: Tensor, *, floor: float = ACTIVATION_FLOOR) -> Quantised:
    """(T, K), BF16 (on CPU, any float) -> of its transpose by rows: codes (K, T), scales (ceil(T / 128), K). What wgrad reads."""
    return Quantised(*_columns(x_TK, None, floor))


def columns_of(q: Quantised, *, floor: float = ACTIVATION_FLOOR) -> Quantised:
    """From `quantise_rows`' codes (T, K) and scales: the same as `quantise_columns` of what they stand for."""
    return Quantised(*_columns(q.codes, q.scales, floor))


# ---------------------------------------------------------------- cost: no FLOPs; bytes


def rows_bytes(T: int, K: int) -> int:
    """Of a (T, K) matrix as `quantise_rows` stores it. Columns: `rows_bytes(K, T)`. A cast moves these and those of its input."""
    return T * K + 4 * T * -(-K // BLOCK)


def blocks_bytes(N: int, K: int) -> int:
    """Of a weight (N, K) as `quantise_blocks` stores it."""
    return N * K + 4 * -(-N // BLOCK) * -(-K // BLOCK)
