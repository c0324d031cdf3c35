"""A buffer may have more rows than the experts: what lies beyond is NaN here, and must reach neither another row nor a weight gradient."""

import pytest
import torch
from shoestring.kernels import grouped
from shoestring.kernels.fp8_grouped import add_fp8_grouped_outer, fp8_grouped_matmul
from shoestring.kernels.fp8_linear import CONFIGS, add_fp8_outer_kernel, add_outer_triton, fp8_matmul_kernel, matmul_triton
from shoestring.kernels.fp8_weights import Fp8Weight
from shoestring.kernels.grouped import RowGroups, by_expert, grouped_linear
from shoestring.kernels.quantise import columns_of, quantise_columns, quantise_rows

from .triton_interpreter import interpreted

SIZES = {
    "the last expert has rows": [128, 0, 256],
    "the last experts have none": [128, 0, 0],
    "nobody has any": [0, 0, 0],
}
BEYOND = 256
I, O = 144, 176  # noqa: E741  whole numbers of 16, not of 128

every_size = pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)


def tensors(sizes, dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(0)
    randn = lambda *shape: torch.randn(shape, generator=g).to(dtype)
    rows, grad, end = randn(sum(sizes) + BEYOND, I), randn(sum(sizes) + BEYOND, O), sum(sizes)
    rows[end:], grad[end:] = torch.nan, torch.nan
    return rows, randn(len(sizes), O, I), grad, RowGroups.of(sizes)


def main_grad(sizes):
    return torch.ones(len(sizes), O, I)


@every_size
def test_shares(sizes):
    parts = by_expert(torch.arange(sum(sizes) + BEYOND)[None], sizes, 1)
    assert [part.shape[1] for part in parts] == sizes and torch.equal(torch.cat(parts, 1)[0], torch.arange(sum(sizes)))


@every_size
def test_linear(kit, leaf, sizes):
    """Forward and both gradients of the first rows are those of a buffer that ends with them."""
    rows, weight, grad, groups = tensors(sizes, kit.dtype)
    found = []
    for end in (len(rows), sum(sizes)):
        x, w = leaf(rows[:end]), torch.nn.Parameter(weight)
        w.main_grad = main_grad(sizes).to(kit.wide)
        out = grouped_linear(x, w, groups, kit.store)
        out.backward(grad[:end])
        assert kit.run_closures() == 1 and len(out) == len(x.grad) == end
        found.append((out[: sum(sizes)], x.grad[: sum(sizes)], w.main_grad))
    assert all(torch.equal(long, short) for long, short in zip(*found))


@every_size
def test_weight_gradient_in_one_product(sizes, monkeypatch):
    """What a BF16 GPU runs, with a product that leaves anything where an expert has no rows, as Blackwell's does."""
    rows, _, grad, groups = tensors(sizes)
    found, wanted, right = main_grad(sizes), main_grad(sizes), torch.nn.functional.grouped_mm

    def blackwell(a, b, offs):
        product = right(a, b, offs=offs)
        product[torch.tensor(sizes) == 0] = torch.nan
        return product

    monkeypatch.setattr(grouped.F, "grouped_mm", blackwell)
    grouped.add_grouped_outer(found, grad, rows, groups)
    grouped.add_grouped_outer_reference(wanted, grad, rows, groups)
    torch.testing.assert_close(found, wanted, rtol=2**-7, atol=2**-7 * max(sizes) ** 0.5)
    assert all((found[e] == 1).all() for e, size in enumerate(sizes) if size == 0)


@every_size
def test_fp8(sizes):
    """References bit for bit as without those rows; kernels, interpreted (which refuses any address outside a tensor), against them."""
    rows, weight, grad, groups = tensors(sizes)
    end, b = sum(sizes), Fp8Weight(weight).blocks
    a, columns = quantise_rows(rows), (quantise_columns(grad), columns_of(quantise_rows(rows)))
    product, sums = fp8_grouped_matmul(a, b, groups, torch.bfloat16), main_grad(sizes)
    assert len(product) == len(rows)
    add_fp8_grouped_outer(sums, *columns, groups)

    short, short_sums = quantise_rows(rows[:end]), main_grad(sizes)
    assert torch.equal(product[:end], fp8_grouped_matmul(short, b, groups, torch.bfloat16))
    add_fp8_grouped_outer(short_sums, quantise_columns(grad[:end]), columns_of(short), groups)
    assert torch.equal(sums, short_sums)

    for config in (c for c in CONFIGS if c.meta["GROUPED"] and c.num_warps == 4):
        with interpreted():
            if config.kernel is fp8_matmul_kernel:
                found, wanted = matmul_triton(a, b, torch.bfloat16, groups.ends_e, config=config)[:end], product[:end]
            else:
                assert config.kernel is add_fp8_outer_kernel
                found, wanted = main_grad(sizes), sums
                add_outer_triton(found, *columns, groups.ends_e, config=config)
        torch.testing.assert_close(found, wanted, rtol=2**-7, atol=1e-3)
