"""A copy that takes as long as a link would, by a bounded number of programs: what an all-to-all does to the GPU it runs beside.

    port   (1,) int64   when the last transfer is over that queued there, in nanoseconds of the GPU's clock; 0 at first
    begin  (1,) int64   when this one may begin

A chunk is copied when the link would have brought it; until then its program waits where it is, and keeps its place on an SM, as NCCL's
do. One more kernel before the copy queues it on the port, so that all programs of the copy agree on when it begins.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .configs import KernelConfig, choose


def paced_copy_reference(out: Tensor, rows: Tensor) -> None:
    out.copy_(rows.view_as(out))


# ---------------------------------------------------------------- Triton


@triton.jit
def clock():
    return tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)  # nanoseconds


@triton.jit
def queue_kernel(port, begin, nanoseconds):
    """Whoever queues in between only makes this transfer begin later: the port's time never falls."""
    tl.atomic_max(port, clock())
    tl.store(begin, tl.atomic_add(port, tl.cast(nanoseconds, tl.int64)))


@triton.jit
def paced_copy_kernel(rows, out, begin, words, nanoseconds, latency, CHUNK: tl.constexpr):
    start, per_link = tl.load(begin) + latency, tl.cast(nanoseconds, tl.int64)
    for first in tl.range(tl.program_id(0) * CHUNK, words, tl.num_programs(0) * CHUNK):
        due = start + tl.minimum(first + CHUNK, words) * per_link // words
        now = clock()
        while now < due:
            now = clock()
        at = first + tl.arange(0, CHUNK)
        tl.store(out + at, tl.load(rows + at, mask=at < words), mask=at < words)


CONFIGS = (
    KernelConfig(
        kernel=queue_kernel,
        name="paced copy, queue",
        signature={"port": "*i64", "begin": "*i64", "nanoseconds": "i32"},
        meta={},
        num_warps=1,
    ),
    KernelConfig(
        kernel=paced_copy_kernel,
        name="paced copy",
        signature={"rows": "*i32", "out": "*i32", "begin": "*i64", "words": "i32", "nanoseconds": "i32", "latency": "i32"},
        meta={"CHUNK": 4096},
        num_warps=8,
    ),
)


def paced_copy_triton(out: Tensor, rows: Tensor, *, port: Tensor, nanoseconds: int, latency: int, programs: int) -> None:
    if rows.nbytes % 4 or not (rows.is_contiguous() and out.is_contiguous()):
        raise ValueError(f"{tuple(rows.shape)} {rows.dtype} is copied in words of 4 bytes, from and to contiguous memory")
    if not rows.nbytes:
        return
    begin, words = torch.empty_like(port), rows.nbytes // 4
    queue, copy = choose(CONFIGS, queue_kernel), choose(CONFIGS, paced_copy_kernel)
    queue_kernel[(1,)](port, begin, nanoseconds, **queue.options)
    grid = (min(programs, triton.cdiv(words, copy.meta["CHUNK"])),)
    as_words = lambda t: t.flatten().view(torch.int32)
    paced_copy_kernel[grid](as_words(rows), as_words(out), begin, words, nanoseconds, latency, **copy.options)


# ---------------------------------------------------------------- what others call


def paced_copy(out: Tensor, rows: Tensor, *, port: Tensor | None, nanoseconds: int, latency: int, programs: int) -> None:
    """The bytes of `rows` to `out`, as many, on the current stream, by at most `programs` programs. It is over `latency` nanoseconds after
    the `nanoseconds` (below 2^31, both) that it takes on `port` after those before it. On a CPU a plain copy: whoever waits, paces it."""
    if rows.is_cuda:
        paced_copy_triton(out, rows, port=port, nanoseconds=nanoseconds, latency=latency, programs=programs)
    else:
        paced_copy_reference(out, rows)
