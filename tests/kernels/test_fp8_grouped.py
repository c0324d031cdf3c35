"""Grouped FP8 linears: each expert's rows as a linear of their own, bit for bit; that one is held against FP64 in `test_fp8_linear.py`."""

import pytest
import torch
from shoestring.kernels.fp8_grouped import add_fp8_grouped_outer, fp8_grouped_matmul
from shoestring.kernels.fp8_layers import Fp8Linears
from shoestring.kernels.fp8_linear import CONFIGS, add_fp8_outer_kernel, add_outer_triton, fp8_matmul_kernel, matmul_triton
from shoestring.kernels.fp8_weights import WeightCache
from shoestring.kernels.grouped import RowGroups, row_alignment
from shoestring.kernels.quantise import quantise_blocks, quantise_columns, quantise_rows
from shoestring.kernels.weight_grad import WeightGradStore
from torch.utils.flop_counter import FlopCounterMode

from .triton_interpreter import interpreted

SIZES = {
    "even": [128, 128],
    "uneven": [128, 384],
    "experts without rows, at both ends and inside": [0, 256, 0, 128, 0],
    "one expert takes all": [0, 0, 256],
    "a single expert": [128],
    "no rows at all": [0, 0],
}
I, O = 176, 144  # noqa: E741  whole numbers of 16, not of 128


def tensors(sizes):
    g = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(shape, generator=g).bfloat16()
    size_e = torch.logspace(-2, 2, len(sizes))[:, None, None]  # no expert's scale fits another's
    return randn(sum(sizes), I), (randn(len(sizes), O, I) * size_e).bfloat16(), randn(sum(sizes), O)


def linears(store, casts=None):
    return Fp8Linears(casts=WeightCache() if casts is None else casts, store=store)


def run(function, rows, weight, grad):
    weight, x, store = torch.nn.Parameter(weight), rows.clone().requires_grad_(), WeightGradStore()
    weight.main_grad = torch.ones(weight.shape)
    out = function(x, weight, store)
    out.backward(grad)
    with torch.no_grad():
        for closure in store.take():
            closure()
    return out.detach(), x.grad, weight.main_grad


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("power_of_two", [False, True])
def test_equals_linears(sizes, power_of_two):
    rows, weight, grad = tensors(sizes)
    groups = RowGroups.of(sizes)
    grouped = lambda x, w, store: linears(store).linear(x, w, groups, power_of_two=power_of_two)
    one = lambda x, w, store: linears(store).linear(x, w, power_of_two=power_of_two)
    out, grad_rows, grad_weight = run(grouped, rows, weight, grad)
    alone = [run(one, *parts) for parts in zip(rows.split(sizes), weight, grad.split(sizes))]
    assert torch.equal(out, torch.cat([a[0] for a in alone])) and torch.equal(grad_rows, torch.cat([a[1] for a in alone]))
    assert torch.equal(grad_weight, torch.stack([a[2] for a in alone]))
    assert all((grad_weight[e] == 1).all() for e, size in enumerate(sizes) if size == 0)


def test_padding_of_zeros_adds_nothing():
    rows, weight, grad = tensors([128, 128])
    rows[100:128], grad[100:128], groups = 0, 0, RowGroups.of([128, 128])
    out, grad_rows, grad_weight = run(lambda x, w, s: linears(s).linear(x, w, groups), rows, weight, grad)
    assert not out[100:128].any() and not grad_rows[100:128].any()
    _, _, short = run(lambda x, w, s: linears(s).linear(x, w), rows[:100], weight[0], grad[:100])
    torch.testing.assert_close(grad_weight[0], short, rtol=1e-5, atol=1e-5)


def test_kept_in_fp8_or_made_again():
    rows, weight, grad = tensors([128, 256])
    groups, casts, store = RowGroups.of([128, 256]), WeightCache(), WeightGradStore()
    parameter = torch.nn.Parameter(weight)
    out = linears(store, casts).linear(rows.clone().requires_grad_(), parameter, groups)
    assert [t.dtype for t in out.grad_fn.saved_tensors] == [torch.float8_e4m3fn, torch.float32]
    again = lambda x, w, s: linears(s, casts).linear(x, w, groups, again=lambda: rows)
    kept = lambda x, w, s: linears(s, casts).linear(x, w, groups)
    assert all(torch.equal(a, b) for a, b in zip(run(again, rows, weight, grad), run(kept, rows, weight, grad)))
    assert not linears(store, casts).linear(rows.clone().requires_grad_(), parameter, groups, again=lambda: rows).grad_fn.saved_tensors


def test_rows_that_are_not_padded_are_refused():
    rows, weight, _ = tensors([128, 120])
    with pytest.raises(ValueError, match="multiples of 8: FP8 wants multiples of 128"):
        linears(WeightGradStore()).linear(rows, torch.nn.Parameter(weight), RowGroups.of([128, 120]))
    assert row_alignment(torch.bfloat16, fp8=True) == 128


def test_operators():
    groups, checks = RowGroups.of([128, 0, 128]), ("test_faketensor",)
    rows, weight, grad = tensors(groups.sizes)
    a, b = quantise_rows(rows), WeightCache().of(torch.nn.Parameter(weight)).blocks
    product = (a.codes, a.scales, b.codes, b.scales, groups.ends_e, torch.bfloat16)
    torch.library.opcheck(torch.ops.shoestring.fp8_grouped_matmul, product, test_utils=checks)
    c, d = quantise_rows(rows.t().contiguous()), quantise_rows(grad.t().contiguous())
    outer = (torch.zeros(3, O, I), d.codes, d.scales, c.codes, c.scales, groups.ends_e)
    torch.library.opcheck(torch.ops.shoestring.add_fp8_grouped_outer, outer, test_utils=checks)
    with FlopCounterMode(display=False) as counter:
        run(lambda x, w, s: linears(s).linear(x, w, groups), rows, weight, grad)
    assert counter.get_total_flops() == 3 * 2 * 256 * I * O
    assert quantise_blocks(weight[0]).scales.shape == b.scales.shape[1:]


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_kernels(sizes):
    """Interpreted, in every form that this can tell apart (it knows no warps), against the references."""
    groups = RowGroups.of(sizes)
    rows, weight, grad = tensors(sizes)
    a, b = quantise_rows(rows), WeightCache().of(torch.nn.Parameter(weight)).blocks
    columns = quantise_columns(grad), quantise_columns(rows)
    product, sums = fp8_grouped_matmul(a, b, groups, torch.bfloat16), torch.ones(len(sizes), O, I)
    add_fp8_grouped_outer(sums, *columns, groups)
    for config in {(c.kernel, c.meta["BM"], c.meta["BN"]): c for c in CONFIGS if c.meta["GROUPED"]}.values():
        with interpreted():
            if config.kernel is fp8_matmul_kernel:
                found, wanted = matmul_triton(a, b, torch.bfloat16, groups.ends_e, config=config), product
            else:
                assert config.kernel is add_fp8_outer_kernel
                found, wanted = torch.ones_like(sums), sums
                add_outer_triton(found, *columns, groups.ends_e, config=config)
        assert found.isfinite().all()
        torch.testing.assert_close(found, wanted, rtol=2**-7, atol=1e-5 * max([1, *wanted.abs().flatten()]))
