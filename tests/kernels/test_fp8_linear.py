"""FP8 linears against FP64: products of codes to FP32's rounding, and what quantising costs within what E4M3 allows.

A normal E4M3 number has three bits after the leading one. A value in [2^e, 2^(e+1)) is off by up to half a step of 2^(e-3), evenly
spread: noise of 2^(2e-6) / 12 against a square between 2^2e and 2^(2e+2). Hence 768 to 4 x 768 of signal to one of noise for one
rounding, and for a product of independently rounded factors as many times less as there were roundings.
"""

import math

import pytest
import torch
from shoestring.kernels.fp8_layers import Fp8Linears
from shoestring.kernels.fp8_linear import (
    CONFIGS,
    add_fp8_outer,
    add_fp8_outer_kernel,
    add_outer_triton,
    fp8_matmul,
    fp8_matmul_kernel,
    matmul_triton,
)
from shoestring.kernels.fp8_weights import WeightCache
from shoestring.kernels.quantise import dequantise_blocks, dequantise_rows, quantise_blocks, quantise_rows
from shoestring.kernels.weight_grad import WeightGradStore
from torch.utils.flop_counter import FlopCounterMode

from .triton_interpreter import interpreted

SHAPES = {  # M, N, K
    "whole blocks": (256, 128, 384),
    "nothing divides": (200, 144, 176),
    "less than a block each way": (16, 32, 48),
    "one row": (1, 256, 128),
    "a row of scales beyond N's last block": (64, 136, 272),
    "no rows": (0, 128, 128),
}


def normal(*shape, seed=0, spread=0.0, dtype=torch.bfloat16):
    """Rows differ in size by up to e^(3 spread) or so."""
    g = torch.Generator().manual_seed(seed)
    size = (spread * torch.randn(shape[0], *[1] * (len(shape) - 1), generator=g)).exp()
    return (torch.randn(shape, generator=g) * size).to(dtype)


def decibels(found, wanted):
    assert found.shape == wanted.shape and found.isfinite().all()
    noise = found.double() - wanted
    return 10 * math.log10(wanted.square().sum() / noise.square().sum())


def within_e4m3(found, wanted, roundings):
    """Not worse than E4M3 is, and not so good that it was none."""
    one = 10 * math.log10(768)
    return one - 10 * math.log10(roundings) <= decibels(found, wanted) <= one + 10 * math.log10(4 / roundings)


@pytest.mark.parametrize(("M", "N", "K"), SHAPES.values(), ids=SHAPES)
def test_products_of_codes(M, N, K):
    a, b = quantise_rows(normal(M, K, spread=2)), quantise_blocks(normal(N, K, seed=1, spread=2))
    wanted = dequantise_rows(a, torch.float64) @ dequantise_blocks(b, torch.float64).t()
    torch.testing.assert_close(fp8_matmul(a, b, torch.float32).double(), wanted, rtol=0, atol=1e-6 * max([1, *wanted.abs().flatten()]))
    assert torch.equal(fp8_matmul(a, b, torch.bfloat16), fp8_matmul(a, b, torch.float32).bfloat16())


@pytest.mark.parametrize(("M", "N", "K"), [*list(SHAPES.values())[:-1], (128, 64, 0)], ids=[*list(SHAPES)[:-1], "nothing to sum"])
def test_outer_products_of_codes(M, N, K):
    """Added to what is there."""
    a, b = quantise_rows(normal(M, K, spread=2)), quantise_rows(normal(N, K, seed=1, spread=2))
    before = normal(M, N, seed=2, dtype=torch.float32)
    main = before.clone()
    add_fp8_outer(main, a, b)
    wanted = before.double() + dequantise_rows(a, torch.float64) @ dequantise_rows(b, torch.float64).t()
    torch.testing.assert_close(main.double(), wanted, rtol=0, atol=1e-6 * wanted.abs().max().item())


def linears(store=None, casts=None):
    return Fp8Linears(casts=WeightCache() if casts is None else casts, store=WeightGradStore() if store is None else store)


def run(rows, weight, grad, casts=None, **options):
    """Output, input gradient and weight gradient."""
    weight, store = torch.nn.Parameter(weight), WeightGradStore()
    weight.main_grad = torch.zeros(weight.shape)
    x = rows.clone().requires_grad_()
    out = linears(store, casts).linear(x, weight, **options)
    out.backward(grad)
    assert weight.grad is None and not weight.main_grad.any() and len(store) == 1
    with torch.no_grad():
        (closure,) = store.take()
        closure()
    assert out.dtype == x.grad.dtype == rows.dtype
    return out.detach(), x.grad, weight.main_grad


@pytest.mark.parametrize("size", [1.0, 1e-10])
@pytest.mark.parametrize(("R", "I", "O"), [(256, 384, 256), (200, 176, 144)], ids=["whole blocks", "nothing divides"])
def test_error_is_that_of_e4m3(R, I, O, size):  # noqa: E741
    """Gradients as small as a summed loss over the tokens of a large batch would give: the floor of activations would leave noise."""
    rows, weight, grad = normal(R, I), normal(O, I, seed=1), normal(R, O, seed=2) * size
    out, grad_rows, grad_weight = run(rows, weight, grad)
    rows, weight, grad = (t.double() for t in (rows, weight, grad))
    assert within_e4m3(out, rows @ weight.t(), roundings=2)
    assert within_e4m3(grad_rows, grad @ weight, roundings=2)
    assert within_e4m3(grad_weight, grad.t() @ rows, roundings=3)  # the input first by rows, as it is kept, then by columns


def test_a_gradient_that_arrives_expanded():
    rows, weight = normal(48, 32), normal(64, 32, seed=1)
    spread = run(rows, weight, torch.ones(1, 1, dtype=torch.bfloat16).expand(48, 64))
    for found, wanted in zip(spread, run(rows, weight, torch.ones(48, 64, dtype=torch.bfloat16))):
        assert torch.equal(found, wanted)


def test_what_is_kept_is_fp8():
    """Of the input its codes and scales; of the gradient, for a weight gradient that waits, the same."""
    rows, weight, store = normal(256, 128), torch.nn.Parameter(normal(128, 128)), WeightGradStore()
    out = linears(store).linear(rows.requires_grad_(), weight)
    assert [t.dtype for t in out.grad_fn.saved_tensors] == [torch.float8_e4m3fn, torch.float32]
    assert sum(t.nbytes for t in out.grad_fn.saved_tensors) == 256 * (128 + 4)
    out.backward(torch.ones_like(out))
    (closure,) = store.take()
    held = [cell.cell_contents for cell in closure.__closure__ if hasattr(cell.cell_contents, "codes")]
    assert len(held) == 2 and all(q.codes.dtype == torch.float8_e4m3fn for q in held)
    others = [cell.cell_contents for cell in closure.__closure__ if isinstance(cell.cell_contents, torch.Tensor)]
    assert all(t is weight for t in others)


def test_rows_made_again_change_nothing():
    rows, weight, grad = normal(130, 48), normal(64, 48, seed=1), normal(130, 64, seed=2)
    made = []
    again = run(rows, weight, grad, again=lambda: made.append(1) or rows, power_of_two=True)
    assert made == [1] and all(torch.equal(a, b) for a, b in zip(again, run(rows, weight, grad, power_of_two=True)))


def test_powers_of_two():
    scales = [
        linears()
        .linear(normal(8, 256).requires_grad_(), torch.nn.Parameter(normal(16, 256)), power_of_two=p)
        .grad_fn.saved_tensors[1]
        .log2()
        for p in (False, True)
    ]
    assert torch.equal(scales[1], scales[1].round()) and torch.equal(scales[0].ceil(), scales[1])


def test_no_gradient_no_trace():
    with torch.no_grad():
        casts = WeightCache()
        out = linears(casts=casts).linear(normal(8, 32), torch.nn.Parameter(normal(16, 32)))
    assert out.grad_fn is None and len(casts) == 1


class TestWeights:
    def test_one_rounding_in_both_forms(self):
        weight = torch.nn.Parameter(normal(200, 304, spread=2))
        cast = WeightCache().of(weight)
        assert torch.equal(dequantise_blocks(cast.blocks, torch.float32).t(), dequantise_blocks(cast.transposed, torch.float32))
        assert cast.transposed.codes.is_contiguous() and cast.transposed.scales.is_contiguous()

    def test_each_expert_has_its_own_blocks(self):
        """Though 136 rows are no whole number of blocks, and the experts lie one after another."""
        weight = torch.nn.Parameter(normal(3, 136, 48, spread=2))
        cast = WeightCache().of(weight)
        for e in range(3):
            alone = quantise_blocks(weight.detach()[e])
            assert torch.equal(cast.blocks.codes[e].float(), alone.codes.float()) and torch.equal(cast.blocks.scales[e], alone.scales)

    def test_cast_once_until_cleared(self):
        weight, other, casts = torch.nn.Parameter(normal(16, 32)), torch.nn.Parameter(normal(16, 32)), WeightCache()
        first = casts.of(weight)
        assert casts.of(weight) is first and casts.of(other) is not first and len(casts) == 2
        with torch.no_grad():
            weight.mul_(2)
        assert casts.of(weight) is first
        casts.clear()
        assert len(casts) == 0
        assert torch.equal(casts.of(weight).blocks.scales, 2 * first.blocks.scales)


def test_operators():
    """Torch's own check of fake tensors (that of schemas cannot compare FP8); FLOPs of all three products."""
    a, b, c = quantise_rows(normal(32, 160)), quantise_blocks(normal(48, 160)), quantise_rows(normal(48, 160))
    checks = ("test_faketensor",)
    product = (a.codes, a.scales, b.codes, b.scales, torch.bfloat16)
    torch.library.opcheck(torch.ops.shoestring.fp8_matmul, product, test_utils=checks)
    outer = (torch.zeros(32, 48), a.codes, a.scales, c.codes, c.scales)
    torch.library.opcheck(torch.ops.shoestring.add_fp8_outer, outer, test_utils=checks)
    with FlopCounterMode(display=False) as counter:
        run(normal(32, 160), normal(48, 160), normal(32, 48))
    assert counter.get_total_flops() == 3 * 2 * 32 * 160 * 48


def of(kernel):
    """Forms that the interpreter can tell apart: it knows no warps, and nothing of specialisation."""
    listed = {(c.meta["BM"], c.meta["BN"]): c for c in CONFIGS if c.kernel is kernel and not c.meta["GROUPED"]}
    return pytest.mark.parametrize("config", listed.values(), ids=lambda config: config.name)


class TestKernels:
    """Interpreted, against the references: sums of the same products, perhaps in another order."""

    @of(fp8_matmul_kernel)
    @pytest.mark.parametrize(("M", "N", "K"), SHAPES.values(), ids=SHAPES)
    def test_matmul(self, M, N, K, config):
        a, b = quantise_rows(normal(M, K, spread=2)), quantise_blocks(normal(N, K, seed=1, spread=2))
        with interpreted():
            found = matmul_triton(a, b, torch.bfloat16, config=config)
        wanted = fp8_matmul(a, b, torch.float32)
        torch.testing.assert_close(found.float(), wanted, rtol=2**-8, atol=1e-6 * max([1, *wanted.abs().flatten()]))

    @of(add_fp8_outer_kernel)
    @pytest.mark.parametrize(("M", "N", "K"), [*list(SHAPES.values())[:-1], (128, 64, 0)], ids=[*list(SHAPES)[:-1], "nothing to sum"])
    def test_outer(self, M, N, K, config):
        a, b = quantise_rows(normal(M, K, spread=2)), quantise_rows(normal(N, K, seed=1, spread=2))
        main = normal(M, N, seed=2, dtype=torch.float32)
        wanted = main.clone()
        add_fp8_outer(wanted, a, b)
        with interpreted():
            add_outer_triton(main, a, b, config=config)
        torch.testing.assert_close(main, wanted, rtol=0, atol=1e-6 * wanted.abs().max().item())

    def test_nan_stays_in_its_row(self):
        rows = normal(48, 176)
        rows[5, 170] = torch.nan
        with interpreted():
            out = matmul_triton(quantise_rows(rows), quantise_blocks(normal(32, 176, seed=1)), torch.bfloat16, config=CONFIGS[0])
        assert out.isnan().any(1).nonzero().flatten().tolist() == [5] and out[5].isnan().all()

    def test_only_bf16_is_launched(self):
        with pytest.raises(TypeError, match=r"only torch\.bfloat16"):
            matmul_triton(quantise_rows(normal(16, 16)), quantise_blocks(normal(16, 16)), torch.float32)
