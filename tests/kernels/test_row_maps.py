"""Which row each copy gets, and that nothing between routing and combine makes the host wait for the device: what an operator does inside
(`tests/parallel/test_no_host_wait.py` has what is around them)."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shoestring.kernels import fp8_linear, permute, quantise, row_maps, swiglu
from shoestring.kernels.quantise import Quantised
from shoestring.kernels.row_maps import rows_bound
from torch._subclasses import FakeTensorMode
from triton.runtime.jit import JITFunction

from .triton_interpreter import interpreted


def brute_force(slots, num_slots, align, room):
    """Counts, ends, rows, copies of rows, by dealing out one copy after the other."""
    shares = [[n for n, slot in enumerate(slots) if slot == e] for e in range(num_slots)]
    copies, ends, rows = [], [], [None] * len(slots)
    for share in shares:
        for n in share:
            rows[n] = len(copies)
            copies.append(n)
        copies += [-1] * (-len(copies) % align)
        ends.append(len(copies))
    return [len(s) for s in shares], ends, rows, copies + [-1] * (room - len(copies))


def routings(e):
    return st.tuples(st.lists(st.integers(0, e - 1), max_size=20), st.just(e), st.sampled_from([1, 4, 16]))


@given(st.integers(1, 6).flatmap(routings))
def test_maps_are_those_of_dealing_copies_out(routing):
    slots, num_slots, align = routing
    room = rows_bound(len(slots), num_slots, align)
    maps = row_maps.row_maps(torch.tensor(slots, dtype=torch.int64).view(-1, 1), num_slots, align)
    assert [maps.counts_e.tolist(), maps.ends_e.tolist(), maps.row_of_TK.flatten().tolist(), maps.copy_of_R.tolist()] == [
        *brute_force(slots, num_slots, align, room)
    ]
    assert room % align == 0 and maps.ends_e.dtype == torch.int32


@given(st.lists(st.integers(0, 9), min_size=1, max_size=6), st.sampled_from([1, 4, 16]))
def test_the_bound_is_enough_and_is_reached(counts, align):
    padded = sum(-(-n // align) * align for n in counts)
    assert padded <= rows_bound(sum(counts), len(counts), align)
    one_each = [1] * len(counts)
    assert rows_bound(len(one_each), len(one_each), align) == len(counts) * align


def test_no_more_rows_than_int32():
    """Refused before anything is allocated."""
    with pytest.raises(ValueError, match=r"2147483904 rows.*micro_batch"):
        rows_bound(2**31, 3, 128)


SHAPES = {  # copies, slots, align
    "more copies than one pass of a program": (2500, 5, 128),
    "slots not a power of two, some without copies": (40, 11, 16),
    "one slot": (7, 1, 4),
    "no copies": (0, 3, 8),
    "no padding": (33, 4, 1),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_kernels(shape):
    copies, num_slots, align = shape
    slot_N = torch.randint(0, max(1, num_slots - 2), (copies,), generator=torch.Generator().manual_seed(0))
    with interpreted():
        found = row_maps.row_maps_triton(slot_N, num_slots, align)
    for ours, wanted in zip(found, row_maps.row_maps_reference(slot_N, num_slots, align)):
        assert ours.dtype == wanted.dtype and torch.equal(ours, wanted)


@pytest.fixture
def no_host():
    """Tensors without values: whatever the host asks of them raises. Kernels are not run."""
    with patch.object(JITFunction, "run", lambda *_, **__: None), FakeTensorMode():
        yield


def by_name(suffix):
    """What the operators of that name do on one kind of device; fake tensors do not see inside an operator."""
    return getattr(row_maps, f"row_maps_{suffix}"), getattr(permute, f"permute_{suffix}"), getattr(permute, f"sum_copies_{suffix}")


@pytest.mark.parametrize("functions", [(row_maps._row_maps, permute.permute, permute.sum_copies), by_name("reference"), by_name("triton")])
def test_nothing_between_routing_and_combine_waits_for_the_device(no_host, functions):
    """One rank with all experts: 64 tokens, top-8 of 16, there and back."""
    make_maps, gather, add = functions
    expert_TK, x_TD = torch.empty(64, 8, dtype=torch.int64), torch.empty(64, 256, dtype=torch.bfloat16)
    _, _, row_of_N, copy_of_R = make_maps(expert_TK.flatten(), 16, 128)
    rows_RD = gather(x_TD, copy_of_R.div(8, rounding_mode="floor"))
    assert rows_RD.shape == (rows_bound(512, 16, 128), 256)
    assert add(rows_RD, row_of_N.view_as(expert_TK)).shape == x_TD.shape


def test_nor_do_experts_in_fp8(no_host):
    """What the host does to launch the kernels of a product over FP8 rows that were dispatched and of SwiGLU: forward, and gradients."""
    matmul, outer = (
        next(c for c in fp8_linear.CONFIGS if c.kernel is kernel and c.meta["GROUPED"])
        for kernel in (fp8_linear.fp8_matmul_kernel, fp8_linear.add_fp8_outer_kernel)
    )
    slot_N, x_TD = torch.empty(512, dtype=torch.int64), torch.empty(64, 256, dtype=torch.bfloat16)
    _, ends_e, _, copy_of_R = row_maps.row_maps_triton(slot_N, 16, 128)
    codes, scales = quantise.quantise_rows_triton(x_TD, True, 1e-4)
    rows = Quantised(permute.permute_triton(codes, copy_of_R), permute.permute_scales_triton(scales, copy_of_R))
    weight = Quantised(torch.empty(16, 512, 256, dtype=torch.float8_e4m3fn), torch.empty(16, 4, 2))
    out = fp8_linear.matmul_triton(rows, weight, torch.bfloat16, ends_e, config=matmul)
    assert out.shape == (rows_bound(512, 16, 128), 512)
    weight_R = permute.permute(torch.empty(512), copy_of_R)
    hidden, _ = swiglu.swiglu_quantised_triton(out, None, weight_R)
    swiglu.swiglu_backward_triton(*quantise.quantise_rows_triton(out, False, 1e-4), torch.empty(hidden.shape, dtype=out.dtype), weight_R)
    columns = [Quantised(*quantise.quantise_columns_triton(*c, 1e-30)) for c in ((out, None), (rows.codes, rows.scales))]
    fp8_linear.add_outer_triton(torch.empty(16, 512, 256), *columns, ends_e, config=outer)


@pytest.mark.parametrize("read", [lambda t: t.tolist(), lambda t: int(t.sum()), torch.bincount, lambda t: (t < 0).nonzero()])
def test_that_test_sees_a_host_read(no_host, read):
    with pytest.raises((RuntimeError, NotImplementedError)):
        read(torch.empty(4, dtype=torch.int64))


def test_bytes():
    """Six copies of three slots, align 4 (the drawing): 6 slots in, 6 rows and 12 copies out, 3 counts and 3 ends."""
    assert row_maps.row_maps_bytes(6, 3, 4) == 8 * 6 + 8 * 6 + 8 * 12 + 3 * 8 + 3 * 4
