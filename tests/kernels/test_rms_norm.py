"""Root-mean-square norm, and the hook that moves gradients which autograd makes into main_grad."""

import pytest
import torch
from shoestring.kernels import rms_norm as module
from shoestring.kernels.quantise import dequantise_rows, quantise_rows
from shoestring.kernels.rms_norm import rms_norm, rms_norm_backward, rms_norm_quantised, rms_norm_reference
from shoestring.kernels.weight_grad import fold_into_main_grad

from .triton_interpreter import interpreted


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


SHAPES = {  # rows, dim
    "several rows and blocks": (5, 384),
    "one row, one block": (1, 128),
    "a ragged last block; wider than the narrowest configuration": (3, 1000),
    "narrower than a block": (4, 48),
    "no rows": (0, 128),
}


@pytest.mark.parametrize("power_of_two", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_quantised(shape, power_of_two):
    """The operator on CPU, and the kernel, against the cast of the norm in FP64. Rows of very different sizes come out alike."""
    g = torch.Generator().manual_seed(1)
    x = (torch.randn(shape, generator=g) * (3 * torch.randn(shape[0], 1, generator=g)).exp()).bfloat16()
    weight = torch.randn(shape[1], generator=g).bfloat16()
    norm = 1 / (x.double().square().mean(1, keepdim=True) + 1e-6).sqrt()
    wanted = quantise_rows((x.double() * norm * weight.double()).float(), power_of_two=power_of_two)
    out, scale = rms_norm_quantised(x, weight, 1e-6, power_of_two=power_of_two)
    with interpreted():
        by_kernel = module.rms_norm_quantised_triton(x, weight, 1e-6, power_of_two)
    for codes, scales, norms in ((out.codes, out.scales, scale), by_kernel):
        assert codes.shape == x.shape and norms.shape == (len(x), 1)
        torch.testing.assert_close(scales, wanted.scales, rtol=0 if power_of_two else 1e-6, atol=0)
        torch.testing.assert_close(norms, norm.float(), rtol=1e-6, atol=0)
        assert not len(x) or (codes.view(torch.uint8) != wanted.codes.view(torch.uint8)).float().mean() < 0.002  # ties, to either side


def test_the_cast_norms_backward_is_the_norms(leaf):
    x, w = leaf(torch.randn(4, 256)), leaf(torch.randn(256))
    out, scale = rms_norm_quantised(x.detach(), w.detach(), 1e-6)
    wanted = rms_norm(x, w, 1e-6)
    grad = torch.randn(4, 256)
    wanted.backward(grad)
    for found, exact in zip(rms_norm_backward(grad, x.detach(), w.detach(), scale), (x.grad, w.grad)):
        assert (found - exact).norm() < 1e-6 * exact.norm()
    assert (dequantise_rows(out, torch.float32) - wanted).norm() < 0.04 * wanted.norm()


def test_rows_too_wide_for_registers_are_refused():
    with pytest.raises(ValueError, match=r"8320 wide.*8192 at most"):
        module.rms_norm_quantised_triton(torch.zeros(1, 8320), torch.ones(8320), 1e-6, False)


def test_quantised_as_an_operator():
    """Its schema, and that fake tensors get the shapes of real ones."""
    args = (torch.randn(3, 200).bfloat16(), torch.ones(200).bfloat16(), 1e-6, False)
    torch.library.opcheck(torch.ops.shoestring.rms_norm_quantised.default, args, test_utils=("test_schema", "test_faketensor"))


def test_bytes():
    """One BF16 row of 256 and the weight in; 256 codes, two scales and the norm out."""
    assert module.rms_norm_quantised_bytes(1, 256) == 512 + 512 + 256 + 8 + 4
