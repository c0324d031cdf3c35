"""What FP8 costs one linear, measured in one forward and backward against BF16 products of what was not quantised.

    casts      of input, weight and gradient: error, and shares of values
               saturated: beyond what rounds to the largest code (scales computed from the values themselves leave none)
               underflow: not zero, with a code that is
    products   forward, dgrad and wgrad: error

An error is relative: the norm of the difference over that of the BF16 tensor. Numbers stay on the device. Input that was dispatched, and
gradients that were, have been cast on the way: their own cast is not seen again.

R rows   e experts on this rank
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from .grouped import RowGroups, add_grouped_weight_grad, grouped_mm
from .quantise import E4M3_MAX, Quantised, dequantise_blocks, dequantise_rows
from .weight_grad import add_outer

CASTS, PRODUCTS = ("input", "weight", "gradient"), ("forward", "dgrad", "wgrad")
MEASURES = (*(f"{name}.{what}" for name in CASTS for what in ("error", "saturated", "underflow")), *(f"{name}.error" for name in PRODUCTS))


class Probe:
    """Of one linear; `groups` where it is experts'. `found` is by `MEASURES`' names, and whole after `backward`."""

    def __init__(self, weight: Tensor, groups: RowGroups | None):
        self.weight, self.groups = weight.detach(), groups
        self.found: dict[str, Tensor] = {}  # FP64 scalars
        self._rows: Tensor | None = None

    def forward(self, rows_RI: Tensor, cast: Quantised, blocks: Quantised, out_RO: Tensor) -> None:
        self._rows = self._own(rows_RI).clone()  # theirs may be given up before backward, to be made again
        self._cast("input", self._rows, cast, lambda q: self._own(dequantise_rows(q, torch.float32)))
        self._cast("weight", self.weight, blocks, _dequantise_each)
        self._error("forward.error", self._own(out_RO), self._own(self._product(rows_RI, self.weight)))

    def backward(self, grad_RO: Tensor, cast: Quantised, grad_RI: Tensor, wgrad: Tensor) -> None:
        grad = self._own(grad_RO)
        self._cast("gradient", grad, cast, lambda q: self._own(dequantise_rows(q, torch.float32)))
        self._error("dgrad.error", self._own(grad_RI), self._own(self._product(grad_RO, self.weight.transpose(-1, -2))))
        main = torch.zeros_like(wgrad)
        add_outer(main, grad_RO, self._rows) if self.groups is None else add_grouped_weight_grad(main, grad_RO, self._rows, self.groups)
        self._error("wgrad.error", wgrad, main)
        self._rows = None

    def _product(self, rows: Tensor, matrix: Tensor) -> Tensor:
        return F.linear(rows, matrix) if self.groups is None else grouped_mm(rows, matrix.transpose(-1, -2), self.groups)

    def _own(self, rows: Tensor) -> Tensor:
        """Zero where rows belong to no expert, which may hold anything."""
        if self.groups is None:
            return rows
        own_R = torch.arange(len(rows), device=rows.device) < self.groups.ends_e[-1]
        return torch.where(own_R[:, None], rows, 0)

    def _cast(self, name: str, plain: Tensor, cast: Quantised, wide: Callable[[Quantised], Tensor]) -> None:
        self._error(f"{name}.error", wide(cast), plain)
        reach = wide(Quantised(torch.full_like(cast.codes, E4M3_MAX), cast.scales)) * (1 + 16 / E4M3_MAX)  # half a step more
        some = (plain != 0).sum().clamp_min(1).double()
        self.found[f"{name}.saturated"] = (plain.float().abs() > reach).sum() / some
        self.found[f"{name}.underflow"] = ((wide(cast) == 0) & (plain != 0)).sum() / some

    def _error(self, name: str, found: Tensor, wanted: Tensor) -> None:
        wide = wanted.double()
        self.found[name] = (found.double() - wide).norm() / wide.norm().clamp_min(torch.finfo(torch.float64).tiny)


def _dequantise_each(blocks: Quantised) -> Tensor:
    """A weight, or each expert's."""
    if blocks.codes.dim() == 2:
        return dequantise_blocks(blocks, torch.float32)
    return torch.stack([dequantise_blocks(Quantised(*own), torch.float32) for own in zip(blocks.codes, blocks.scales)])
