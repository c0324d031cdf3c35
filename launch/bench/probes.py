"""Kernels of a step, each on several sizes: what is timed to learn a device's rates.

On a GPU, memory-bound kernels are the bench's own cases. On a CPU they are called in FP32, in which it trains, and on small sizes, on
which it trains: there, what a call costs besides its work is half of the matter.

T tokens   N outputs   K inputs   R rows of experts   e experts   H heads   S positions
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ...conf.schema import RatesConfig
from ...kernels.attention import causal_attention
from ...kernels.fp8_linear import add_fp8_outer, fp8_matmul
from ...kernels.fp8_weights import Fp8Weight
from ...kernels.grouped import RowGroups, add_grouped_outer, grouped_mm
from ...kernels.permute import permute, permute_bytes, sum_copies, sum_copies_bytes
from ...kernels.quantise import columns_of, quantise_columns, quantise_rows, rows_bytes
from ...kernels.rms_norm import rms_norm, rms_norm_backward_bytes, rms_norm_bytes
from ...kernels.rotary import rotate
from ...kernels.swiglu import swiglu, swiglu_backward_bytes, swiglu_bytes
from ...kernels.weight_grad import add_outer
from . import cast_cases, memory_cases
from .case import FACTS, Case, Maker
from .fit import Sample
from .timing import Clock, measure

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16}
# Of the bench's cases, by the begin of an op's name: kind, and kernels in it.
CASES = {
    "swiglu": ("swiglu", 1), "permute": ("permute", 1), "sum of copies": ("sum", 1), "norm and cast": ("norm", 1),
    "norm and backward": ("norm", 2), "cast by rows": ("quantise", 1), "cast by columns": ("columns", 1),
    "columns of rows": ("columns", 1), "pack": ("quantise", 1), "unpack": ("quantise", 1),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A sample to be: `run(*make(maker))` is timed. `less`: without what this probe takes, which is a part of it."""

    table: str
    kind: str
    work: float
    make: Callable[[Maker], tuple]
    run: Callable[..., Any]
    depth: float = 0.0
    launches: int = 1
    less: "Probe | None" = None

    def time(self, device: torch.device, clock: Clock, seconds: float) -> Sample:
        taken = self._quartile(device, clock, seconds)
        if self.less:
            taken = max(taken - self.less._quartile(device, clock, seconds), 0.05 * taken)
        return Sample(table=self.table, kind=self.kind, seconds=taken, work=self.work, depth=self.depth, launches=self.launches)

    def _quartile(self, device: torch.device, clock: Clock, seconds: float) -> float:
        """The lower one: who else uses the machine only ever adds."""
        return measure(self.run, [self.make(Maker(device, seed)) for seed in range(2)], clock, seconds=seconds).low


def every_probe(device: torch.device, precisions: Sequence[str], rates: RatesConfig) -> list[Probe]:
    """`precisions`: in which products are timed. `rates`: the tile and the SMs, which say what of a product's work is idle."""
    gpu = device.type == "cuda"
    found = [*_products(gpu, precisions, rates), *_attention(gpu)]
    return found + list(_cases() if gpu else _memory())


# ---------------------------------------------------------------- products


def _products(gpu: bool, precisions: Sequence[str], rates: RatesConfig) -> Iterator[Probe]:
    tokens = FACTS.tokens if gpu else 512
    linears = FACTS.linears if gpu else ((128, 64), (256, 128), (128, 256), (128, 512), (256, 384))  # (N, K)
    depths = (1024, 4096, 16384) if gpu else (128, 512, 1024)  # T of weight gradients
    for precision in precisions:
        for n, k in linears:
            yield _product(precision, tokens, n, k, rates)
        for t in depths:
            for n, k in linears[:2] if not gpu else linears[-2:]:
                yield _weight_gradient(precision, t, n, k, rates)
    for n, k in ((4096, 7168), (7168, 2048)) if gpu else ((256, 128), (128, 128)):
        yield from _grouped("bf16" if gpu else "fp32", 8, tokens // (1 if gpu else 8), n, k, rates)


def work_of(rows: int, inner: int, outer: int, rates: RatesConfig, matrices: int = 1) -> float:
    """FLOPs, and those that SMs without a tile in the last wave would have made. `rows`: of each matrix."""
    tiles = matrices * -(-rows // rates.tile) * -(-outer // rates.tile)
    return 2 * rows * inner * outer * matrices * (-(-tiles // rates.sms) * rates.sms / tiles)


def _product(precision: str, t: int, n: int, k: int, rates: RatesConfig) -> Probe:
    work = work_of(t, k, n, rates)
    if precision == "fp8":
        make = lambda maker: (quantise_rows(maker.normal(t, k)), Fp8Weight(maker.normal(n, k)).blocks)
        return Probe(table="products", kind="fp8", work=work, depth=k, make=make, run=lambda a, b: fp8_matmul(a, b, torch.bfloat16))
    make = lambda maker: (maker.normal(t, k, dtype=DTYPES[precision]), maker.normal(n, k, dtype=DTYPES[precision]))
    return Probe(table="products", kind=precision, work=work, depth=k, make=make, run=F.linear)


def _weight_gradient(precision: str, t: int, n: int, k: int, rates: RatesConfig) -> Probe:
    about = dict(table="products", kind=f"{precision}_wgrad", work=work_of(n, t, k, rates), depth=t)
    if precision == "fp8":
        columns = lambda maker, width: quantise_columns(maker.normal(t, width))
        make = lambda maker: (torch.zeros(n, k, device=maker.device), columns(maker, n), columns(maker, k))
        return Probe(**about, make=make, run=add_fp8_outer)
    dtype = DTYPES[precision]
    main = torch.float64 if precision == "fp64" else torch.float32
    make = lambda maker: (torch.zeros(n, k, dtype=main, device=maker.device), *(maker.normal(t, w, dtype=dtype) for w in (n, k)))
    return Probe(**about, make=make, run=add_outer)


def _grouped(precision: str, e: int, rows: int, n: int, k: int, rates: RatesConfig) -> Iterator[Probe]:
    """`rows` of each expert."""
    dtype = DTYPES[precision]
    groups = lambda maker: RowGroups.of([rows] * e, maker.device)
    x = lambda maker, width: maker.normal(e * rows, width, dtype=dtype)
    yield Probe(
        table="products", kind=precision, work=work_of(rows, k, n, rates, e), depth=k, run=grouped_mm,
        make=lambda maker: (x(maker, k), maker.normal(e, k, n, dtype=dtype), groups(maker)),
    )  # fmt: skip
    yield Probe(
        table="products", kind=f"{precision}_wgrad", work=work_of(n, rows, k, rates, e), depth=rows, run=add_grouped_outer,
        make=lambda maker: (torch.zeros(e, n, k, device=maker.device), x(maker, n), x(maker, k), groups(maker)),
    )  # fmt: skip


# ---------------------------------------------------------------- attention


def _attention(gpu: bool) -> Iterator[Probe]:
    """MLA's heads: 192 wide queries and keys, 128 wide values; on a CPU those of a small model."""
    tokens, heads, qk, value = (16384, 16, 192, 128) if gpu else (512, 4, 48, 32)
    dtype = torch.bfloat16 if gpu else torch.float32
    for positions in (1024, 2048, 4096, 16384) if gpu else (64, 128, 256, 512):
        shape = (tokens // positions, heads, positions)
        make = lambda maker, shape=shape: (
            *(maker.normal(*shape, width, dtype=dtype) for width in (qk, qk, value)), maker.normal(tokens, heads * value, dtype=dtype),
        )  # fmt: skip
        flops = tokens * heads * (qk + value) * (positions + 1)
        forward = Probe(table="attention", kind="forward", work=flops, depth=positions, make=make, run=_attend)
        yield forward
        more = (3 * qk + 2 * value) / (qk + value)  # as train/block_ops.py counts it
        yield Probe(
            table="attention", kind="backward", work=more * flops, depth=positions, make=make, run=_attend_both, less=forward
        )  # fmt: skip


def _attend(q, k, v, grad):
    with torch.no_grad():
        return causal_attention(q, k, v, q.shape[-1] ** -0.5)[0]


def _attend_both(q, k, v, grad):
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    with torch.enable_grad():
        out = causal_attention(*leaves, q.shape[-1] ** -0.5)[0]
    return torch.autograd.grad(out, leaves, grad)


# ---------------------------------------------------------------- what moves memory


def _cases() -> Iterator[Probe]:
    for case in [*memory_cases.cases(FACTS), *cast_cases.cases(FACTS)]:
        if name := next((name for name in CASES if case.op.startswith(name)), None):
            yield _of_case(case, *CASES[name])
    for t, d in ((4096, 7168), (8192, 7168)):
        yield _add(t, d, torch.bfloat16)


def _of_case(case: Case, kind: str, launches: int) -> Probe:
    return Probe(table="memory", kind=kind, work=case.bytes, launches=launches, make=case.make, run=case.run)


def _add(t: int, d: int, dtype: torch.dtype) -> Probe:
    make = lambda maker: (maker.normal(t, d, dtype=dtype), maker.normal(t, d, dtype=dtype))
    return Probe(table="memory", kind="other", work=3 * t * d * dtype.itemsize, make=make, run=torch.add)


def _memory() -> Iterator[Probe]:
    """FP32: bytes are twice those of `kernels/`, which count BF16; casts are from BF16."""
    fp32 = torch.float32
    for t, d in ((256, 64), (512, 128), (1024, 128), (512, 512)):
        rows, index = 4 * t, lambda maker, t=t: torch.arange(4 * t, device=maker.device).mul_(7919).remainder_(t)
        x = lambda maker, t=t, d=d: maker.normal(t, d, dtype=fp32)
        yield Probe(
            table="memory", kind="norm", work=2 * (rms_norm_bytes(t, d) + rms_norm_backward_bytes(t, d)), launches=2, run=_norm,
            make=lambda maker, x=x, d=d: (x(maker), maker.normal(d, dtype=fp32), x(maker)),
        )  # fmt: skip
        yield Probe(
            table="memory", kind="swiglu", launches=2, run=_swiglu,
            work=2 * (swiglu_bytes(t, d, weighted=True) + swiglu_backward_bytes(t, d, weighted=True, from_fp8=False)),
            make=lambda maker, x=x, t=t, d=d: (maker.normal(t, 2 * d, dtype=fp32), maker.normal(t, dtype=fp32), x(maker)),
        )  # fmt: skip
        yield Probe(
            table="memory", kind="permute", work=permute_bytes(rows, d, 4), run=permute,
            make=lambda maker, x=x, index=index: (x(maker), index(maker)),
        )  # fmt: skip
        yield Probe(
            table="memory", kind="sum", work=sum_copies_bytes(t, 4, d, 4), run=sum_copies,
            make=lambda maker, rows=rows, d=d, t=t: (maker.normal(rows, d, dtype=fp32), torch.randperm(rows).view(t, 4)),
        )  # fmt: skip
        yield _heads(t)
        wide = lambda maker, t=t, d=d: (maker.normal(t, d),)
        yield Probe(table="memory", kind="quantise", work=2 * t * d + rows_bytes(t, d), make=wide, run=quantise_rows)
        narrow = lambda maker, t=t, d=d: (quantise_rows(maker.normal(t, d)),)
        yield Probe(table="memory", kind="columns", work=rows_bytes(t, d) + rows_bytes(d, t), make=narrow, run=columns_of)


def _heads(t: int, heads: int = 4, plain: int = 32, turned: int = 16, dim: int = 128) -> Probe:
    """Queries and keys of a block put together, and its residual sum: what is between products and attention."""
    numbers = lambda maker, *shape: maker.normal(1, t, *shape, dtype=torch.float32)
    return Probe(
        table="memory", kind="other", work=4 * t * (2 * heads * (2 * (plain + turned) + turned) + 3 * dim), launches=2, run=_put_together,
        make=lambda maker: (
            numbers(maker, heads, plain + turned), numbers(maker, heads, plain), numbers(maker, 1, turned),
            torch.polar(torch.ones(t, turned // 2), numbers(maker, turned // 2)[0]), numbers(maker, dim), numbers(maker, dim),
        ),
    )  # fmt: skip


def _put_together(q, k, k_turned, turns, x, y):
    q_plain, q_turned = q.split([k.shape[-1], q.shape[-1] - k.shape[-1]], -1)
    keys = torch.cat([k, rotate(k_turned, turns).expand(*k.shape[:-1], -1)], -1)
    return torch.cat([q_plain, rotate(q_turned, turns)], -1).transpose(1, 2), keys.transpose(1, 2), x + y


def _norm(x, weight, grad):
    leaves = [x.detach().requires_grad_(), weight.detach().requires_grad_()]
    with torch.enable_grad():
        out = rms_norm(*leaves, 1e-6)
    return torch.autograd.grad(out, leaves, grad)


def _swiglu(gate_up, weight, grad):
    leaves = [gate_up.detach().requires_grad_(), weight.detach().requires_grad_()]
    with torch.enable_grad():
        out = swiglu(*leaves)
    return torch.autograd.grad(out, leaves, grad)
