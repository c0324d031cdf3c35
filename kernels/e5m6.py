"""A 12-bit float, for the attention output that is kept for backward: 5 bits of exponent (bias 15), 6 of mantissa; IEEE-like.

    seeeeemmmmmm     the upper 12 bits of an FP16 number, so that reading it is a shift          largest 65024, smallest 2^-20

Each tile of 128 channels of a token has a scale that is a power of two (so that only the 12 bits round), and is stored in 192 bytes:

    byte  0 .. 127   the lower 8 bits of each value
    byte 128 .. 191  the upper 4 bits of values j (lower nibble) and 64 + j (upper nibble)

T tokens   K channels   B = ceil(K / 128)

Rounding is to nearest even, subnormals included; what is too large saturates. NaN stays NaN; an infinity makes its tile read back as NaN.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .configs import ALL, KernelConfig, choose
from .quantise import ACTIVATION_FLOOR, BLOCK, largest_reference, scale_of, scales_reference

E5M6_MAX = 65024.0
TILE_BYTES = BLOCK * 3 // 2


@dataclass(frozen=True)
class Packed:
    """`data` (T, 192 B), uint8, and `scales` (B, T), FP32, of `channels` K."""

    data: Tensor
    scales: Tensor
    channels: int


# ---------------------------------------------------------------- references


def encode_reference(x: Tensor) -> Tensor:
    """FP32 -> codes, int32 of 12 bits."""
    exponent = torch.frexp(x).exponent.sub(1).clamp_min(-14)
    step = torch.ldexp(torch.ones_like(x), exponent - 6)
    rounded = ((x / step).round() * step).clamp(-E5M6_MAX, E5M6_MAX)  # round() is to even; all of it exact in FP32
    return (rounded.half().view(torch.int16).int() >> 4) & 0xFFF


def decode_reference(codes: Tensor) -> Tensor:
    """Codes, int32 -> FP32, exactly."""
    return (codes << 4).to(torch.int16).view(torch.float16).float()


def pack_e5m6_reference(x_TK: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    T, K = x_TK.shape
    tiles = F.pad(x_TK.float(), (0, -K % BLOCK)).view(T, -(-K // BLOCK), BLOCK)
    scales = scales_reference(largest_reference(tiles, 2), power_of_two=True, floor=floor, top=E5M6_MAX)
    codes = encode_reference(tiles / scales[:, :, None])
    first, second = (codes >> 8).chunk(2, 2)
    data = torch.cat([codes & 0xFF, first | second << 4], 2).to(torch.uint8)
    return data.flatten(1), scales.T.contiguous()


def unpack_e5m6_reference(data: Tensor, scales: Tensor, channels: int, dtype: torch.dtype) -> Tensor:
    low, high = data.view(len(data), len(scales), TILE_BYTES).int().split([BLOCK, BLOCK // 2], 2)
    codes = low | torch.cat([high & 0xF, high >> 4], 2) << 8
    return (decode_reference(codes) * scales.T[:, :, None]).flatten(1)[:, :channels].to(dtype, memory_format=torch.contiguous_format)


# ---------------------------------------------------------------- Triton


@triton.jit
def encode(x):
    bits = x.to(tl.int32, bitcast=True)
    magnitude = bits & 0x7FFFFFFF
    normal = ((magnitude + 0xFFFF + ((magnitude >> 17) & 1)) >> 17) - (112 << 6)
    # below 2^-14 the step is 2^-20, which is that of FP32 at 8: the sum's own rounding, to even, leaves the code in its last bits
    subnormal = (tl.abs(x) + 8.0).to(tl.int32, bitcast=True) - 0x41000000
    code = tl.minimum(tl.where(magnitude < 0x38800000, subnormal, normal), 0x7BF)
    return tl.where(magnitude > 0x7F800000, 0x7E0, code) | ((bits >> 20) & 0x800)


@triton.jit
def decode(code):
    return (code << 4).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def pack_e5m6_kernel(x, data, scales, T, K, floor, ROWS: tl.constexpr):
    t, block, j = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1), tl.arange(0, 64)
    row, inside = t.to(tl.int64)[:, None], (t < T)[:, None]
    k = block * 128 + j[None, :]
    first = tl.load(x + row * K + k, mask=inside & (k < K), other=0.0).to(tl.float32)
    second = tl.load(x + row * K + k + 64, mask=inside & (k + 64 < K), other=0.0).to(tl.float32)
    scale = scale_of(tl.max(tl.maximum(tl.abs(first), tl.abs(second)), 1), floor, True, 65024.0)
    first, second = encode(tl.math.div_rn(first, scale[:, None])), encode(tl.math.div_rn(second, scale[:, None]))
    place = data + row * (tl.num_programs(1) * 192) + block * 192 + j[None, :]
    tl.store(place, first.to(tl.uint8), mask=inside)
    tl.store(place + 64, second.to(tl.uint8), mask=inside)
    tl.store(place + 128, ((first >> 8) | (second >> 8 << 4)).to(tl.uint8), mask=inside)
    tl.store(scales + block.to(tl.int64) * T + t, scale, mask=t < T)


@triton.jit
def unpack_e5m6_kernel(data, scales, x, T, K, ROWS: tl.constexpr):
    t, block, j = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1), tl.arange(0, 64)
    row, inside = t.to(tl.int64)[:, None], (t < T)[:, None]
    place = data + row * (tl.num_programs(1) * 192) + block * 192 + j[None, :]
    high = tl.load(place + 128, mask=inside, other=0).to(tl.int32)
    first = tl.load(place, mask=inside, other=0).to(tl.int32) | ((high & 0xF) << 8)
    second = tl.load(place + 64, mask=inside, other=0).to(tl.int32) | ((high >> 4) << 8)
    scale = tl.load(scales + block.to(tl.int64) * T + t, mask=t < T, other=0.0)[:, None]
    k = block * 128 + j[None, :]
    tl.store(x + row * K + k, (decode(first) * scale).to(tl.bfloat16), mask=inside & (k < K))
    tl.store(x + row * K + k + 64, (decode(second) * scale).to(tl.bfloat16), mask=inside & (k + 64 < K))


CONFIGS = (
    KernelConfig(
        kernel=pack_e5m6_kernel,
        name="pack_e5m6",
        signature={"x": "*bf16", "data": "*u8", "scales": "*fp32", "T": "i32", "K": "i32:16", "floor": "fp32"},
        meta={"ROWS": 16},
        architectures=ALL,
    ),
    KernelConfig(
        kernel=unpack_e5m6_kernel,
        name="unpack_e5m6",
        signature={"data": "*u8", "scales": "*fp32", "x": "*bf16", "T": "i32", "K": "i32:16"},
        meta={"ROWS": 16},
        architectures=ALL,
    ),
)


def pack_e5m6_triton(x: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    if x.dtype != torch.bfloat16:
        raise TypeError(f"on a GPU E5M6 is packed from torch.bfloat16, not {x.dtype}: no kernel for that is compiled and checked")
    (T, K), x = x.shape, x.contiguous()
    data, scales = _outputs(x)
    config = choose(CONFIGS, pack_e5m6_kernel)
    if T:
        pack_e5m6_kernel[triton.cdiv(T, config.meta["ROWS"]), len(scales)](x, data, scales, T, K, floor, **config.options)
    return data, scales


def unpack_e5m6_triton(data: Tensor, scales: Tensor, channels: int) -> Tensor:
    T, x = len(data), data.new_empty((len(data), channels), dtype=torch.bfloat16)
    config = choose(CONFIGS, unpack_e5m6_kernel)
    if T:
        unpack_e5m6_kernel[triton.cdiv(T, config.meta["ROWS"]), len(scales)](data, scales, x, T, channels, **config.options)
    return x


# ---------------------------------------------------------------- the operators, over plain tensors


def _outputs(x: Tensor) -> tuple[Tensor, Tensor]:
    T, blocks = x.shape[0], -(-x.shape[1] // BLOCK)
    return x.new_empty((T, blocks * TILE_BYTES), dtype=torch.uint8), x.new_empty((blocks, T), dtype=torch.float32)


@torch.library.custom_op("shoestring::pack_e5m6", mutates_args=())
def _pack(x: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    return pack_e5m6_triton(x, floor) if x.is_cuda else pack_e5m6_reference(x, floor)


@_pack.register_fake
def _(x, floor):
    return _outputs(x)


@torch.library.custom_op("shoestring::unpack_e5m6", mutates_args=())
def _unpack(data: Tensor, scales: Tensor, channels: int) -> Tensor:
    if data.is_cuda:
        return unpack_e5m6_triton(data, scales, channels)
    return unpack_e5m6_reference(data, scales, channels, torch.bfloat16)


@_unpack.register_fake
def _(data, scales, channels):
    return data.new_empty((data.shape[0], channels), dtype=torch.bfloat16)


def pack_e5m6(x_TK: Tensor, *, floor: float = ACTIVATION_FLOOR) -> Packed:
    """(T, K), BF16 (on CPU, any float) -> 12 bits for each value and an FP32 scale for each tile. T may be 0. No FLOPs."""
    return Packed(*_pack(x_TK, floor), x_TK.shape[1])


def unpack_e5m6(packed: Packed) -> Tensor:
    """What was packed, (T, K), BF16: off by at most 2^-7 of each value, and BF16's 2^-9."""
    return _unpack(packed.data, packed.scales, packed.channels)


def e5m6_bytes(T: int, K: int) -> int:
    """Of a (T, K) matrix as `pack_e5m6` stores it. Packing and unpacking move these and those of the BF16 matrix."""
    return T * -(-K // BLOCK) * (TILE_BYTES + 4)
