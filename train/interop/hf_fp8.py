"""Weights of an FP8 checkpoint: E4M3 codes and one FP32 scale per 128 x 128 elements, `weight_scale_inv` (DeepSeek-V3 §3.3.2).

R rows   C columns   weight = code * scale
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 128  # of a block
_LARGEST = 448.0  # of E4M3
_FLOOR = 1e-4  # a block's largest magnitude counts as at least this


def scales(weight_RC: Tensor) -> Tensor:
    """FP32 scales (ceil(R / 128), ceil(C / 128)) of a weight; blocks at the edges may be smaller.

    De-quantised to FP32 and quantised again, a weight gives the same codes and scales, bit for bit: a block's largest code is 448 (or
    its magnitude below the floor), and s = amax / 448 rounded survives a product with 448 and the quotient that follows, although amax
    may not (all 2**23 significands were tried).
    """
    rows, columns = grid(weight_RC.shape)
    padded = F.pad(weight_RC.float(), (0, columns * SIDE - weight_RC.shape[1], 0, rows * SIDE - weight_RC.shape[0]))
    amax = padded.abs().view(rows, SIDE, columns, SIDE).amax((1, 3)).clamp_(min=_FLOOR)
    return amax / _LARGEST


def quantise(weight_RC: Tensor) -> Tensor:
    """E4M3 codes (R, C)."""
    return (weight_RC.float() / _spread(scales(weight_RC), weight_RC.shape)).clamp_(-_LARGEST, _LARGEST).to(torch.float8_e4m3fn)


def dequantise(code_RC: Tensor, scale: Tensor) -> Tensor:
    """FP32 (R, C): through BF16, no scale would survive."""
    return code_RC.float().mul_(_spread(scale, code_RC.shape))


def grid(shape: tuple[int, ...] | torch.Size) -> tuple[int, int]:
    """Shape of the scales of a weight of this shape."""
    return -(-shape[0] // SIDE), -(-shape[1] // SIDE)


def _spread(scale: Tensor, shape: torch.Size) -> Tensor:
    """Each element's scale, (R, C)."""
    return scale.repeat_interleave(SIDE, 0)[: shape[0]].repeat_interleave(SIDE, 1)[:, : shape[1]]
