"""One product per expert over sorted rows: any sizes, experts without rows, and no rows at all."""

import pytest
import torch
from shoestring.kernels.grouped import RowGroups, grouped_linear, grouped_mm_reference, row_alignment

SIZES = {
    "even": [32, 32, 32, 32],
    "uneven": [64, 32, 96, 32],
    "experts without rows, at both ends and inside": [0, 64, 0, 32, 0],
    "one expert takes all": [0, 0, 128],
    "a single expert": [32],
    "not a multiple of the alignment": [3, 0, 17, 1],
    "no rows at all": [0, 0, 0],
}


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_forward_and_both_gradients(kit, leaf, sizes):
    num_rows, experts = sum(sizes), len(sizes)
    rows, weight, grad = kit.randn(num_rows, 16), kit.param(experts, 24, 16), kit.randn(num_rows, 24)
    x, xw, ww = leaf(rows), leaf(rows, wide=True), leaf(weight, wide=True)
    out = grouped_linear(x, weight, RowGroups.of(sizes), kit.store)
    expert_of_R = torch.arange(experts).repeat_interleave(torch.tensor(sizes))
    wanted = torch.einsum("ri,roi->ro", xw, ww[expert_of_R])
    wanted.backward(grad.double())
    assert out.dtype == kit.dtype
    kit.check(out, wanted)

    out.backward(grad)
    kit.check(x.grad, xw.grad)
    assert weight.grad is None
    assert kit.run_closures() == 1
    kit.check(weight.main_grad, ww.grad)
    assert all(not weight.main_grad[e].any() for e, n in enumerate(sizes) if n == 0)


def test_gradient_check():
    """By finite differences, which know nothing of either implementation."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(5, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    weight = torch.randn(3, 2, 3, dtype=torch.float64, generator=generator, requires_grad=True)
    groups = RowGroups.of([2, 0, 3])
    assert torch.autograd.gradcheck(lambda r, w: grouped_mm_reference(r, w.transpose(1, 2), groups), (rows, weight))


def test_groups():
    groups = RowGroups.of([3, 0, 2])
    assert groups.sizes == [3, 0, 2] and groups.ends_e.tolist() == [3, 3, 5] and groups.ends_e.dtype == torch.int32


def test_alignment_is_whole_16_byte_units():
    for dtype in (torch.float32, torch.bfloat16):
        assert row_alignment(dtype) * dtype.itemsize % 16 == 0


def test_rows_made_again_are_not_kept(kit, leaf):
    rows, other, weight, grad = kit.randn(5, 16), kit.randn(5, 16), kit.param(2, 24, 16), kit.randn(5, 24)
    out = grouped_linear(leaf(rows), weight, RowGroups.of([2, 3]), kit.store, again=lambda: other)
    assert not out.grad_fn.saved_tensors
    out.backward(grad)
    assert kit.run_closures() == 1
    kit.check(weight.main_grad, torch.stack([g.double().t() @ o.double() for g, o in zip(grad.split([2, 3]), other.split([2, 3]))]))
