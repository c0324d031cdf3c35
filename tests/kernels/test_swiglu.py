"""silu(gate) * up, with and without a routing weight per row."""

import pytest
import torch
import torch.nn.functional as F
from shoestring.kernels.swiglu import swiglu, swiglu_reference


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("num_rows", [9, 0])  # 0: a rank that received nothing
def test_forward_and_gradients(kit, leaf, weighted, num_rows):
    gate_up, grad = kit.randn(num_rows, 14), kit.randn(num_rows, 7)
    weight = kit.randn(num_rows, dtype=kit.wide) if weighted else None
    x, xw = leaf(gate_up), leaf(gate_up, wide=True)
    w, ww = (leaf(weight), leaf(weight, wide=True)) if weighted else (None, None)
    wanted = F.silu(xw[:, :7]) * xw[:, 7:]
    wanted = wanted * ww[:, None] if weighted else wanted
    wanted.backward(grad.double())
    out = swiglu(x, w)
    assert out.dtype == kit.dtype
    kit.check(out, wanted)
    kit.check(swiglu_reference(gate_up, weight), wanted)
    out.backward(grad)
    kit.check(x.grad, xw.grad)
    if weighted:
        assert w.grad.dtype == kit.wide
        kit.check(w.grad, ww.grad)


def test_large_gates_do_not_overflow(kit):
    """silu(-100) is 0 and silu(100) is 100, gradients included."""
    x = torch.tensor([[-100.0, 100.0, 1.0, 1.0]], dtype=kit.dtype, requires_grad=True)
    out = swiglu(x)
    out.sum().backward()
    kit.check(out, torch.tensor([[0.0, 100.0]]))
    kit.check(x.grad, torch.tensor([[0.0, 1.0, 0.0, 100.0]]))
