"""The paced copy under the interpreter, its clock a counter: right bytes, none before its time, transfers one after another."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import triton.language as tl
import triton.runtime.interpreter as stock
from shoestring.kernels.paced_copy import paced_copy, paced_copy_triton

from .triton_interpreter import Builder, interpreted

TICK = 50  # nanoseconds from one reading of the clock to the next


@pytest.fixture
def clock(monkeypatch):
    """`now`, and of every store its time and how many elements it wrote."""

    seen = SimpleNamespace(now=1000, stores=[])

    def read(self, asm, constraints, values, result, pure, pack):
        assert "%globaltimer" in asm and not pure, "a clock that is read once"
        seen.now += TICK
        return SimpleNamespace(get_result=lambda _: stock.TensorHandle(np.array([seen.now], dtype=np.int64), tl.int64))

    store = Builder.create_masked_store

    def told(self, ptrs, value, mask, *options):
        seen.stores.append((seen.now, int(np.sum(mask.data))))
        return store(self, ptrs, value, mask, *options)

    monkeypatch.setattr(Builder, "create_inline_asm", read, raising=False)
    monkeypatch.setattr(Builder, "create_masked_store", told)
    return seen


@pytest.mark.parametrize(
    ("shape", "dtype", "programs"),
    [
        ((3, 5), torch.int64, 20),  # counts: less than a chunk, and fewer programs than there may be
        ((64, 520), torch.uint8, 1),  # three chunks, the last one not full, by one program in turn
        ((33, 1024), torch.bfloat16, 3),  # several programs, and chunks that do not share out evenly
    ],
)
def test_right_bytes_none_before_its_time(clock, shape, dtype, programs):
    rows = torch.randint(256, (*shape[:-1], shape[-1] * dtype.itemsize), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    rows, port = rows.view(dtype), torch.zeros(1, dtype=torch.int64)
    whole = torch.zeros(shape[0] + 2, shape[1], dtype=dtype)
    with interpreted():
        paced_copy_triton(whole[1:-1], rows, port=port, nanoseconds=6000, latency=700, programs=programs)
    assert torch.equal(whole[1:-1].view(torch.uint8), rows.view(torch.uint8))
    assert not whole[0].view(torch.uint8).any() and not whole[-1].view(torch.uint8).any()
    begin, words = port.item() - 6000, rows.nbytes // 4
    assert begin == 1000 + TICK, "a port that is free begins now"
    chunks = sorted((time, num) for time, num in clock.stores if num > 1)
    assert sum(num for _, num in chunks) == words
    if programs == 1:  # in the order of their bytes
        come = np.cumsum([num for _, num in chunks])
        assert all(time >= begin + 700 + 6000 * upto // words for (time, _), upto in zip(chunks, come))
    assert chunks[-1][0] >= begin + 6700


def test_transfers_queue_on_a_port(clock):
    port, rows = torch.zeros(1, dtype=torch.int64), torch.arange(8)
    with interpreted():
        for nanoseconds in (10_000, 2_000):
            clock.now = 1000  # the second, while the first is under way
            paced_copy_triton(torch.empty_like(rows), rows, port=port, nanoseconds=nanoseconds, latency=0, programs=4)
        first = port.item() - 12_000
        assert first == 1000 + TICK
        clock.now = 10**6  # idle since: begins now
        paced_copy_triton(torch.empty_like(rows), rows, port=port, nanoseconds=500, latency=0, programs=4)
    assert port.item() - 500 == 10**6 + TICK


def test_nothing_to_copy_and_what_cannot_be(clock):
    port = torch.zeros(1, dtype=torch.int64)
    keyword = dict(port=port, nanoseconds=0, latency=0, programs=1)
    paced_copy_triton(torch.empty(0, 4), torch.empty(0, 4), **keyword)
    assert port.item() == 0
    with pytest.raises(ValueError, match="words of 4 bytes"):
        paced_copy_triton(torch.empty(3, 1).bfloat16(), torch.empty(3, 1).bfloat16(), **keyword)
    with pytest.raises(ValueError, match="contiguous"):
        paced_copy_triton(torch.empty(4, 4).t(), torch.empty(4, 4), **keyword)


def test_on_a_cpu_it_is_a_copy():
    rows, out = torch.randn(5, 3), torch.empty(5, 3)
    paced_copy(out, rows, port=None, nanoseconds=10**9, latency=0, programs=1)
    assert torch.equal(out, rows)
