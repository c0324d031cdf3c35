"""The kernels as one rank uses them: bound to its weight-gradient store, to whether elementwise arithmetic is compiled, and to what is
recomputed in backward."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .cross_entropy import linear_cross_entropy
from .embedding import embedding
from .fp8_grouped import fp8_grouped_linear
from .fp8_linear import fp8_linear
from .fp8_weights import WeightCache
from .grouped import RowGroups, grouped_linear
from .linear import linear
from .recompute import discard
from .rms_norm import rms_norm
from .rotary import rotate
from .swiglu import swiglu
from .weight_grad import WeightGradStore


@dataclass(frozen=True, kw_only=True)
class Ops:
    """Each method is the kernel of that name, in the file of that name, which has the shapes.

    `fp8`: where there is one, `linear` and `grouped_linear` multiply in FP8, and it holds the weights that they cast.
    `recompute`: names of what `again` and `discard` act on; they do nothing for others.
    """

    store: WeightGradStore = field(default_factory=WeightGradStore)
    compiled: bool = False
    fp8: WeightCache | None = None
    recompute: frozenset[str] = frozenset()

    def again(self, name: str, by: Callable[[], Tensor]) -> Callable[[], Tensor] | None:
        """`by`, as argument `again` of a kernel, where `name` is recomputed; else None."""
        return by if name in self.recompute else None

    def discard(self, name: str, tensor: Tensor) -> None:
        if name in self.recompute and torch.is_grad_enabled():
            discard(tensor)

    def discard_if_fp8(self, rows: Tensor) -> None:
        """Of rows that only a linear reads, which has kept what it needs in FP8."""
        if self.fp8 is not None and torch.is_grad_enabled():
            discard(rows)

    def embedding(self, tokens_T: Tensor, weight_VD: Tensor) -> Tensor:
        return embedding(tokens_T, weight_VD, self.store)

    def linear(
        self, rows_RI: Tensor, weight_OI: Tensor, *, power_of_two: bool = False, again: Callable[[], Tensor] | None = None
    ) -> Tensor:
        if self.fp8 is None:
            return linear(rows_RI, weight_OI, self.store, again=again)
        return fp8_linear(rows_RI, weight_OI, self.fp8, self.store, power_of_two=power_of_two, again=again)

    def plain_linear(
        self, rows_RI: Tensor, weight_OI: Tensor, compute_dtype: torch.dtype | None = None, *, again: Callable[[], Tensor] | None = None
    ) -> Tensor:
        """`linear`, never in FP8: what the recipe leaves out."""
        return linear(rows_RI, weight_OI, self.store, compute_dtype, again=again)

    def grouped_linear(
        self,
        rows_RI: Tensor,
        weight_eOI: Tensor,
        groups: RowGroups,
        *,
        power_of_two: bool = False,
        again: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        if self.fp8 is None:
            return grouped_linear(rows_RI, weight_eOI, groups, self.store, again=again)
        return fp8_grouped_linear(rows_RI, weight_eOI, groups, self.fp8, self.store, power_of_two=power_of_two, again=again)

    def cross_entropy(self, x_TD: Tensor, weight_VD: Tensor, target_T: Tensor, scale: float) -> Tensor:
        return linear_cross_entropy(x_TD, weight_VD, target_T, scale, self.store, compiled=self.compiled)

    def rms_norm(self, x_RD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        return rms_norm(x_RD, weight_D, eps, compiled=self.compiled)

    def swiglu(self, gate_up_R2F: Tensor, weight_R: Tensor | None = None) -> Tensor:
        return swiglu(gate_up_R2F, weight_R, compiled=self.compiled)

    def rotate(self, x_BSH2P: Tensor, turns_SP: Tensor) -> Tensor:
        return rotate(x_BSH2P, turns_SP, compiled=self.compiled)
