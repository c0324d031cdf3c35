"""Rows by index, -1 for a row of zeros; and the sum of each token's copies: each the other's transpose."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from shoestring.kernels.permute import permute, sum_copies


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


def test_they_are_transposes():
    generator = torch.Generator().manual_seed(0)
    row_of_TK = torch.randperm(12, generator=generator)[:8].view(4, 2)
    copy_of_R = torch.full((12,), -1)
    copy_of_R[row_of_TK.flatten()] = torch.arange(8)
    x, rows = torch.randn(4, 5, dtype=torch.float64, generator=generator), torch.randn(12, 5, dtype=torch.float64, generator=generator)
    there = permute(x, copy_of_R.div(2, rounding_mode="floor"))
    torch.testing.assert_close((there * rows).sum(), (x * sum_copies(rows, row_of_TK)).sum())
