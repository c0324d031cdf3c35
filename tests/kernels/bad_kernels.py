"""A block-scaled FP8 matrix product, and the ways of writing or launching it that look right, compute right and must not be shipped."""

import triton
import triton.language as tl
from shoestring.kernels.configs import FP8_TENSOR_CORES, KernelConfig


@triton.jit
def product(
    a, b, c, a_scales, b_scales, M, N, K, FORM: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, WS: tl.constexpr
):
    a_tiles = tl.make_tensor_descriptor(a, [M, K], [K, 1], [BM, BK])
    b_tiles = tl.make_tensor_descriptor(b, [N, K], [K, 1], [BN, BK])
    row, column = tl.program_id(0) * BM, tl.program_id(1) * BN
    m = row + tl.arange(0, BM)
    total = tl.zeros((BM, BN), tl.float32)
    for i in tl.range(0, K // BK, warp_specialize=WS):
        x, y = a_tiles.load([row, i * BK]), b_tiles.load([column, i * BK])
        if FORM == "promoted":
            scale = tl.load(a_scales + i * M + m, mask=m < M, other=0.0) * tl.load(b_scales + (column // 128) * (K // 128) + i)
            total += tl.dot(x, y.T) * scale[:, None]
        elif FORM == "exact":
            total = tl.dot(x, y.T, total, max_num_imprecise_acc=0)
        else:
            total = tl.dot(x, y.T, total)
    tl.make_tensor_descriptor(c, [M, N], [N, 1], [BM, BN]).store([row, column], total.to(tl.bfloat16))


@triton.jit
def delayed(a, b, c, a_scales, b_scales, M, N, K, BM: tl.constexpr, BN: tl.constexpr):
    """Promotes a product while the next one runs."""
    a_tiles = tl.make_tensor_descriptor(a, [M, K], [K, 1], [BM, 128])
    b_tiles = tl.make_tensor_descriptor(b, [N, K], [K, 1], [BN, 128])
    row, column = tl.program_id(0) * BM, tl.program_id(1) * BN
    m = row + tl.arange(0, BM)
    total, odd, odd_scale = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, BN), tl.float32), tl.zeros((BM,), tl.float32)
    for i in tl.range(0, K // 128, 2):
        even_scale = tl.load(a_scales + i * M + m)
        even = tl.dot(a_tiles.load([row, i * 128]), b_tiles.load([column, i * 128]).T)
        total += odd * odd_scale[:, None]
        odd_scale = tl.load(a_scales + (i + 1) * M + m)
        odd = tl.dot(a_tiles.load([row, i * 128 + 128]), b_tiles.load([column, i * 128 + 128]).T)
        total += even * even_scale[:, None]
    total += odd * odd_scale[:, None]
    tl.make_tensor_descriptor(c, [M, N], [N, 1], [BM, BN]).store([row, column], total.to(tl.bfloat16))


SIGNATURE = {
    "a": "*fp8e4nv",
    "b": "*fp8e4nv",
    "c": "*bf16",
    "a_scales": "*fp32",
    "b_scales": "*fp32",
    "M": "i32",
    "N": "i32:16",
    "K": "i32:16",
}


def config(
    name: str, *, form="promoted", tile=(128, 128, 128), warp_specialised=False, num_warps=8, num_stages=3, **kwargs
) -> KernelConfig:
    BM, BN, BK = tile
    meta = {"BM": BM, "BN": BN} | ({"FORM": form, "BK": BK, "WS": warp_specialised} if form != "delayed" else {})
    return KernelConfig(
        kernel=delayed if form == "delayed" else product,
        name=name,
        signature=SIGNATURE,
        meta=meta,
        num_warps=num_warps,
        num_stages=num_stages,
        architectures=FP8_TENSOR_CORES,
        operands="fp8",
        macs_per_step=BM * BN * BK * (2 if form == "delayed" else 1),
        warp_specialised=warp_specialised,
        **kwargs,
    )


GOOD = [
    config("specialised", warp_specialised=True, num_warps=4, num_stages=4),
    config("eight warps"),
    config("two programs per SM", tile=(64, 128, 128), num_warps=4),
]
BAD = {  # what the gate must say about it
    "spills": config("too few registers", num_warps=4, num_stages=4),
    "2 x the multiply-adds": config(
        "each consumer computes the whole tile", tile=(64, 128, 128), warp_specialised=True, num_warps=4, num_stages=4
    ),
    "dropped the warp specialisation": config("too many warps to specialise", warp_specialised=True, num_stages=4),
    "serialised": config("too many products in flight", form="delayed", tile=(128, 64, 128), num_warps=4, num_stages=2),
    "no fp8 tensor-core instruction": config("widened to FP16", form="exact"),
    "additions in the main loop": config("never promoted", form="raw"),
    "promotion every 128": config("promoted every 256", tile=(64, 128, 256), num_warps=4, num_stages=2),
    "bytes of shared memory": config("too many stages", num_stages=8),
}
