"""Run Triton kernels on CPU tensors in this process, with the stock interpreter's silent errors corrected or refused.

    with interpreted():
        some_kernel[grid](x, y, n, BLOCK=128)      # no TRITON_INTERPRET: kernels imported as usual are interpreted here, and only here

What triton 3.6 and 3.7 get wrong, and what happens here instead:
    FP32 -> FP8, bf16 casts lose carries, truncate, do not saturate      cast as the hardware does (nearest even; FP8 saturates, NaN stays)
    bf16 and FP8 are held as raw bits, and arithmetic runs on the bits   refused: a kernel widens to FP32 after every load
    tl.dot multiplies bf16 bits, and FP8 through a wrong upcast          operands widened exactly, products summed in FP32
    tl.maximum, tl.minimum, tl.clamp give NaN where the GPU drops it     the number wins, unless the kernel asks for NaN
    loads and stores go to any address                                   refused outside the tensors that were passed

What it cannot see: programs run one after another (no races), `/` is exact (approximate on a GPU: use tl.math.div_rn), FP32 operands of
tl.dot are not rounded to TF32.
"""

import contextlib
import warnings
from collections.abc import Iterator
from unittest.mock import patch

import numpy as np
import torch
import triton
import triton.language as tl
import triton.runtime.interpreter as stock
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

FP8 = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}
RAW = {**FP8, tl.bfloat16: torch.bfloat16}  # kept as bits by the interpreter
NUMPY = {tl.float16: torch.float16, tl.float32: torch.float32}  # kept as numbers
BITS = {1: torch.uint8, 2: torch.int16}


def convert(data: np.ndarray, source: tl.dtype, target: tl.dtype, rounding=None) -> np.ndarray:
    """Floats of one type as another, both in the interpreter's storage. Raises TypeError for a cast it does not know."""
    source, target = source.scalar, target.scalar
    known = RAW | NUMPY
    if source not in known or target not in known or rounding == stock._ir.ROUNDING_MODE.RTZ:
        raise TypeError(
            f"the interpreter casts between {', '.join(map(str, known))}, to nearest even: not {source} -> {target}, {rounding}"
        )
    value = torch.from_numpy(np.ascontiguousarray(data)).clone()
    value = (value.view(known[source]) if source in RAW else value).float()
    if target in FP8:
        top = torch.finfo(FP8[target]).max
        value = value.clamp(-top, top)  # cvt.rn.satfinite; NaN passes
    value = value.to(known[target])
    bits = value.view(BITS[value.element_size()]) if target in RAW else value
    return bits.numpy().view(stock._get_np_dtype(target)).reshape(data.shape)


def _refuse_bits(name: str, *handles) -> None:
    for handle in handles:
        if handle.dtype.scalar in RAW:
            raise TypeError(f"{name} on {handle.dtype.scalar}: the interpreter holds its bits, not its numbers. Widen to tl.float32 first")


class Builder(stock.InterpreterBuilder):
    """The corrected operations; what is not here is as in the stock interpreter."""

    extents: np.ndarray  # (n, 2): first address and end of every tensor passed to the kernel, sorted

    # casts
    def cast_impl(self, src, dst_type):
        source, target = src.dtype.scalar, dst_type.scalar
        if source not in RAW and target not in RAW:
            return super().cast_impl(src, dst_type)
        return stock.TensorHandle(convert(src.data, source, target), target)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        return stock.TensorHandle(convert(src.data, src.dtype, dst_type, rounding_mode), dst_type.scalar)

    # arithmetic
    def binary_op(self, lhs, rhs, op):
        _refuse_bits(op.__name__, lhs, rhs)
        return super().binary_op(lhs, rhs, op)

    def ternary_op(self, lhs, rhs, other, op):
        if op is not np.where:
            _refuse_bits(op.__name__, lhs, rhs, other)
        return super().ternary_op(lhs, rhs, other, op)

    def unary_op(self, arg, op):
        _refuse_bits(op.__name__, arg)
        return super().unary_op(arg, op)

    def create_fma(self, x, y, z):
        _refuse_bits("fma", x, y, z)
        return super().create_fma(x, y, z)

    def create_rsqrt(self, arg):
        _refuse_bits("rsqrt", arg)
        return super().create_rsqrt(arg)

    def create_erf(self, arg):
        _refuse_bits("erf", arg)
        return super().create_erf(arg)

    def create_fabs(self, arg):
        _refuse_bits("abs", arg)
        return super().create_fabs(arg)

    def create_atomic_rmw(self, rmwOp, ptr, val, mask, sem, scope):
        _refuse_bits("an atomic operation", val)
        self._check_addresses(ptr.data, mask.data)
        return super().create_atomic_rmw(rmwOp, ptr, val, mask, sem, scope)

    def create_maxnumf(self, lhs, rhs):
        return self.binary_op(lhs, rhs, np.fmax)

    def create_minnumf(self, lhs, rhs):
        return self.binary_op(lhs, rhs, np.fmin)

    def create_clampf(self, arg, lo, hi, propagate_nans):
        _refuse_bits("clamp", arg)
        if propagate_nans == stock._ir.PROPAGATE_NAN.ALL:
            return self.ternary_op(arg, lo, hi, np.clip)
        return self.binary_op(self.binary_op(arg, lo, np.fmax), hi, np.fmin)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        wide = [convert(x.data, x.dtype, tl.float32) if x.dtype.scalar in RAW | NUMPY else x.data for x in (a, b)]
        _refuse_bits("tl.dot's accumulator", d)
        return stock.TensorHandle((np.matmul(*wide) + d.data).astype(d.data.dtype), d.dtype.scalar)

    # memory
    def _check_addresses(self, addresses, mask):
        mask = np.asarray(mask)  # of a descriptor's load, a memory view
        used = np.broadcast_to(addresses, np.broadcast_shapes(addresses.shape, mask.shape))[
            np.broadcast_to(mask.astype(bool), addresses.shape)
        ]
        if not used.size:
            return
        owner = np.searchsorted(self.extents[:, 0], used, side="right") - 1
        outside = (owner < 0) | (used >= self.extents[owner, 1])
        if outside.any():
            raise IndexError(
                f"program {self.grid_idx}: {outside.sum()} of {used.size} addresses are outside the tensors passed: is a mask missing?"
            )

    def create_masked_load(self, ptrs, mask, other, cache_modifier, eviction_policy, is_volatile):
        self._check_addresses(ptrs.data, mask.data)
        return super().create_masked_load(ptrs, mask, other, cache_modifier, eviction_policy, is_volatile)

    def create_masked_store(self, ptrs, value, mask, cache_modifier, eviction_policy):
        self._check_addresses(ptrs.data, mask.data)
        return super().create_masked_store(ptrs, value, mask, cache_modifier, eviction_policy)


def _check_reduction(self, inputs):
    for tensor in inputs:
        self.check_axis(tensor.shape, self.axis)
        _refuse_bits("a reduction or scan", tensor.handle)


def _extents(args) -> np.ndarray:
    spans = []
    for arg in args:
        tensor = arg.base if isinstance(arg, TensorDescriptor) else arg
        if isinstance(tensor, torch.Tensor) and tensor.numel():
            last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride()))
            spans.append((tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()))
    return np.array(sorted(spans) or [(0, 0)], dtype=np.uint64)


BUILDER = Builder()
SEMANTIC = stock.TritonSemantic(BUILDER)  # one for all: rewritten kernels keep it in their globals


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Inside, `kernel[grid](...)` of any `@triton.jit` function is interpreted. Not for threads."""

    def launch(self, *args, grid, warmup=False, **kwargs):
        BUILDER.extents = _extents([*args, *kwargs.values()])
        stock.GridExecutor(stock.InterpretedFunction(self.fn).rewrite(), self.arg_names, grid)(*args, **kwargs)

    def call(self, *args, **kwargs):  # of one jitted function by another
        return stock.InterpretedFunction(self.fn)(*args, **kwargs)

    changes = [
        patch.object(stock, "interpreter_builder", BUILDER),
        patch.object(stock, "interpreter_semantic", SEMANTIC),
        patch.object(stock.ReduceScanOpInterface, "check_tensor", _check_reduction),
        patch.object(JITFunction, "run", launch),
        patch.object(JITFunction, "__call__", call),
        triton.knobs.runtime.scope(),
        warnings.catch_warnings(),
    ]
    with contextlib.ExitStack() as stack:
        for change in changes:
            stack.enter_context(change)
        warnings.simplefilter("ignore", RuntimeWarning)  # of numpy, about the NaNs and infinities that a test is about
        triton.knobs.runtime.interpret = True
        yield
