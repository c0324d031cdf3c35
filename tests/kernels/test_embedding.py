"""The embedding's gradient goes into main_grad, repeated tokens added, others untouched."""

import torch
import torch.nn.functional as F
from shoestring.kernels.embedding import embedding


def test_forward_and_gradient(kit, leaf):
    table, tokens, grad = kit.param(10, 6), torch.tensor([3, 3, 9, 0, 3]), kit.randn(5, 6)
    out = embedding(tokens, table, kit.store)
    assert torch.equal(out, table[tokens])
    out.backward(grad)
    assert table.grad is None and not table.main_grad.any()
    assert kit.run_closures() == 1
    tw = leaf(table, wide=True)
    F.embedding(tokens, tw).backward(grad.double())
    kit.check(table.main_grad, tw.grad)
    assert not table.main_grad[[1, 2, 4, 5, 6, 7, 8]].any()
