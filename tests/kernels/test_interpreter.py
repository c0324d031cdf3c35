"""The interpreter as corrected: casts equal torch's to the bit, and what it cannot do it refuses. Without the corrections these are red."""

import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from .triton_interpreter import interpreted

LOW = {torch.float8_e4m3fn: torch.uint8, torch.float8_e5m2: torch.uint8, torch.bfloat16: torch.int16}


@triton.jit
def cast_kernel(x, y, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + i, tl.load(x + i, mask=i < n).to(y.dtype.element_ty), mask=i < n)


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = torch.empty_like(x, dtype=dtype)
    with interpreted():
        cast_kernel[(triton.cdiv(x.numel(), 1024),)](x, y, x.numel(), BLOCK=1024)
    return y


def every_code(dtype: torch.dtype) -> torch.Tensor:
    bits = LOW[dtype]
    info = torch.iinfo(bits)
    return torch.arange(info.min, info.max + 1, dtype=torch.int32).to(bits).view(dtype)


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Any NaN is as good as another."""
    return bool(((a.float() == b.float()) & (a.float().signbit() == b.float().signbit()) | a.float().isnan() & b.float().isnan()).all())


WIDER = [(low, torch.float32) for low in LOW] + [(low, torch.float16) for low in LOW if low != torch.bfloat16]  # Triton has no such cast


@pytest.mark.parametrize(("low", "wide"), WIDER, ids=str)
def test_every_code_widens_as_in_torch(low, wide):
    assert same_bits(cast(every_code(low), wide), every_code(low).to(wide))


@pytest.mark.parametrize("low", LOW, ids=str)
def test_codes_ties_and_their_neighbours_round_as_in_torch(low):
    codes = every_code(low).float()
    ordered = codes[codes.isfinite()].unique()
    ties = (ordered[1:].double() + ordered[:-1].double()).div(2).float()  # exact: one more bit
    points = torch.cat([ordered, ties])
    points = torch.cat([points, points.nextafter(torch.tensor(torch.inf)), points.nextafter(torch.tensor(-torch.inf))])
    points = points[points.abs() <= torch.finfo(low).max]
    assert same_bits(cast(points, low), points.to(low))


@pytest.mark.parametrize("low", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_fp8_saturates_and_keeps_nan(low):
    top = torch.finfo(low).max
    x = torch.tensor([top * 1.01, -top * 1.3, 1e30, -torch.inf, torch.inf, torch.nan, -0.0])
    assert same_bits(cast(x, low), x.clamp(-top, top).to(low))


def test_random_bits(seed=0):
    bits = torch.randint(-(2**31), 2**31, (1 << 16,), generator=torch.Generator().manual_seed(seed), dtype=torch.int64)
    x = bits.to(torch.int32).view(torch.float32)
    assert same_bits(cast(x, torch.bfloat16), x.to(torch.bfloat16))
    assert same_bits(cast(x, torch.float8_e4m3fn), x.clamp(-448, 448).to(torch.float8_e4m3fn))


@triton.jit
def dot_kernel(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n, k = tl.arange(0, M), tl.arange(0, N), tl.arange(0, K)
    x, y = tl.load(a + m[:, None] * K + k[None, :]), tl.load(b + n[None, :] * K + k[:, None])
    tl.store(c + m[:, None] * N + n[None, :], tl.dot(x, y))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn, torch.float16, torch.float32], ids=str)
def test_products(dtype):
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(32, 128, generator=generator).to(dtype) for _ in range(2))
    c = torch.empty(32, 32)
    with interpreted():
        dot_kernel[(1,)](a, b, c, M=32, N=32, K=128)
    wanted = a.double() @ b.double().T
    assert (c - wanted).norm() <= 1e-6 * wanted.norm()


@triton.jit
def do_kernel(x, y, WHAT: tl.constexpr):
    i = tl.arange(0, 16)
    v = tl.load(x + i)
    if WHAT == "add":
        v = v + v
    elif WHAT == "compare":
        v = tl.where(v == v, v, v)
    elif WHAT == "maximum":
        v = tl.maximum(v, v)
    elif WHAT == "abs":
        v = tl.abs(v)
    elif WHAT == "fma":
        v = tl.fma(v, v, v)
    elif WHAT == "clamp":
        v = tl.clamp(v, v, v)
    elif WHAT == "sum":
        v = v + tl.sum(v, 0)
    elif WHAT == "max":
        v = tl.where(i == 0, tl.max(v, 0), v)
    elif WHAT == "scan":
        v = tl.cumsum(v, 0)
    elif WHAT == "to int":
        v = v.to(tl.int32).to(tl.float32).to(v.dtype)
    elif WHAT == "toward zero":
        v = v.to(tl.float32).to(v.dtype, fp_downcast_rounding="rtz")
    tl.store(y + i, v)


RIGHT = {
    "add": lambda x: x + x,
    "compare": lambda x: x,
    "maximum": lambda x: x,
    "abs": lambda x: x.abs(),
    "fma": lambda x: x * x + x,
    "clamp": lambda x: x,
    "sum": lambda x: x + x.sum(),
    "max": lambda x: torch.cat([x.max()[None], x[1:]]),
    "scan": lambda x: x.cumsum(0),
    "to int": lambda x: x,
}


@pytest.mark.parametrize("what", [*RIGHT, "toward zero"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=str)
def test_arithmetic_on_low_precision_is_right_or_refused(dtype, what):
    x = torch.tensor([-3.0, 2.0, 1.0, -1.0] * 4).to(dtype)
    y = torch.empty_like(x)
    with interpreted():
        try:
            do_kernel[(1,)](x, y, WHAT=what)  # some operations widen by themselves, in Triton's own definition of them
        except (InterpreterError, TypeError):
            return
    assert torch.equal(y.float(), RIGHT[what](x.float()))


@triton.jit
def nan_kernel(x, y):
    i = tl.arange(0, 4)
    v = tl.load(x + i)
    tl.store(y + i, tl.maximum(v, 1.0))
    tl.store(y + 4 + i, tl.minimum(v, 1.0))
    tl.store(y + 8 + i, tl.clamp(v, -1.0, 1.0))
    tl.store(y + 12 + i, tl.maximum(v, 1.0, propagate_nan=tl.PropagateNan.ALL))
    tl.store(y + 16 + i, tl.clamp(v, -1.0, 1.0, propagate_nan=tl.PropagateNan.ALL))
    tl.store(y + 20 + i, tl.max(v, 0))


def test_nan_is_dropped_as_on_the_hardware_unless_asked_for():
    y, nan = torch.empty(6, 4), torch.nan
    with interpreted():
        nan_kernel[(1,)](torch.tensor([nan, 2.0, -2.0, 0.5]), y)
    wanted = [[1, 2, 1, 1], [1, 1, -2, 0.5], [-1, 1, -1, 0.5], [nan, 2, 1, 1], [nan, 1, -1, 0.5], [2] * 4]
    assert same_bits(y, torch.tensor(wanted))


@triton.jit
def copy_kernel(x, y, start, n):
    i = start + tl.arange(0, 16)
    tl.store(y + i, tl.load(x + i, mask=i < n), mask=i < 16)


@pytest.mark.parametrize(("start", "n"), [(0, 17), (-1, 16)], ids=["past the end", "before the start"])
def test_an_address_outside_every_tensor_is_refused(start, n):
    x, y = torch.zeros(48)[16:32], torch.zeros(16)  # x: inside a larger storage, so that nothing crashes
    with interpreted():
        copy_kernel[(1,)](x, y, 0, 16)
        with pytest.raises(InterpreterError, match="outside the tensors"):
            copy_kernel[(1,)](x, y, start if start else 1, n)


def test_outside_the_context_triton_is_as_it_was():
    with interpreted():
        pass
    with pytest.raises(RuntimeError):
        cast_kernel[(1,)](torch.zeros(4), torch.zeros(4), 4, BLOCK=16)
    with pytest.raises(RuntimeError, match="outside of the scope"):
        tl.cdiv(tl, 3)
