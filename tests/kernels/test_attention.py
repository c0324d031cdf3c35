"""Causal attention against softmax written out, for value heads narrower than, as wide as and wider than keys."""

import pytest
import torch
from shoestring.kernels.attention import causal_attention


def plain(q, k, v, scale):
    scores = torch.einsum("bhsq,bhtq->bhst", q, k) * scale
    scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    return torch.einsum("bhst,bhtv->bhsv", scores.softmax(-1), v)


@pytest.mark.parametrize("value_dim", [16, 24, 40])
@pytest.mark.parametrize("seq_len", [1, 33])
def test_forward_and_gradients(kit, leaf, value_dim, seq_len):
    shapes = [(2, 3, seq_len, 24), (2, 3, seq_len, 24), (2, 3, seq_len, value_dim)]
    given = [kit.randn(*s) for s in shapes]
    grad = kit.randn(2, 3, seq_len, value_dim)
    ours, wide = [leaf(t) for t in given], [leaf(t, wide=True) for t in given]
    wanted = plain(*wide, 0.3)
    wanted.backward(grad.double())
    out = causal_attention(*ours, 0.3)
    kit.check(out, wanted)
    out.backward(grad)
    for a, b in zip(ours, wide):
        if seq_len > 1 or b is wide[2]:  # of one position the weights are 1: queries and keys have no gradient
            kit.check(a.grad, b.grad)
        else:
            assert a.grad.abs().max() <= 1e-6 + 1e-2 * (kit.dtype == torch.bfloat16)


def test_the_future_is_not_seen(kit):
    q, k, v = (kit.randn(1, 2, 9, 8) for _ in range(3))
    before = causal_attention(q, k, v, 0.4)
    k[:, :, 5:], v[:, :, 5:] = 7.0, 7.0
    after = causal_attention(q, k, v, 0.4)
    assert torch.equal(before[:, :, :5], after[:, :, :5]) and not torch.equal(before[:, :, 5:], after[:, :, 5:])
