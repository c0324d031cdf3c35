"""What torch itself has for the same products, called as its kernels want their operands. What a version or a device refuses, raises.

M rows   N outputs   K summed dim   e experts
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...kernels.quantise import E4M3_MAX, Quantised
from .case import Peer

ROW_WISE, BLOCK_WISE = "torch row-wise FP8", "torch block-wise FP8"
BF16, BF16_GROUPED = "cuBLAS BF16", "torch grouped_mm BF16"
TRANSFORMERS = "transformers, grouped experts"


def row_cast(x: Tensor) -> tuple[Tensor, Tensor]:
    """(..., K) -> codes, and a scale for each row."""
    scale = x.abs().amax(-1, keepdim=True).float().clamp_min(1e-4) / E4M3_MAX
    return (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def row_wise(out: torch.dtype) -> Callable[..., Tensor]:
    def run(a_MK, scale_M1, b_KN, scale_1N):
        recipe = F.ScalingType.RowWise
        return F.scaled_mm(a_MK, b_KN, scale_M1, recipe, scale_1N, recipe, output_dtype=out)

    return run


def rows_for_torch(x_MK: Tensor, w_NK: Tensor) -> tuple:
    (a, scale_a), (b, scale_b) = row_cast(x_MK), row_cast(w_NK)
    return a, scale_a, b.t(), scale_b.t()


def block_wise(out: torch.dtype, *, weight: bool) -> Callable[..., Tensor]:
    """`weight`: b has 128 x 128 blocks, else 1 x 128 as a."""

    def run(a_MK, scale_a, b_KN, scale_b):
        by_rows, by_blocks = F.ScalingType.BlockWise1x128, F.ScalingType.BlockWise128x128
        return F.scaled_mm(a_MK, b_KN, scale_a, by_rows, scale_b, by_blocks if weight else by_rows, output_dtype=out)

    return run


def blocks_for_torch(a: Quantised, b: Quantised, *, weight: bool) -> tuple:
    """Scales of 1 x 128 lie as ours do; those of 128 x 128 are padded to a multiple of 4 along K (cuBLAS)."""
    scale_b = F.pad(b.scales, (0, -b.scales.shape[1] % 4)) if weight else b.scales
    return a.codes, a.scales.t(), b.codes.t(), scale_b.t()


def row_wise_grouped(a_RK, scale_R, b_eKN, scale_eN, ends_e) -> Tensor:
    recipe = F.ScalingType.RowWise
    return F.scaled_grouped_mm(a_RK, b_eKN, scale_R, recipe, scale_eN, recipe, offs=ends_e, output_dtype=torch.bfloat16)


def grouped_rows_for_torch(x_RK: Tensor, w_eNK: Tensor, ends_e: Tensor) -> tuple:
    (a, scale_a), (b, scale_b) = row_cast(x_RK), row_cast(w_eNK)
    return a, scale_a[:, 0], b.transpose(1, 2), scale_b[:, :, 0], ends_e


def plain_and_compiled(function: Callable, read: Callable | None, prepare: Callable[..., tuple] = lambda *args: args) -> tuple[Peer, Peer]:
    """The same arithmetic as torch's own operators, one after another, and as torch.compile fuses them."""
    compiled = []  # made at the first call: only where it is timed

    def fused(*args):
        if not compiled:
            compiled.append(torch.compile(function, dynamic=False))
        return compiled[0](*args)

    return (Peer(name="plain torch", run=function, prepare=prepare, read=read),
            Peer(name="torch.compile", run=fused, prepare=prepare, read=read))  # fmt: skip
