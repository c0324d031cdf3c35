"""SwiGLU with FP8 on either side: the recipe's numbers on CPU, and the Triton kernels against them under the interpreter."""

import pytest
import torch
import torch.nn.functional as F
from shoestring.kernels import swiglu as module
from shoestring.kernels.quantise import Quantised, dequantise_rows, quantise_rows
from shoestring.kernels.swiglu import swiglu_backward, swiglu_quantised
from torch._subclasses import FakeTensorMode

from .triton_interpreter import interpreted

pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's word on silu(-100): 0 is right

SHAPES = {  # rows, hidden dim
    "two blocks of rows, several of channels": (33, 384),
    "one row": (1, 128),
    "the up half starts inside a block; a ragged last block": (18, 200),
    "narrower than a block": (5, 48),
    "a rank that received nothing": (0, 128),
}


def given(rows, hidden_dim, spread=0.0):
    """gate_up BF16, its FP8 form, a BF16 gradient, routing weights. `spread`: rows' sizes differ by up to e^spread."""
    g = torch.Generator().manual_seed(rows + hidden_dim)
    gate_up = torch.randn(rows, 2 * hidden_dim, generator=g) * (torch.randn(rows, 1, generator=g) * spread).exp()
    grad = torch.randn(rows, hidden_dim, generator=g)
    return gate_up.bfloat16(), quantise_rows(gate_up.bfloat16()), grad.bfloat16(), torch.rand(rows, generator=g)


def in_fp64(gate_up, weight, grad=None):
    """By autograd: the weighted hidden rows, and the gradients of gate_up and of the weight."""
    gate_up, weight = gate_up.double().requires_grad_(), weight.double().requires_grad_()
    gate, up = gate_up.chunk(2, 1)
    hidden = F.silu(gate) * up * weight[:, None]
    if grad is not None:
        hidden.backward(grad.double())
    return hidden.detach(), gate_up.grad, weight.grad


def off(found, wanted):
    """Relative error of the whole, and nothing that is not a number."""
    assert found.shape == wanted.shape and found.float().isfinite().all()
    return ((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-300)).item()


@pytest.mark.parametrize("from_fp8", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_forward_is_the_cast_of_the_exact_rows(shape, from_fp8):
    gate_up, kept, _, weight = given(*shape)
    source = kept if from_fp8 else gate_up
    wanted, _, _ = in_fp64(dequantise_rows(kept, torch.float64) if from_fp8 else gate_up, weight)
    out, cast = swiglu_quantised(source, weight), quantise_rows(wanted.float())
    assert out.codes.dtype == torch.float8_e4m3fn and out.codes.shape == wanted.shape
    torch.testing.assert_close(out.scales, cast.scales, rtol=1e-6, atol=0)
    # FP32 against FP64: a code may fall on the other side of a tie, hardly ever
    assert shape[0] == 0 or (out.codes.view(torch.uint8) != cast.codes.view(torch.uint8)).float().mean() < 0.002


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_backward_is_autograds_at_the_kept_input(shape):
    _, kept, grad, weight = given(*shape)
    _, grad_gate_up, grad_weight = in_fp64(dequantise_rows(kept, torch.float64), weight, grad)
    found, found_weight = swiglu_backward(kept, grad, weight)
    assert found.dtype == torch.bfloat16 and found_weight.dtype == torch.float32
    assert off(found, grad_gate_up) < 3e-3 and off(found_weight, grad_weight) < 1e-6
    assert swiglu_backward(kept, grad)[1] is None


def test_tiny_gradients_survive():
    """At 1e-10, as activation gradients may be: nothing on the way may have a floor."""
    _, kept, grad, weight = given(8, 128)
    one, tiny = swiglu_backward(kept, grad, weight), swiglu_backward(kept, (grad.float() * 2.0**-33).bfloat16(), weight)
    assert off(tiny[0].double() * 2**33, one[0]) < 1e-6 and off(tiny[1].double() * 2**33, one[1]) < 1e-6


def test_fake_tensors_have_the_same_shapes():
    gate_up, kept, grad, weight = given(18, 200)
    real = [*vars(swiglu_quantised(gate_up, weight)).values(), *swiglu_backward(kept, grad, weight)]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = [mode.from_tensor(t) for t in (gate_up, kept.codes, kept.scales, grad, weight)]
        traced = [*vars(swiglu_quantised(fake[0], fake[4])).values(), *swiglu_backward(Quantised(fake[1], fake[2]), *fake[3:])]
    assert [(t.shape, t.dtype) for t in traced] == [(t.shape, t.dtype) for t in real]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("from_fp8", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_kernel_forward(shape, from_fp8, weighted):
    gate_up, kept, _, weight = given(*shape, spread=3.0)
    weight = weight if weighted else None
    wanted = swiglu_quantised(kept if from_fp8 else gate_up, weight)
    with interpreted():
        codes, scales = module.swiglu_quantised_triton(*((kept.codes, kept.scales) if from_fp8 else (gate_up, None)), weight)
    torch.testing.assert_close(scales, wanted.scales, rtol=1e-6, atol=0)
    if shape[0]:
        assert off(dequantise_rows(Quantised(codes, scales), torch.float64), dequantise_rows(wanted, torch.float64)) < 2e-3
        assert (codes.view(torch.uint8) != wanted.codes.view(torch.uint8)).float().mean() < 0.002


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_kernel_backward(shape, weighted):
    _, kept, grad, weight = given(*shape, spread=3.0)
    weight = weight if weighted else None
    wanted, wanted_weight = swiglu_backward(kept, grad, weight)
    with interpreted():
        found, found_weight = module.swiglu_backward_triton(kept.codes, kept.scales, grad, weight)
    assert off(found, wanted) < 1e-4
    if weighted:
        assert off(found_weight, wanted_weight) < 1e-6


def test_bytes():
    """What the recipe says of one row of 256 hidden channels: 512 codes and 4 scales in, 256 and 2 out, one weight."""
    assert module.swiglu_quantised_bytes(1, 256, from_fp8=True, weighted=True) == 512 + 4 * 4 + 256 + 2 * 4 + 4
    assert module.swiglu_quantised_bytes(1, 256, from_fp8=False, weighted=False) == 1024 + 256 + 2 * 4
    assert module.swiglu_backward_bytes(1, 256, weighted=True) == 512 + 4 * 4 + 512 + 1024 + 4 + 4
