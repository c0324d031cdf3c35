"""The kernels as one rank uses them: bound to its weight-gradient store, to FP8 or not, to whether elementwise arithmetic is compiled, and
to what is recomputed in backward."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from .attention import Heads, causal_attention
from .cross_entropy import linear_cross_entropy
from .embedding import embedding
from .fp8_layers import Fp8Linears
from .fp8_rows import wide_both_ways
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

    `fp8`: where there is one, the linears named so multiply in FP8; `plain_linear` never does.
    `recompute`: names of what `again` and `discard` act on; they do nothing for others.
    """

    store: WeightGradStore = field(default_factory=WeightGradStore)
    compiled: bool = False
    fp8: Fp8Linears | None = None
    recompute: frozenset[str] = frozenset()

    def again(self, name: str, by: Callable[[], Tensor]) -> Callable[[], Tensor] | None:
        """`by`, as argument `again` of a kernel, where `name` is recomputed; else None."""
        return by if name in self.recompute else None

    def discard(self, name: str, tensor: Tensor) -> None:
        if name in self.recompute and torch.is_grad_enabled():
            discard(tensor)

    def embedding(self, tokens_T: Tensor, weight_VD: Tensor) -> Tensor:
        return embedding(tokens_T, weight_VD, self.store)

    def plain_linear(
        self, rows_RI: Tensor, weight_OI: Tensor, compute_dtype: torch.dtype | None = None, *, again: Callable[[], Tensor] | None = None
    ) -> Tensor:
        """`linear`, never in FP8: what the recipe leaves out."""
        return linear(rows_RI, weight_OI, self.store, compute_dtype, again=again)

    def linear(
        self,
        rows_RI: Tensor,
        weight: Tensor,
        groups: RowGroups | None = None,
        *,
        power_of_two: bool = False,
        again: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """With `groups`, a matrix for each of them. `power_of_two`: of the scales of rows in FP8."""
        if self._in_fp8(weight):
            return self.fp8.linear(rows_RI, weight, groups, power_of_two=power_of_two, again=again)
        if self.fp8 is not None:  # left out of it: its rows, and their gradients, may have been dispatched in FP8
            rows_RI = wide_both_ways(rows_RI)
        product = linear if groups is None else partial(grouped_linear, groups=groups)
        out_RO = product(rows_RI, weight, store=self.store, again=again)
        return out_RO if self.fp8 is None else wide_both_ways(out_RO)

    def _in_fp8(self, weight: Tensor) -> bool:
        return self.fp8 is not None and weight not in self.fp8.left_out

    def norm_linear(self, x_RI: Tensor, norm_I: Tensor, eps: float, weight_OI: Tensor) -> Tensor:
        """A norm and the one projection that reads it. Under recompute "norm", what is between them is not kept."""
        if self._in_fp8(weight_OI):
            return self.fp8.norm_linear(x_RI, norm_I, eps, weight_OI, again="norm" in self.recompute, compiled=self.compiled)
        norm = lambda x_RI: self.rms_norm(x_RI, norm_I, eps)
        unit_RI, kept = norm(x_RI), x_RI.detach()
        return self.linear(unit_RI, weight_OI, again=self.again("norm", lambda: norm(kept)))

    def swiglu_linear(
        self, gate_up_R2F: Tensor, weight: Tensor, groups: RowGroups | None = None, *, weight_R: Tensor | None = None
    ) -> Tensor:
        """SwiGLU, times `weight_R`, and the one projection that reads it. Under recompute "swiglu", and in FP8, its output is not kept."""
        if self._in_fp8(weight):
            return self.fp8.swiglu_linear(gate_up_R2F, weight_R, weight, groups)
        kept = gate_up_R2F.detach(), None if weight_R is None else weight_R.detach()
        hidden_RF = self.swiglu(gate_up_R2F, weight_R)
        return self.linear(hidden_RF, weight, groups, again=self.again("swiglu", lambda: self.swiglu(*kept)))

    def attention(self, heads: Heads, scale: float, *, again: Callable[[], Heads] | None = None) -> tuple[Tensor, Callable[[], Tensor]]:
        return causal_attention(*heads, scale, again=again, narrow=self.fp8 is not None)

    def cross_entropy(self, x_TD: Tensor, weight_VD: Tensor, target_T: Tensor, scale: float) -> Tensor:
        return linear_cross_entropy(x_TD, weight_VD, target_T, scale, self.store, compiled=self.compiled)

    def rms_norm(self, x_RD: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        return rms_norm(x_RD, weight_D, eps, compiled=self.compiled)

    def swiglu(self, gate_up_R2F: Tensor, weight_R: Tensor | None = None) -> Tensor:
        return swiglu(gate_up_R2F, weight_R, compiled=self.compiled)

    def rotate(self, x_BSH2P: Tensor, turns_SP: Tensor) -> Tensor:
        return rotate(x_BSH2P, turns_SP, compiled=self.compiled)
