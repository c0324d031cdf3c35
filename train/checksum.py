"""A sum over bits: of memory that nobody should have changed, and of replicas that should be alike. One flipped bit always shows."""

from collections.abc import Iterable

import torch
from torch import Tensor

PRIME = 2**53 - 111  # the largest below 2 ** 53
INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}  # bytes


def checksum(tensors: Iterable[Tensor]) -> int:
    """Of contiguous tensors, as whole numbers, modulo 2 ** 64; 0 of none. One read of the host for each device."""
    sums: dict[torch.device, list[Tensor]] = {}
    for t in tensors:
        left = t.detach().view(-1).view(torch.uint8)
        for width, dtype in INTEGERS.items():  # as wide as it begins in its storage; what is left over, narrower
            if left.storage_offset() % width == 0 and (whole := left.numel() // width * width):
                sums.setdefault(t.device, []).append(left[:whole].view(dtype).sum(dtype=torch.int64))
                left = left[whole:]
    return sum(int(torch.stack(parts).sum()) for parts in sums.values()) % 2**64


def short(total: int) -> int:
    """A checksum in 53 bits, which FP64 holds exactly: the upper ones count as well, since 2 ** n is never 0 or 1 modulo this prime."""
    return total % PRIME
