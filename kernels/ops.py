"""The kernels as one rank uses them: bound to its weight-gradient store, to whether elementwise arithmetic is compiled, and to what is
recomputed in backward."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .cross_entropy import linear_cross_entropy
from .embedding import embedding
from .grouped import RowGroups, grouped_linear
from .linear import linear
from .recompute import discard, recomputed
from .rms_norm import rms_norm
from .rotary import rotate
from .swiglu import swiglu
from .weight_grad import WeightGradStore


@dataclass(frozen=True, kw_only=True)
class Ops:
    """Each method is the kernel of that name, in the file of that name, which has the shapes.

    `recompute`: names of what `recomputed` and `discard` act on; they do nothing for others.
    """

    store: WeightGradStore = field(default_factory=WeightGradStore)
    compiled: bool = False
    recompute: frozenset[str] = frozenset()

    def recomputed(self, name: str, made: Sequence[Tensor], by: Callable[[], Sequence[Tensor]]) -> contextlib.AbstractContextManager:
        return recomputed(made, by) if name in self.recompute and torch.is_grad_enabled() else contextlib.nullcontext()

    def discard(self, name: str, tensor: Tensor) -> None:
        if name in self.recompute and torch.is_grad_enabled():
            discard(tensor)

    def embedding(self, tokens_T: Tensor, weight_VD: Tensor) -> Tensor:
        return embedding(tokens_T, weight_VD, self.store)

    def linear(self, rows_RI: Tensor, weight_OI: Tensor, compute_dtype: torch.dtype | None = None) -> Tensor:
        return linear(rows_RI, weight_OI, self.store, compute_dtype)

    def grouped_linear(self, rows_RI: Tensor, weight_eOI: Tensor, groups: RowGroups) -> Tensor:
        return grouped_linear(rows_RI, weight_eOI, groups, self.store)

    def cross_entropy(self, x_TD: Tensor, weight_VD: Tensor, target_T: Tensor, scale: float) -> Tensor:
        return linear_cross_entropy(x_TD, weight_VD, target_T, scale, self.store, compiled=self.compiled)

    def rms_norm(self, x_RD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        return rms_norm(x_RD, weight_D, eps, compiled=self.compiled)

    def swiglu(self, gate_up_R2F: Tensor, weight_R: Tensor | None = None) -> Tensor:
        return swiglu(gate_up_R2F, weight_R, compiled=self.compiled)

    def rotate(self, x_BSH2P: Tensor, turns_SP: Tensor) -> Tensor:
        return rotate(x_BSH2P, turns_SP, compiled=self.compiled)
