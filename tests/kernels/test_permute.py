"""Rows by index, -1 for a row of zeros; and the sum of each token's copies: each the other's transpose."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shoestring.kernels import permute as module
from shoestring.kernels.permute import permute, permute_quantised, sum_copies
from shoestring.kernels.quantise import Quantised, dequantise_rows, quantise_rows
from torch._subclasses import FakeTensorMode

from .triton_interpreter import interpreted


@given(st.data())
def test_permute_is_indexing_with_holes(data):
    n = data.draw(st.integers(0, 6))
    rows = data.draw(st.lists(st.integers(-1, n - 1), max_size=9))
    x = torch.randn(n, 3)
    row_of = torch.tensor(rows, dtype=torch.int64)
    for source in (x, x[:, 0]):
        wanted = [source[i] if i >= 0 else torch.zeros_like(source[:1].sum(0)) for i in rows]
        out = permute(source, row_of)
        assert out.shape == (len(rows), *source.shape[1:])
        assert all(torch.equal(a, b) for a, b in zip(out, wanted))


@given(num_tokens=st.integers(0, 5), num_copies=st.integers(1, 4), seed=st.integers(0, 99))
def test_sum_copies_adds_each_tokens_rows(num_tokens, num_copies, seed):
    generator = torch.Generator().manual_seed(seed)
    total = num_tokens * num_copies + 3  # three rows belong to nobody
    rows = torch.randn(total, 4, dtype=torch.float64, generator=generator)
    row_of_TK = torch.randperm(total, generator=generator)[: num_tokens * num_copies].view(num_tokens, num_copies)
    out = sum_copies(rows, row_of_TK)
    assert out.shape == (num_tokens, 4)
    for t in range(num_tokens):
        torch.testing.assert_close(out[t], sum(rows[row_of_TK[t, k]] for k in range(num_copies)), rtol=1e-14, atol=1e-14)


def test_sum_copies_rounds_once_in_bf16():
    """1 + 2^-8 + 2^-8: added in BF16 one by one the small terms vanish, added in FP32 they count."""
    rows = torch.tensor([[1.0], [2.0**-8], [2.0**-8]], dtype=torch.bfloat16)
    assert sum_copies(rows, torch.tensor([[0, 1, 2]])).item() == 1 + 2.0**-7
    one, tie = torch.tensor([[1.0], [2.0**-8]], dtype=torch.bfloat16), torch.tensor([[0, 1]])
    assert sum_copies(one, tie).item() == 1, "to even"
    many = torch.randn(200, 64, generator=torch.Generator().manual_seed(0)).bfloat16()
    exact = many[:100].double() + many[100:].double()
    assert torch.equal(sum_copies(many, torch.arange(200).view(2, 100).t()), exact.bfloat16())


def test_they_are_transposes():
    generator = torch.Generator().manual_seed(0)
    row_of_TK = torch.randperm(12, generator=generator)[:8].view(4, 2)
    copy_of_R = torch.full((12,), -1)
    copy_of_R[row_of_TK.flatten()] = torch.arange(8)
    x, rows = torch.randn(4, 5, dtype=torch.float64, generator=generator), torch.randn(12, 5, dtype=torch.float64, generator=generator)
    there = permute(x, copy_of_R.div(2, rounding_mode="floor"))
    torch.testing.assert_close((there * rows).sum(), (x * sum_copies(rows, row_of_TK)).sum())


def bits(t):
    return t.contiguous().view(torch.uint8)


ROWS = {  # rows there are, and which are wanted
    "holes, repeats, more rows than a program has": (7, [3, -1, 0, 0, 6, -1, 5, 2, 1]),
    "one row": (1, [0]),
    "padding only": (3, [-1, -1]),
    "nothing wanted": (3, []),
}


@pytest.mark.parametrize("dim", [128, 200, 2304])  # one scale; a ragged last one; more than one program's columns
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_quantised_rows_are_the_cast_of_permuted_rows(rows, dim):
    """A row's scales are its own, so gathering and casting change places; but a padding row has scale 0, not the floor's."""
    number, wanted = rows
    x, row_of = torch.randn(number, dim) * 10.0 ** torch.arange(number)[:, None], torch.tensor(wanted, dtype=torch.int64)
    out, cast = permute_quantised(quantise_rows(x), row_of), quantise_rows(permute(x, row_of))
    assert torch.equal(bits(out.codes), bits(cast.codes))
    assert torch.equal(out.scales, cast.scales * (row_of >= 0))
    assert torch.equal(dequantise_rows(out, torch.float32), dequantise_rows(cast, torch.float32))
    with interpreted():
        codes, scales = module.permute_triton(quantise_rows(x).codes, row_of), module.permute_scales_triton(quantise_rows(x).scales, row_of)
    assert torch.equal(bits(codes), bits(out.codes)) and torch.equal(scales, out.scales)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_permute_kernel(rows, dtype):
    number, wanted = rows
    x, row_of = torch.randn(number, 1100).to(dtype), torch.tensor(wanted, dtype=torch.int64)
    with interpreted():
        assert torch.equal(module.permute_triton(x, row_of), permute(x, row_of))


def test_not_a_number_stays_where_it_is():
    """A hole is zero even where the row that stands in for it is not finite; a row that is not finite arrives so."""
    x, row_of = torch.full((2, 4), torch.nan), torch.tensor([-1, 1])
    assert torch.equal(permute(x, row_of).isnan(), torch.tensor([[False] * 4, [True] * 4]))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(5, 8, 520), (1, 1, 16), (3, 3, 24), (0, 2, 8)])  # a second program; one row; odd top-k; no token
def test_weighted_sums_and_the_kernel(shape, dtype, weighted):
    tokens, top_k, dim = shape
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(tokens * top_k + 3, dim, generator=generator).to(dtype)
    row_of_TK = torch.randperm(tokens * top_k + 3, generator=generator)[: tokens * top_k].view(tokens, top_k)
    weight_TK = torch.rand(tokens, top_k, generator=generator) if weighted else None
    wanted = (rows.double()[row_of_TK] * (1 if weight_TK is None else weight_TK.double()[:, :, None])).sum(1)
    with interpreted():
        by_kernel = module.sum_copies_triton(rows, row_of_TK, weight_TK)
    for out in (sum_copies(rows, row_of_TK, weight_TK), by_kernel):
        assert out.dtype == dtype and out.shape == (tokens, dim)
        half_a_bit = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-24  # rounded once
        assert ((out.double() - wanted).abs() <= half_a_bit * wanted.abs() + 2e-6).all()


def test_fake_tensors_have_the_same_shapes():
    q, row_of = quantise_rows(torch.randn(4, 200)), torch.tensor([1, -1, 3])
    with FakeTensorMode() as mode:
        codes, scales, fake_row_of = map(mode.from_tensor, (q.codes, q.scales, row_of))
        fake = permute_quantised(Quantised(codes, scales), fake_row_of)
        summed = sum_copies(torch.empty(4, 200, dtype=torch.bfloat16), torch.empty(3, 2, dtype=torch.int64))
    real = permute_quantised(q, row_of)
    assert [(t.shape, t.dtype) for t in vars(fake).values()] == [(t.shape, t.dtype) for t in vars(real).values()]
    assert summed.shape == (3, 200) and summed.dtype == torch.bfloat16


def test_bytes():
    """One FP8 row of 256: 256 codes and 2 scales there and back, an index of 8; two BF16 copies of 16 with weights, and their sum."""
    assert module.permute_bytes(1, 256, 1) == 2 * (256 + 8) + 8 and module.permute_bytes(1, 16, 2) == 64 + 8
    assert module.sum_copies_bytes(1, 2, 16, 2, weighted=True) == 2 * (32 + 8 + 4) + 32
