"""The angles of rotary position embedding, plain or stretched by YaRN (arXiv 2309.00071; DeepSeek-V3 §4.3).

S positions   P = rope dim / 2 pairs
"""

import math

import torch
from torch import Tensor

from ...conf.schema import ModelConfig, YarnConfig


def rotations(m: ModelConfig, seq_len: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Complex (S, P): the turn of each pair at each position, times YaRN's attention factor. complex128 for FP64, else complex64."""
    angles = torch.outer(torch.arange(seq_len, dtype=torch.float64), _frequencies(m).double())
    turned = torch.polar(torch.full_like(angles, _attention_factor(m.yarn)), angles)
    return turned.to(torch.complex128 if dtype == torch.float64 else torch.complex64).to(device)


def softmax_scale(m: ModelConfig) -> float:
    """1 / sqrt(query head dim); YaRN sharpens it by the square of its magnitude factor."""
    scale = m.qk_head_dim**-0.5
    if m.yarn.factor > 1 and m.yarn.mscale_all_dim:
        scale *= _magnitude(m.yarn.factor, m.yarn.mscale_all_dim) ** 2
    return scale


def _frequencies(m: ModelConfig) -> Tensor:
    dim, y = m.qk_rope_head_dim, m.yarn
    plain_P = 1.0 / m.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if y.factor <= 1:
        return plain_P

    def pair_turning(num_turns: float) -> float:  # the pair that turns this often within the original length
        return dim * math.log(y.original_max_seq_len / (num_turns * 2 * math.pi)) / (2 * math.log(m.rope_theta))

    low, high = max(math.floor(pair_turning(y.beta_fast)), 0), min(math.ceil(pair_turning(y.beta_slow)), dim - 1)
    # fast pairs keep their frequency, slow ones are divided by the factor, a ramp between
    slow_P = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    return plain_P / y.factor * slow_P + plain_P * (1 - slow_P)


def _magnitude(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _attention_factor(y: YarnConfig) -> float:
    """Both mscales 0 or missing: the paper's single factor."""
    if y.factor <= 1:
        return 1.0
    if y.mscale and y.mscale_all_dim:
        return _magnitude(y.factor, y.mscale) / _magnitude(y.factor, y.mscale_all_dim)
    return _magnitude(y.factor, 1.0)
