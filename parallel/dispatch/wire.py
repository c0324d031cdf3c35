"""How rows travel: side by side with what belongs to them as raw bits, so that one exchange carries all of it and FP32 weights are not
rounded to BF16. A row in FP8 is bytes: codes, scales, zeros up to a multiple of 16 bytes in all, what else it carries.

N rows   D model dim   C payload columns   B = D / 128 scales of an FP8 row
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from ...kernels.quantise import ACTIVATION_FLOOR, BLOCK, GRADIENT_FLOOR, Quantised, quantise_rows
from ..phases import Pending
from ..transport import Transport


def quantised(x_ND: Tensor, direction: str) -> Quantised:
    return quantise_rows(x_ND.contiguous(), power_of_two=True, floor=ACTIVATION_FLOOR if direction == "F" else GRADIENT_FLOOR)


def as_bytes(q: Quantised, *, more: int) -> Tensor:
    """Codes (N, D) and scales (B, N) -> uint8 (N, C): with `more` bytes beside it, a row is a multiple of 16."""
    scales_NB = q.scales.t().clone(memory_format=torch.contiguous_format)  # of one block a row, torch takes any stride as contiguous
    parts = [q.codes.view(torch.uint8), scales_NB.view(torch.uint8)]
    width = sum(part.shape[1] for part in parts)
    return F.pad(torch.cat(parts, 1), (0, -(width + more) % 16))


def from_bytes(rows_NC: Tensor, dim: int) -> Quantised:
    """A row of zeros has the scale 0, and so reads back as zeros."""
    scales = rows_NC[:, dim : dim + 4 * -(-dim // BLOCK)].contiguous().view(torch.float32)
    return Quantised(rows_NC[:, :dim].contiguous().view(torch.float8_e4m3fn), scales.t().contiguous())


def attach(rows_NC: Tensor, *columns: Tensor) -> Tensor:
    """(N, C) and any (N, c) -> all side by side, as bits of the first; bytes with zeros up to a multiple of 16."""
    if not columns:
        return rows_NC
    row = torch.cat([rows_NC, *(c.contiguous().view(rows_NC.dtype) for c in columns)], 1)
    spare = -row.shape[1] % 16 if row.dtype == torch.uint8 else 0
    return F.pad(row, (0, spare)) if spare else row


def detach(rows_NC: Tensor, *kinds: tuple[int, torch.dtype]) -> list[Tensor]:
    """What `attach` put together: (N, c) for each number of columns c and dtype."""
    parts, at = [], 0
    for num, dtype in kinds:
        width = num * dtype.itemsize // rows_NC.dtype.itemsize
        parts.append(rows_NC[:, at : at + width].contiguous().view(dtype))
        at += width
    return parts


def exchange(
    rows: Tensor, group: dist.ProcessGroup, transport: Transport, *, received: list[int], sent: list[int], first: int = 0
) -> Pending:
    """-> (rows received,), after `first` rows of zeros. `received`, `sent`: rows per peer."""
    out = rows.new_empty(first + sum(received), rows.shape[1])
    out[:first].zero_()
    work = transport.all_to_all(out[first:], rows, group, received=received, sent=sent)
    return Pending(work=work, finish=lambda keep=rows: (out,))  # `rows` must live until the exchange is over
