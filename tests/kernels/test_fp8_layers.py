"""FP8 linears fused with what makes their input, against FP64; and with rows and gradients that come in FP8 already."""

import pytest
import torch
import torch.nn.functional as F
from shoestring.kernels.fp8_layers import Fp8Linears
from shoestring.kernels.fp8_rows import Fp8Rows, fp8_rows
from shoestring.kernels.fp8_weights import WeightCache
from shoestring.kernels.grouped import RowGroups
from shoestring.kernels.quantise import ACTIVATION_FLOOR, GRADIENT_FLOOR, quantise_rows
from shoestring.kernels.weight_grad import WeightGradStore

R, I, O = 256, 176, 144  # noqa: E741  nothing divides by 128


def randn(*shape, seed=0, dtype=torch.bfloat16):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def run(call, weight, grad, *inputs):
    """Output, gradients of the inputs, gradient of the weight; and what was kept for backward."""
    fp8 = Fp8Linears(casts=WeightCache(), store=WeightGradStore())
    weight, leaves = torch.nn.Parameter(weight), [x.detach().requires_grad_() for x in inputs]
    weight.main_grad = torch.zeros(weight.shape)
    out = call(fp8, weight, *leaves)
    kept = out.grad_fn.saved_tensors
    torch.autograd.backward((out,), (grad,))
    with torch.no_grad():
        (closure,) = fp8.store.take()
        closure()
    return [out.detach(), *(leaf.grad for leaf in leaves), weight.main_grad], kept


def in_fp64(call, weight, grad, *inputs):
    leaves = [t.detach().double().requires_grad_() for t in (*inputs, weight)]
    out = call(*leaves)
    out.backward(grad.double())
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def errors(found, wanted):
    """Relative, of each. E4M3's own are up to 2^-4 for one value, and about 0.04 for sums of products of two such."""
    assert all(f.isfinite().all() and f.shape == w.shape for f, w in zip(found, wanted, strict=True))
    return [((f.double() - w).norm() / w.norm()).item() for f, w in zip(found, wanted)]


def norm_linear(x, norm, weight):
    return x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6) * norm @ weight.t()


def swiglu_linear(gate_up, scale, weight):
    gate, up = gate_up.chunk(2, 1)
    return (F.silu(gate) * up * scale[:, None]) @ weight.t()


@pytest.mark.parametrize("size", [1.0, 2.0**-33], ids=["gradients near 1", "near 1e-10"])
def test_norm(size):
    x, norm, weight, grad = randn(R, I), 1 + 0.1 * randn(I, seed=1), randn(O, I, seed=2), randn(R, O, seed=3) * size
    found, kept = run(lambda fp8, w, x, n: fp8.norm_linear(x, n, 1e-6, w), weight, grad, x, norm)
    assert max(errors(found, in_fp64(norm_linear, weight, grad, x, norm))) < 0.05
    again, less = run(lambda fp8, w, x, n: fp8.norm_linear(x, n, 1e-6, w, again=True), weight, grad, x, norm)
    assert all(torch.equal(a, b) for a, b in zip(again, found))
    assert sum(t.nbytes for t in kept) - sum(t.nbytes for t in less) == R * (I + 4 * 2)


@pytest.mark.parametrize("size", [1.0, 2.0**-33], ids=["gradients near 1", "near 1e-10"])
def test_swiglu(size):
    gate_up, scale, weight, grad = (
        randn(R, 2 * I),
        randn(R, seed=1, dtype=torch.float32).abs(),
        randn(O, I, seed=2),
        randn(R, O, seed=3) * size,
    )
    found, kept = run(lambda fp8, w, x, s: fp8.swiglu_linear(x, s, w), weight, grad, gate_up, scale)
    found_errors = errors(found, in_fp64(swiglu_linear, weight, grad, gate_up, scale))
    assert 0.01 < max(found_errors) < 0.07  # the input once more in FP8, and a product of both its halves
    assert sum(t.nbytes for t in kept) == R * (2 * I + 4 * 3 + 4), "[gate | up] in FP8 with its scales, and the routing weight"


def test_swiglu_without_a_weight():
    gate_up, weight, grad = randn(R, 2 * I), randn(O, I, seed=2), randn(R, O, seed=3)
    found, _ = run(lambda fp8, w, x: fp8.swiglu_linear(x, None, w), weight, grad, gate_up)
    ones, _ = run(lambda fp8, w, x: fp8.swiglu_linear(x, torch.ones(R), w), weight, grad, gate_up)
    assert all(torch.equal(a, b) for a, b in zip(found, ones))


def test_swiglu_of_experts():
    """Each expert's rows as a layer of their own."""
    sizes = [128, 0, 128]
    groups = RowGroups.of(sizes)
    gate_up, scale, weight, grad = randn(R, 2 * I), randn(R, seed=1, dtype=torch.float32), randn(3, O, I, seed=2), randn(R, O, seed=3)
    found, _ = run(lambda fp8, w, x, s: fp8.swiglu_linear(x, s, w, groups), weight, grad, gate_up, scale)
    one = lambda fp8, w, x, s: fp8.swiglu_linear(x, s, w)
    parts = [run(one, *p)[0] for p in zip(weight, grad.split(sizes), gate_up.split(sizes), scale.split(sizes))]
    out, grad_gate_up, grad_scale, grad_weight = zip(*parts)
    for f, w in zip(found, (torch.cat(out), torch.cat(grad_gate_up), torch.cat(grad_scale), torch.stack(grad_weight)), strict=True):
        assert torch.equal(f, w)


def test_rows_and_gradients_in_fp8():
    """With scales that are powers of two, as dispatched ones have: the same as from BF16 tensors of their values."""
    rows = fp8_rows(randn(R, I), power_of_two=True, floor=ACTIVATION_FLOOR)
    grad = fp8_rows(randn(R, O, seed=1) * 2.0**-33, power_of_two=True, floor=GRADIENT_FLOOR)
    weight = randn(O, I, seed=2)
    found, kept = run(lambda fp8, w, x: fp8.linear(x, w), weight, grad, rows)
    assert kept[0].data_ptr() == rows.quantised.codes.data_ptr(), "nothing is copied"
    wanted = in_fp64(lambda x, w: x @ w.t(), weight, grad.wide(), rows.wide())
    assert max(errors(found, wanted)) < 0.04
    wide, _ = run(lambda fp8, w, x: fp8.linear(x, w, power_of_two=True), weight, grad.wide(), rows.wide())
    assert torch.equal(found[0], wide[0])


class TestFp8Rows:
    def test_they_pass_for_bf16(self):
        rows = fp8_rows(randn(16, 160), floor=ACTIVATION_FLOOR)
        leaf = rows.detach().requires_grad_()
        assert isinstance(leaf, Fp8Rows) and leaf.is_floating_point() and leaf.dtype == torch.bfloat16 and len(leaf) == 16
        assert leaf.quantised is rows.quantised and leaf.requires_grad
        wanted = quantise_rows(randn(16, 160))
        assert torch.equal(rows.quantised.scales, wanted.scales)
        assert torch.equal(rows.wide(), (wanted.codes.float() * wanted.scales.t().repeat_interleave(128, 1)[:, :160]).bfloat16())

    @pytest.mark.parametrize("read", [lambda r: r + 1, lambda r: r.clone(), lambda r: r.float(), lambda r: r[0]])
    def test_nothing_reads_them_by_mistake(self, read):
        with pytest.raises(RuntimeError, match="in FP8"):
            read(fp8_rows(randn(16, 160), floor=ACTIVATION_FLOOR))
