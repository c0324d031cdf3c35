"""Weights of an FP8 checkpoint: E4M3 codes and one FP32 scale per 128 x 128 elements, `weight_scale_inv` (DeepSeek-V3 §3.3.2).

R rows   C columns   r rows of one strip, of blocks side by side: at most 128   weight = code * scale

Strip by strip, so that what is made on the way stays small beside the weight.
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
    return torch.stack([_scales(strip_rC) for strip_rC in weight_RC.split(SIDE)])


def quantise(weight_RC: Tensor) -> Tensor:
    """E4M3 codes (R, C)."""
    code_RC = torch.empty(weight_RC.shape, dtype=torch.float8_e4m3fn)
    for strip_rC, code_rC in zip(weight_RC.split(SIDE), code_RC.split(SIDE), strict=True):
        code_rC.copy_((strip_rC.float() / _spread(_scales(strip_rC), strip_rC)).clamp_(-_LARGEST, _LARGEST))
    return code_RC


def dequantise(code_RC: Tensor, scale: Tensor) -> Tensor:
    """FP32 (R, C): through BF16, no scale would survive."""
    weight_RC = code_RC.float()
    for strip_rC, scale_row in zip(weight_RC.split(SIDE), scale, strict=True):
        strip_rC.mul_(_spread(scale_row, strip_rC))
    return weight_RC


def grid(shape: tuple[int, ...] | torch.Size) -> tuple[int, int]:
    """Shape of the scales of a weight of this shape."""
    return -(-shape[0] // SIDE), -(-shape[1] // SIDE)


def _scales(strip_rC: Tensor) -> Tensor:
    """Of a strip of at most 128 rows, (ceil(C / 128),)."""
    amax_C = strip_rC.float().abs().amax(0)
    return F.pad(amax_C, (0, -len(amax_C) % SIDE)).view(-1, SIDE).amax(1).clamp_(min=_FLOOR) / _LARGEST


def _spread(scale_row: Tensor, strip_rC: Tensor) -> Tensor:
    """The scale of each column of a strip, (C,)."""
    return scale_row.repeat_interleave(SIDE)[: strip_rC.shape[1]]
