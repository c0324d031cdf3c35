"""The linear: its input gradient comes at once, its weight gradient when the closure runs, and adds to what main_grad holds."""

import torch
import torch.nn.functional as F
from shoestring.kernels.linear import linear


def test_forward_and_both_gradients(kit, leaf):
    rows, weight, grad = kit.randn(11, 6), kit.param(7, 6), kit.randn(11, 7)
    x, xw, ww = leaf(rows), leaf(rows, wide=True), leaf(weight, wide=True)
    out = linear(x, weight, kit.store)
    wanted = F.linear(xw, ww)
    wanted.backward(grad.double())
    kit.check(out, wanted)

    out.backward(grad)
    kit.check(x.grad, xw.grad)
    assert weight.grad is None and not weight.main_grad.any()
    linear(x, weight, kit.store).backward(grad)  # a second micro-batch adds
    assert kit.run_closures() == 2 and kit.run_closures() == 0
    kit.check(weight.main_grad, 2 * ww.grad)


def test_gate_widens_a_weight_on_the_fly(kit, leaf):
    """The router's gate: rows in FP32 or wider, the weight in the model's dtype; only rounding of the weight is left."""
    rows, weight = kit.randn(5, 6, dtype=kit.wide), kit.param(3, 6)
    x, xw, ww = leaf(rows), leaf(rows, wide=True), leaf(weight, wide=True)
    out = linear(x, weight, kit.store, compute_dtype=kit.wide)
    F.linear(xw, ww).square().sum().backward()
    out.square().sum().backward()
    assert kit.run_closures() == 1
    assert out.dtype == x.grad.dtype == weight.main_grad.dtype == kit.wide
    exact = 1e-13 if kit.wide == torch.float64 else 1e-6
    kit.check(x.grad, xw.grad, exact)
    kit.check(weight.main_grad, ww.grad, exact)


def test_a_gradient_that_arrives_expanded(kit, leaf):
    """`sum()` hands back one number with strides of zero."""
    x, weight = leaf(kit.randn(4, 6)), kit.param(5, 6)
    linear(x, weight, kit.store).sum().backward()
    kit.check(x.grad, weight.detach().double().sum(0).expand(4, 6))
    assert kit.run_closures() == 1
    kit.check(weight.main_grad, x.detach().double().sum(0).expand(5, 6))


def test_no_input_gradient_where_none_is_wanted(kit):
    """Still the weight's own gradient is made: that is what the first layer of a stage needs."""
    x, weight = kit.randn(4, 6), kit.param(5, 6)
    linear(x, weight, kit.store).sum().backward()
    assert x.grad is None and len(kit.store) == 1


def test_rows_made_again_are_not_kept(kit, leaf):
    """`again` runs once, in backward, and the weight's gradient is of what it makes: here something else, which tells them apart."""
    rows, other, weight, grad = kit.randn(11, 6), kit.randn(11, 6), kit.param(7, 6), kit.randn(11, 7)
    made = []
    out = linear(leaf(rows), weight, kit.store, again=lambda: made.append(1) or other)
    assert not out.grad_fn.saved_tensors and not made
    out.backward(grad)
    assert made == [1] and kit.run_closures() == 1
    kit.check(weight.main_grad, grad.double().t() @ other.double())
