"""Root-mean-square norm, and the hook that moves gradients which autograd makes into main_grad."""

import pytest
import torch
from shoestring.kernels.rms_norm import rms_norm, rms_norm_reference
from shoestring.kernels.weight_grad import fold_into_main_grad


@pytest.mark.parametrize("shape", [(9, 12), (2, 3, 12), (0, 12)])  # rows; leading dims; none
def test_forward_and_gradients(kit, leaf, shape):
    rows, grad = kit.randn(*shape), kit.randn(*shape)
    weight = kit.randn(12)
    x, w, xw, ww = leaf(rows), leaf(weight), leaf(rows, wide=True), leaf(weight, wide=True)
    wanted = xw / (xw.square().mean(-1, keepdim=True) + 1e-5).sqrt() * ww
    wanted.backward(grad.double())
    out = rms_norm(x, w, 1e-5)
    assert out.dtype == kit.dtype
    kit.check(out, wanted)
    kit.check(rms_norm_reference(rows, weight, 1e-5), wanted)
    out.backward(grad)
    kit.check(x.grad, xw.grad)
    kit.check(w.grad, ww.grad)


def test_rows_of_zeros_stay_zero(kit, leaf):
    x = leaf(torch.zeros(2, 4, dtype=kit.dtype))
    out = rms_norm(x, torch.ones(4, dtype=kit.dtype), 1e-6)
    out.sum().backward()
    assert not out.any() and x.grad.isfinite().all()


def test_each_backward_adds_to_main_grad(kit):
    weight = kit.param(12)
    weight.register_post_accumulate_grad_hook(fold_into_main_grad)
    rows = kit.randn(5, 12)
    unit = rms_norm(rows, torch.ones(12, dtype=kit.dtype), 1e-6).double().sum(0)
    for _ in range(2):
        rms_norm(rows, weight, 1e-6).sum().backward()
        assert weight.grad is None
    kit.check(weight.main_grad, 2 * unit)
