"""Causal attention against softmax written out, for value heads narrower than, as wide as and wider than keys."""

import pytest
import torch
from shoestring.kernels import attention as module
from shoestring.kernels.attention import attention_kernel, causal_attention
from torch.backends import cuda
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode


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


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.add(str(function))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("value_dim", [16, 24, 40])
def test_the_kernel_named_is_the_one_that_runs(value_dim):
    q, v = torch.randn(1, 2, 9, 24), torch.randn(1, 2, 9, value_dim)
    named = attention_kernel(q, q, v)
    with Calls() as calls:
        causal_attention(q, q, v, 0.3)
    assert (
        any("flash_attention_for_cpu" in name for name in calls.names) == (named.backend == SDPBackend.FLASH_ATTENTION) == (value_dim <= 24)
    )
    assert any("constant_pad" in name for name in calls.names) == (named.padding > 0) == (value_dim < 24)


def test_on_a_gpu_the_first_that_takes_the_heads(monkeypatch):
    """MLA's heads; a GPU's kernels are asked one after the other, flash a second time with values padded."""
    q, v = torch.empty(1, 2, 4, 192), torch.empty(1, 2, 4, 128)
    accepts = dict.fromkeys(("cudnn", "flash", "efficient"), False)
    monkeypatch.setattr(cuda, "can_use_cudnn_attention", lambda params, debug: accepts["cudnn"])
    monkeypatch.setattr(cuda, "can_use_flash_attention", lambda params, debug: accepts["flash"] and params.value.shape[-1] == 192)
    monkeypatch.setattr(cuda, "can_use_efficient_attention", lambda params, debug: accepts["efficient"])
    found = lambda: module._on_gpu(q, q, v, 64)
    assert found().backend == SDPBackend.MATH and "S x S" in str(found())
    accepts["efficient"] = True
    assert found().backend == SDPBackend.EFFICIENT_ATTENTION and found().padding == 0
    accepts["flash"] = True
    assert str(found()) == "attention by flash, values padded by 64 columns: 20% more work"
    accepts["cudnn"] = True
    assert str(found()) == "attention by cudnn"
