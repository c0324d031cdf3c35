"""FP8 linears as steps of autograd, each fused with what makes its input: nothing, a norm, or SwiGLU.

    forward    input -> rows in FP8 -> times W -> output
    backward   gradient in FP8, times W^T -> gradient of the rows -> of the input;  gradient^T rows, left to the store -> of W

What is kept from forward is the rows in FP8, or whatever they are made from again: DeepSeek-V3 (§3.3.3) keeps the input of
SwiGLU in FP8 and computes its output twice. Gradients are quantised with a floor far below the activations', which would flatten small
ones to zero.

R rows   I input dim   O output dim   F hidden dim of SwiGLU
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from .fp8_grouped import add_fp8_grouped_outer, fp8_grouped_matmul
from .fp8_linear import add_fp8_outer, fp8_matmul
from .fp8_probe import Probe
from .fp8_rows import Fp8Rows, widened
from .fp8_weights import WeightCache
from .grouped import RowGroups
from .quantise import BLOCK, GRADIENT_FLOOR, Quantised, columns_of, quantise_columns, quantise_rows
from .rms_norm import rms_norm_backward, rms_norm_quantised, rms_norm_reference
from .swiglu import swiglu_backward, swiglu_quantised, swiglu_reference
from .weight_grad import WeightGradStore


class Input(Protocol):
    """How a linear's rows come from some tensors."""

    def plain(self, *tensors: Tensor | None) -> Tensor:
        """The rows (R, I), not quantised."""
        ...

    def cast(self, *tensors: Tensor | None) -> tuple[Quantised, tuple[Tensor | None, ...]]:
        """The rows (R, I) in FP8, and what is kept for backward."""
        ...

    def rows(self, *kept: Tensor | None) -> Quantised:
        """The rows, in backward."""
        ...

    def grads(self, grad_RI: Tensor, *kept: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the tensors."""
        ...


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The tensor itself, BF16 or `Fp8Rows`. `again`: makes it for backward, where it is then not kept."""

    power_of_two: bool = False
    again: Callable[[], Tensor] | None = None

    def plain(self, rows_RI):
        return widened(rows_RI)

    def cast(self, rows_RI):
        rows = self._quantised(rows_RI)
        return rows, () if self.again else (rows.codes, rows.scales)

    def rows(self, *kept):
        return self._quantised(self.again()) if self.again else Quantised(*kept)

    def grads(self, grad_RI, *kept):
        return (grad_RI,)

    def _quantised(self, rows_RI: Tensor) -> Quantised:
        if isinstance(rows_RI, Fp8Rows):
            return rows_RI.quantised
        return quantise_rows(rows_RI.contiguous(), power_of_two=self.power_of_two)


@dataclass(frozen=True, kw_only=True)
class Norm:
    """RMSNorm of x by a weight, which its own backward wants anyway. `again`: the rows are made from x twice, and not kept."""

    eps: float
    again: bool
    compiled: bool

    def plain(self, x_RI, weight_I):
        return rms_norm_reference(x_RI, weight_I, self.eps)

    def cast(self, x_RI, weight_I):
        rows, scale_R1 = rms_norm_quantised(x_RI, weight_I, self.eps)
        return rows, (x_RI, weight_I, scale_R1, *(() if self.again else (rows.codes, rows.scales)))

    def rows(self, x_RI, weight_I, scale_R1, *kept):
        return Quantised(*kept) if kept else rms_norm_quantised(x_RI, weight_I, self.eps)[0]

    def grads(self, grad_RI, x_RI, weight_I, scale_R1, *kept):
        return rms_norm_backward(grad_RI, x_RI, weight_I, scale_R1, compiled=self.compiled)


class SwiGLU:
    """silu(gate) * up, times the routing weight where there is one. Kept is [gate | up] in FP8."""

    def plain(self, gate_up_R2F, weight_R):
        return swiglu_reference(gate_up_R2F, weight_R)

    def cast(self, gate_up_R2F, weight_R):
        kept = quantise_rows(gate_up_R2F)
        return swiglu_quantised(gate_up_R2F, weight_R), (kept.codes, kept.scales, weight_R)

    def rows(self, codes, scales, weight_R):
        return swiglu_quantised(Quantised(codes, scales), weight_R)

    def grads(self, grad_RF, codes, scales, weight_R):
        return swiglu_backward(Quantised(codes, scales), grad_RF, weight_R)


class _Fp8Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, groups, source, fp8, probe, *tensors):
        rows, kept = source.cast(*tensors)
        ctx.save_for_backward(*kept)
        ctx.weight, ctx.cast, ctx.groups, ctx.source, ctx.store, ctx.probe = weight, fp8.casts.of(weight), groups, source, fp8.store, probe
        out_RO = _product(rows, ctx.cast.blocks, groups, tensors[0].dtype)
        if probe is not None:
            probe.forward(source.plain(*tensors), rows, ctx.cast.blocks, out_RO)
        return out_RO

    @staticmethod
    def backward(ctx, grad_RO):
        weight, groups, kept = ctx.weight, ctx.groups, ctx.saved_tensors
        if isinstance(grad_RO, Fp8Rows):
            grad, columns = grad_RO.quantised, columns_of(grad_RO.quantised, floor=GRADIENT_FLOOR)
        else:
            grad_RO = grad_RO.contiguous()  # also where it arrives expanded
            grad, columns = quantise_rows(grad_RO, floor=GRADIENT_FLOOR), quantise_columns(grad_RO, floor=GRADIENT_FLOOR)
        rows = ctx.source.rows(*kept)
        ctx.store.append(lambda: _add_outer(weight.main_grad, columns, columns_of(rows), groups))
        if not any(ctx.needs_input_grad[5:]):
            return (None,) * len(ctx.needs_input_grad)
        grad_RI = _product(grad, ctx.cast.transposed, groups, grad_RO.dtype)
        if ctx.probe is not None:
            alone = torch.zeros_like(weight.main_grad)
            _add_outer(alone, columns, columns_of(rows), groups)
            ctx.probe.backward(widened(grad_RO), grad, grad_RI, alone)
        return *[None] * 5, *ctx.source.grads(grad_RI, *kept)


def _product(rows: Quantised, matrix: Quantised, groups: RowGroups | None, dtype: torch.dtype) -> Tensor:
    return fp8_matmul(rows, matrix, dtype) if groups is None else fp8_grouped_matmul(rows, matrix, groups, dtype)


def _add_outer(main: Tensor, a: Quantised, b: Quantised, groups: RowGroups | None) -> None:
    add_fp8_outer(main, a, b) if groups is None else add_fp8_grouped_outer(main, a, b, groups)


@dataclass(frozen=True, kw_only=True)
class Fp8Linears:
    """y = x W^T for one rank: `casts` holds its weights in FP8, and backward appends one closure per call to `store`, which adds into
    `weight.main_grad`.

    Every call: a weight (O, I) without `groups`, or experts' (e, O, I) with them (`grouped.py`) -> (R, O) in the input's dtype. R may
    be 0. Differentiable in the tensors that come before the weight. ValueError where experts' rows do not come in multiples of 128.
    """

    casts: WeightCache
    store: WeightGradStore
    probes: dict[Tensor, Probe | None] = field(default_factory=dict)  # of each weight to be looked at: None until its next linear
    left_out: set[Tensor] = field(default_factory=set)  # weights whose linears the caller is to make in BF16

    def linear(
        self,
        rows_RI: Tensor,
        weight: Tensor,
        groups: RowGroups | None = None,
        *,
        power_of_two: bool = False,
        again: Callable[[], Tensor] | None = None,
    ) -> Tensor:
        """`power_of_two`: scales of the rows are; the recipe has it for the input of attention's output projection. Rows that were
        dispatched are `Fp8Rows`. `again`: makes the rows for backward, which are then not kept."""
        return self._apply(Rows(power_of_two=power_of_two, again=again), weight, groups, rows_RI)

    def norm_linear(
        self, x_RI: Tensor, norm_I: Tensor, eps: float, weight_OI: Tensor, *, again: bool = False, compiled: bool = False
    ) -> Tensor:
        """Of the norm of x; between the two, rows are not rounded to BF16. `again`: the normed rows are made twice, and not kept."""
        return self._apply(Norm(eps=eps, again=again, compiled=compiled), weight_OI, None, x_RI, norm_I)

    def swiglu_linear(self, gate_up_R2F: Tensor, weight_R: Tensor | None, weight: Tensor, groups: RowGroups | None = None) -> Tensor:
        """Of silu(gate) * up, times `weight_R` (FP32, optional), likewise not rounded on the way."""
        return self._apply(SwiGLU(), weight, groups, gate_up_R2F, weight_R)

    def _apply(self, source: Input, weight: Tensor, groups: RowGroups | None, *tensors: Tensor | None) -> Tensor:
        if groups is not None and groups.align % BLOCK:
            raise ValueError(f"experts' rows in multiples of {groups.align}: FP8 wants multiples of {BLOCK}; dispatch with align={BLOCK}")
        probe = None
        if torch.is_grad_enabled() and weight in self.probes and self.probes[weight] is None:
            probe = self.probes[weight] = Probe(weight, groups)
        return _Fp8Linear.apply(weight, groups, source, self, probe, *tensors)
