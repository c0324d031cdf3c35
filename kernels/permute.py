"""Rows gathered by an index in which -1 means "a row of zeros", and the sum of each token's copies.

Neither is a step of autograd: each is the other's backward, and whoever dispatches tokens knows which to call. An index out of range is
not looked for on a GPU: that would make the host wait.

T tokens   K copies of each   N rows there are   R rows wanted   D model dim   B = D / 128 scales of an FP8 row
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from .configs import ALL, KernelConfig, choose
from .quantise import Quantised

_WORD = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # rows are moved as bits


def permute_reference(x: Tensor, row_of_R: Tensor) -> Tensor:
    if len(x) == 0:
        return x.new_zeros(len(row_of_R), *x.shape[1:])
    bits = x.view(_WORD[x.element_size()])  # an FP8 tensor can hardly be indexed
    hole_R = (row_of_R < 0).view(-1, *[1] * (x.dim() - 1))
    return bits.index_select(0, row_of_R.clamp(min=0)).masked_fill_(hole_R, 0).view(x.dtype)


def sum_copies_reference(rows_RD: Tensor, row_of_TK: Tensor, weight_TK: Tensor | None = None) -> Tensor:
    copies_TKD = rows_RD[row_of_TK.flatten()].unflatten(0, row_of_TK.shape)
    if weight_TK is not None:
        copies_TKD = copies_TKD * weight_TK[:, :, None].to(torch.promote_types(rows_RD.dtype, torch.float32))
    return copies_TKD.sum(1).to(rows_RD.dtype)


# ---------------------------------------------------------------- Triton


@triton.jit
def _permute_kernel(x, row_of_R, out, R, D, ROWS: tl.constexpr, COLS: tl.constexpr):
    rows, cols = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1) * COLS + tl.arange(0, COLS)
    source = tl.load(row_of_R + rows, mask=rows < R, other=-1)[:, None].to(tl.int64)
    inside = (rows < R)[:, None] & (cols < D)[None, :]
    value = tl.load(x + source * D + cols[None, :], mask=inside & (source >= 0), other=0)
    tl.store(out + rows[:, None].to(tl.int64) * D + cols[None, :], value, mask=inside)


@triton.jit
def _permute_scales_kernel(scales, row_of_R, out, N, R, ROWS: tl.constexpr):
    """(B, N) -> (B, R): the scales of FP8 rows lie block by block."""
    rows, block = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.program_id(1).to(tl.int64)
    source = tl.load(row_of_R + rows, mask=rows < R, other=-1)
    value = tl.load(scales + block * N + source, mask=source >= 0, other=0.0)
    tl.store(out + block * R + rows, value, mask=rows < R)


@triton.jit
def _sum_copies_kernel(
    rows_RD, row_of_TK, weight_TK, out, T, D, K: tl.constexpr, WEIGHTED: tl.constexpr, TOKENS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    tokens, cols = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS), tl.program_id(1) * COLS + tl.arange(0, COLS)
    inside = (tokens < T)[:, None] & (cols < D)[None, :]
    total = tl.zeros((TOKENS, COLS), tl.float32)
    for k in tl.static_range(K):
        row = tl.load(row_of_TK + tokens * K + k, mask=tokens < T, other=0)[:, None].to(tl.int64)
        value = tl.load(rows_RD + row * D + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weight_TK + tokens * K + k, mask=tokens < T, other=0.0)[:, None]
        total += value
    tl.store(out + tokens[:, None].to(tl.int64) * D + cols[None, :], total.to(out.dtype.element_ty), mask=inside)


CONFIGS = (
    *(
        KernelConfig(
            kernel=_permute_kernel,
            name=f"permute, {size}-byte elements",
            signature={"x": kind, "row_of_R": "*i64", "out": kind, "R": "i32", "D": "i32:16"},
            meta={"ROWS": 4, "COLS": 2048 // size},
            architectures=ALL,
        )
        for size, kind in {1: "*u8", 2: "*i16", 4: "*i32"}.items()
    ),
    KernelConfig(
        kernel=_permute_scales_kernel,
        name="permute, scales",
        signature={"scales": "*fp32", "row_of_R": "*i64", "out": "*fp32", "N": "i32", "R": "i32"},
        meta={"ROWS": 128},
        architectures=ALL,
    ),
    *(
        KernelConfig(
            kernel=_sum_copies_kernel,
            name=f"sum_copies {dtype}{', weighted' if weighted else ''}",
            signature={"rows_RD": f"*{dtype}", "row_of_TK": "*i64", **({"weight_TK": "*fp32"} if weighted else {}), "out": f"*{dtype}"}
            | {"T": "i32", "D": "i32:16"},
            meta={"K": 8, "WEIGHTED": weighted, "TOKENS": 2, "COLS": 512} | ({} if weighted else {"weight_TK": None}),
            architectures=ALL,
        )
        for dtype in ("bf16", "fp32")
        for weighted in (False, True)
    ),
)


def permute_triton(x_ND: Tensor, row_of_R: Tensor) -> Tensor:
    out = x_ND.new_empty(len(row_of_R), x_ND.shape[1])
    word = _WORD[x_ND.element_size()]
    config = choose(CONFIGS, _permute_kernel, COLS=2048 // x_ND.element_size())
    if out.numel():
        grid = (triton.cdiv(out.shape[0], config.meta["ROWS"]), triton.cdiv(out.shape[1], config.meta["COLS"]))
        _permute_kernel[grid](x_ND.view(word), row_of_R, out.view(word), *out.shape, **config.options)
    return out


def permute_scales_triton(scales_BN: Tensor, row_of_R: Tensor) -> Tensor:
    out = scales_BN.new_empty(len(scales_BN), len(row_of_R))
    config = choose(CONFIGS, _permute_scales_kernel)
    if out.numel():
        grid = (triton.cdiv(len(row_of_R), config.meta["ROWS"]), len(scales_BN))
        _permute_scales_kernel[grid](scales_BN, row_of_R, out, scales_BN.shape[1], len(row_of_R), **config.options)
    return out


def sum_copies_triton(rows_RD: Tensor, row_of_TK: Tensor, weight_TK: Tensor | None = None) -> Tensor:
    out = rows_RD.new_empty(len(row_of_TK), rows_RD.shape[1])
    config = choose(CONFIGS, _sum_copies_kernel, WEIGHTED=weight_TK is not None)
    options = config.options | {"K": row_of_TK.shape[1], "weight_TK": weight_TK}
    if out.numel():
        grid = (triton.cdiv(out.shape[0], config.meta["TOKENS"]), triton.cdiv(out.shape[1], config.meta["COLS"]))
        _sum_copies_kernel[grid](rows_RD=rows_RD, row_of_TK=row_of_TK, out=out, T=out.shape[0], D=out.shape[1], **options)
    return out


# ---------------------------------------------------------------- operators: rehearsal traces them with fake tensors


@torch.library.custom_op("shoestring::permute", mutates_args=())
def _permute(x: Tensor, row_of_R: Tensor) -> Tensor:
    if x.is_cuda and x.dim() == 2 and x.dtype != torch.float64:  # vectors and FP64 are rare: torch's own kernels
        return permute_triton(x.contiguous(), row_of_R.contiguous())
    return permute_reference(x, row_of_R)


@torch.library.custom_op("shoestring::permute_scales", mutates_args=())
def _permute_scales(scales_BN: Tensor, row_of_R: Tensor) -> Tensor:
    if scales_BN.is_cuda:
        return permute_scales_triton(scales_BN.contiguous(), row_of_R.contiguous())
    return permute_reference(scales_BN.t(), row_of_R).t().contiguous()


@torch.library.custom_op("shoestring::sum_copies", mutates_args=())
def _sum_copies(rows_RD: Tensor, row_of_TK: Tensor, weight_TK: Tensor | None) -> Tensor:
    if rows_RD.is_cuda and rows_RD.dtype != torch.float64:
        return sum_copies_triton(rows_RD.contiguous(), row_of_TK.contiguous(), None if weight_TK is None else weight_TK.contiguous())
    if weight_TK is None and not rows_RD.is_cuda and len(row_of_TK):  # gathers and adds in one pass: five to ten times as fast
        wide = torch.promote_types(rows_RD.dtype, torch.float32)  # its own BF16 sums round ties away from zero
        return F.embedding_bag(row_of_TK, rows_RD.to(wide), mode="sum").to(rows_RD.dtype)
    return sum_copies_reference(rows_RD, row_of_TK, weight_TK)


_permute.register_fake(lambda x, row_of_R: x.new_empty(len(row_of_R), *x.shape[1:]))
_permute_scales.register_fake(lambda scales_BN, row_of_R: scales_BN.new_empty(len(scales_BN), len(row_of_R)))
_sum_copies.register_fake(lambda rows_RD, row_of_TK, weight_TK: rows_RD.new_empty(len(row_of_TK), rows_RD.shape[1]))


def permute(x_ND: Tensor, row_of_R: Tensor) -> Tensor:
    """(N, D) or (N,) of any dtype and int64 (R,) -> (R, D) or (R,): x[row_of_R], zero where the index is -1."""
    return _permute(x_ND, row_of_R)


def permute_quantised(x_ND: Quantised, row_of_R: Tensor) -> Quantised:
    """Codes (N, D), scales (B, N) -> codes (R, D), scales (B, R). Both are zero where the index is -1."""
    return Quantised(_permute(x_ND.codes, row_of_R), _permute_scales(x_ND.scales, row_of_R))


def sum_copies(rows_RD: Tensor, row_of_TK: Tensor, weight_TK: Tensor | None = None) -> Tensor:
    """(R, D) and int64 (T, K), optional FP32 (T, K) -> (T, D): each token's rows, times their weights, added in the order of K in FP32 or
    wider; BF16 is rounded at the end. No -1 here."""
    return _sum_copies(rows_RD, row_of_TK, weight_TK)


# ---------------------------------------------------------------- what they move


def permute_bytes(rows: int, dim: int, element_bytes: int) -> int:
    """Rows read and written, and their index. An FP8 row is `dim` bytes and a scale of 4 for every 128."""
    scales = 4 * -(-dim // 128) if element_bytes == 1 else 0
    return rows * (2 * (dim * element_bytes + scales) + 8)


def sum_copies_bytes(tokens: int, top_k: int, dim: int, element_bytes: int, *, weighted: bool = False) -> int:
    """Every copy read, the index and the weights with it; every token written."""
    return tokens * (top_k * (dim * element_bytes + 8 + 4 * weighted) + dim * element_bytes)
