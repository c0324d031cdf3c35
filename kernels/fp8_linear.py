"""y = x W^T in FP8 (DeepSeek-V3 §3.3): forward, input gradient and weight gradient all multiply E4M3 codes.

    forward           x, 1 x 128 along I     W, 128 x 128        y   rounded once to the rows' dtype
    input gradient    g, 1 x 128 along O     W^T, 128 x 128      gx  likewise
    weight gradient   g^T, 1 x 128 along R   x^T, 1 x 128 along R   added to `main_grad` in FP32

Codes of 128 of the summed dim are multiplied, the product is scaled in FP32, and such parts are added in FP32: a tensor core that adds FP8
products keeps too few bits for longer sums. `fp8_layers.py` makes steps of autograd of these.

R rows   I input dim   O output dim   M, N rows and columns of a product   K summed dim
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from .configs import FP8_TENSOR_CORES, KernelConfig, choose
from .quantise import BLOCK, Quantised, decode


def fp8_matmul_reference(a: Quantised, b: Quantised, dtype: torch.dtype) -> Tensor:
    """(M, K) by rows, (N, K) by blocks -> (M, N) in `dtype`."""
    sum_MN = torch.zeros(len(a.codes), len(b.codes), device=a.codes.device)
    scale_kN = b.scales.t().repeat_interleave(BLOCK, 1)[:, : len(b.codes)]
    for a_Mk, a_scale_M, b_Nk, b_scale_N in zip(decode(a.codes).split(BLOCK, 1), a.scales, decode(b.codes).split(BLOCK, 1), scale_kN):
        sum_MN += (a_Mk @ b_Nk.t()) * (a_scale_M[:, None] * b_scale_N)
    return sum_MN.to(dtype)


def add_fp8_outer_reference(main_MN: Tensor, a: Quantised, b: Quantised) -> None:
    """main += a b^T in FP32: (M, K) and (N, K), both by rows."""
    sum_MN = torch.zeros(main_MN.shape, device=main_MN.device)
    for a_Mk, a_scale_M, b_Nk, b_scale_N in zip(decode(a.codes).split(BLOCK, 1), a.scales, decode(b.codes).split(BLOCK, 1), b.scales):
        sum_MN += (a_Mk @ b_Nk.t()) * a_scale_M[:, None] * b_scale_N
    main_MN.add_(sum_MN)


# ---------------------------------------------------------------- Triton


@triton.jit
def fp8_matmul_kernel(
    a, b, c, a_scales, b_scales, expert_of_tile, M, N, K, B_ROWS,
    GROUPED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPECIALISED: tl.constexpr,
):  # fmt: skip
    """c = a b^T, a tile (BM, BN) of it per program, BN at most 128. GROUPED: b holds one (N, K) after another, and the tiles of rows pm
    belong to expert_of_tile[pm], which is past the last expert where they are nobody's. What lies outside is read as 0 and not written: K
    and N may end inside a block."""
    pm, pn = _tile(tl.program_id(0), tl.cdiv(M, BM), tl.cdiv(N, BN))
    row, column, blocks = pm * BM, pn * BN, tl.cdiv(K, 128)
    b_row, b_block, steps = column, column // 128, blocks
    if GROUPED:
        expert = tl.load(expert_of_tile + pm)
        b_row, b_block = b_row + expert * N, b_block + expert * tl.cdiv(N, 128)
        steps = tl.where(b_row < B_ROWS, blocks, 0)
    a_tiles = tl.make_tensor_descriptor(a, [M, K], [K, 1], [BM, 128])
    b_tiles = tl.make_tensor_descriptor(b, [B_ROWS, K], [K, 1], [BN, 128])
    m = row + tl.arange(0, BM)
    total = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, steps, warp_specialize=SPECIALISED):
        scale = tl.load(a_scales + k * M + m, mask=m < M, other=0.0) * tl.load(b_scales + b_block * blocks + k)
        total += tl.dot(a_tiles.load([row, k * 128]), b_tiles.load([b_row, k * 128]).T) * scale[:, None]
    tl.make_tensor_descriptor(c, [M, N], [N, 1], [BM, BN]).store([row, column], total.to(c.dtype.element_ty))


@triton.jit
def _tile(program, num_m, num_n):
    """Eight rows of tiles at a time, column by column: programs that run together share what they read."""
    first = program // (8 * num_n) * 8
    height = tl.minimum(num_m - first, 8)
    within = program % (8 * num_n)
    return first + within % height, within // height


@triton.jit
def add_fp8_outer_kernel(
    main, a, b, a_scales, b_scales, ends, M, N, K,
    GROUPED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPECIALISED: tl.constexpr,
):  # fmt: skip
    """main += a b^T, a tile (BM, BN) of it per program. GROUPED: one main after another, each over its part of K, up to its `ends`."""
    row, column, expert = tl.program_id(0) * BM, tl.program_id(1) * BN, tl.program_id(2)
    first, last = 0, tl.cdiv(K, 128)
    if GROUPED:
        first, last = tl.load(ends + expert - 1, mask=expert > 0, other=0) // 128, tl.load(ends + expert) // 128
    a_tiles = tl.make_tensor_descriptor(a, [M, K], [K, 1], [BM, 128])
    b_tiles = tl.make_tensor_descriptor(b, [N, K], [K, 1], [BN, 128])
    m, n = row + tl.arange(0, BM), column + tl.arange(0, BN)
    total = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(first, last, warp_specialize=SPECIALISED):
        a_scale, b_scale = tl.load(a_scales + k * M + m, mask=m < M, other=0.0), tl.load(b_scales + k * N + n, mask=n < N, other=0.0)
        total += tl.dot(a_tiles.load([row, k * 128]), b_tiles.load([column, k * 128]).T) * a_scale[:, None] * b_scale[None, :]
    place = main + expert.to(tl.int64) * M * N + m[:, None].to(tl.int64) * N + n[None, :]
    inside = (m < M)[:, None] & (n < N)[None, :]
    tl.store(place, tl.load(place, mask=inside, other=0.0) + total, mask=inside)


_FORMS = {  # the first that the GPU is for is launched; which is the fastest, a GPU has to say: `shoestring bench kernels --tune`
    "specialised": dict(tile=(128, 128), specialised=True, num_warps=4, num_stages=4, architectures=(90,)),  # on Blackwell it spills
    "eight warps": dict(tile=(128, 128), specialised=False, num_warps=8, num_stages=3),
    "two programs per SM": dict(tile=(64, 128), specialised=False, num_warps=4, num_stages=3),
    "specialised, five stages": dict(tile=(128, 128), specialised=True, num_warps=4, num_stages=5, architectures=(90,)),
    "specialised, narrow": dict(tile=(128, 64), specialised=True, num_warps=4, num_stages=6, architectures=(90,)),
    "eight warps, four stages": dict(tile=(128, 128), specialised=False, num_warps=8, num_stages=4, architectures=(90,)),
    "two programs per SM, narrow": dict(tile=(128, 64), specialised=False, num_warps=4, num_stages=3, architectures=(90,)),
    "eight warps, tall": dict(tile=(256, 64), specialised=False, num_warps=8, num_stages=3, architectures=(90,)),
}
_OPERANDS = {"a": "*fp8e4nv", "b": "*fp8e4nv", "a_scales": "*fp32", "b_scales": "*fp32", "N": "i32:16", "K": "i32:16"}
_MATMUL = {**_OPERANDS, "c": "*bf16", "expert_of_tile": "*i32", "M": "i32", "B_ROWS": "i32:16"}
_OUTER = {**_OPERANDS, "main": "*fp32", "ends": "*i32", "M": "i32:16"}


CONFIGS = tuple(
    KernelConfig(
        kernel=kernel,
        name=f"{name}{' grouped' if grouped else ''}, {form}",
        signature=signature,
        meta={"GROUPED": grouped, "BM": how["tile"][0], "BN": how["tile"][1], "SPECIALISED": how["specialised"]},
        num_warps=how["num_warps"],
        num_stages=how["num_stages"],
        architectures=how.get("architectures", FP8_TENSOR_CORES),
        operands="fp8",
        macs_per_step=how["tile"][0] * how["tile"][1] * BLOCK,
        warp_specialised=how["specialised"],
    )
    for kernel, name, signature in ((fp8_matmul_kernel, "fp8_matmul", _MATMUL), (add_fp8_outer_kernel, "add_fp8_outer", _OUTER))
    for grouped in (False, True)
    for form, how in _FORMS.items()
    if not grouped or how["tile"][0] <= BLOCK  # a tile of rows has one expert
)


def _chosen(kernel: Callable, grouped: bool) -> KernelConfig:
    """The first that is for the current GPU. Warp specialisation is Hopper's."""
    hopper = torch.cuda.get_device_capability() == (9, 0)
    return choose(tuple(c for c in CONFIGS if hopper or not c.warp_specialised), kernel, GROUPED=grouped)


def matmul_triton(
    a: Quantised, b: Quantised, dtype: torch.dtype, ends_e: Tensor | None = None, *, config: KernelConfig | None = None
) -> Tensor:
    """`fp8_matmul`; with `ends_e`, `fp8_grouped_matmul`. TypeError unless `dtype` is BF16, for which alone the kernel is compiled ahead."""
    if dtype != torch.bfloat16:
        raise TypeError(f"an FP8 product in {dtype} on a GPU: only torch.bfloat16 is compiled and checked (precision.compute=bf16)")
    config = config or _chosen(fp8_matmul_kernel, ends_e is not None)
    (M, K), N, BM, BN = a.codes.shape, b.codes.shape[-2], config.meta["BM"], config.meta["BN"]
    out = a.codes.new_empty(M, N, dtype=dtype)
    expert_of_tile = a.scales  # not read
    if ends_e is not None:
        expert_of_tile = torch.searchsorted(
            ends_e, torch.arange(0, M, BM, dtype=torch.int32, device=ends_e.device), right=True, out_int32=True
        )
    if M:
        triton.set_allocator(_workspace)
        fp8_matmul_kernel[triton.cdiv(M, BM) * triton.cdiv(N, BN),](
            a.codes, b.codes, out, a.scales, b.scales, expert_of_tile, M, N, K, b.codes.numel() // K, **config.options
        )  # fmt: skip
    return out


def add_outer_triton(main: Tensor, a: Quantised, b: Quantised, ends_e: Tensor | None = None, *, config: KernelConfig | None = None) -> None:
    """`add_fp8_outer`; with `ends_e`, `add_fp8_grouped_outer`."""
    config = config or _chosen(add_fp8_outer_kernel, ends_e is not None)
    (M, K), N, experts = a.codes.shape, len(b.codes), 1 if ends_e is None else len(ends_e)
    if K:
        triton.set_allocator(_workspace)
        add_fp8_outer_kernel[triton.cdiv(M, config.meta["BM"]), triton.cdiv(N, config.meta["BN"]), experts](
            main, a.codes, b.codes, a.scales, b.scales, a.scales if ends_e is None else ends_e, M, N, K, **config.options
        )  # fmt: skip


def _workspace(size: int, alignment: int, stream: int | None) -> Tensor:
    """Where kernels write the descriptors that they make. Triton asks in each thread anew, and autograd has its own."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


# ---------------------------------------------------------------- the operators, over plain tensors


@torch.library.custom_op("shoestring::fp8_matmul", mutates_args=())
def _matmul(a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor, dtype: torch.dtype) -> Tensor:
    matmul = matmul_triton if a.is_cuda else fp8_matmul_reference
    return matmul(Quantised(a, a_scales), Quantised(b, b_scales), dtype)


@_matmul.register_fake
def _(a, a_scales, b, b_scales, dtype):
    return a.new_empty(len(a), len(b), dtype=dtype)


@torch.library.custom_op("shoestring::add_fp8_outer", mutates_args={"main"})
def _add_outer(main: Tensor, a: Tensor, a_scales: Tensor, b: Tensor, b_scales: Tensor) -> None:
    add_outer = add_outer_triton if a.is_cuda else add_fp8_outer_reference
    add_outer(main, Quantised(a, a_scales), Quantised(b, b_scales))


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
