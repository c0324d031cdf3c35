"""Causal attention against softmax written out, for value heads narrower than, as wide as and wider than keys."""

import pytest
import torch
from shoestring.kernels import attention as module
from shoestring.kernels.attention import attention_kernel, causal_attention
from shoestring.kernels.e5m6 import pack_e5m6, unpack_e5m6
from torch.backends import cuda
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode


def plain(q, k, v, scale):
    scores = torch.einsum("bhsq,bhtq->bhst", q, k) * scale
    scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    return torch.einsum("bhst,bhtv->bhsv", scores.softmax(-1), v)


def heads(rows_TO, value_dim, seq_len):
    """(B, H, S, V)"""
    return rows_TO.unflatten(1, (-1, value_dim)).unflatten(0, (-1, seq_len)).transpose(1, 2)


@pytest.mark.parametrize("value_dim", [16, 24, 40])
@pytest.mark.parametrize("seq_len", [1, 33])
def test_forward_and_gradients(kit, leaf, value_dim, seq_len):
    shapes = [(2, 3, seq_len, 24), (2, 3, seq_len, 24), (2, 3, seq_len, value_dim)]
    given = [kit.randn(*s) for s in shapes]
    grad = kit.randn(2, 3, seq_len, value_dim)
    ours, wide = [leaf(t) for t in given], [leaf(t, wide=True) for t in given]
    wanted = plain(*wide, 0.3)
    wanted.backward(grad.double())
    out = heads(causal_attention(*ours, 0.3)[0], value_dim, seq_len)
    kit.check(out, wanted)
    out.backward(grad)
    for a, b in zip(ours, wide):
        if seq_len > 1 or b is wide[2]:  # of one position the weights are 1: queries and keys have no gradient
            kit.check(a.grad, b.grad)
        else:
            assert a.grad.abs().max() <= 1e-6 + 1e-2 * (kit.dtype == torch.bfloat16)


def test_the_future_is_not_seen(kit):
    q, k, v = (kit.randn(1, 2, 9, 8) for _ in range(3))
    before = heads(causal_attention(q, k, v, 0.4)[0], 8, 9)
    k[:, :, 5:], v[:, :, 5:] = 7.0, 7.0
    after = heads(causal_attention(q, k, v, 0.4)[0], 8, 9)
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


class TestNarrow:
    """The output kept for backward in 12 bits instead of 16."""

    @pytest.mark.parametrize("value_dim", [16, 24])
    @pytest.mark.parametrize("remade", [False, True], ids=["heads kept", "heads made again"])
    def test_what_is_kept_and_what_it_costs(self, value_dim, remade):
        g = torch.Generator().manual_seed(0)
        given = [torch.randn(2, 4, 33, dim, generator=g).bfloat16() for dim in (24, 24, value_dim)]
        grad = torch.randn(66, 4 * value_dim, generator=g).bfloat16()

        def run(narrow):
            leaves = [t.clone().requires_grad_() for t in given]
            out, again = causal_attention(*leaves, 0.3, narrow=narrow, again=(lambda: given) if remade else None)
            out.backward(grad)
            return out.detach(), again(), [t.grad for t in leaves]

        (out, rows, grads), (wide_out, wide_rows, wide_grads) = run(True), run(False)
        assert torch.equal(out, wide_out) and torch.equal(wide_rows, out)
        relative = ((rows.float() - out.float()).norm() / out.float().norm()).item()
        assert 1e-4 < relative < 2**-7 and torch.equal(rows, unpack_e5m6(pack_e5m6(out)))
        assert not any(torch.equal(a, b) for a, b in zip(grads[:2], wide_grads[:2])) and torch.equal(grads[2], wide_grads[2])
        assert all((a - b).norm() < 0.02 * b.norm() for a, b in zip(grads, wide_grads))

    def test_nothing_is_packed_without_gradients(self):
        q = torch.randn(1, 2, 9, 24).bfloat16()
        with torch.no_grad(), Calls() as calls:
            causal_attention(q, q, q, 0.3, narrow=True)
        assert not any("e5m6" in name for name in calls.names)

    def test_a_kernel_that_keeps_no_output(self):
        q, v = torch.randn(1, 2, 9, 24).bfloat16().requires_grad_(), torch.randn(1, 2, 9, 40).bfloat16().requires_grad_()
        assert attention_kernel(q, q, v).backend == SDPBackend.MATH
        sums = [causal_attention(q, q, v, 0.3, narrow=narrow)[0].float().square().sum() for narrow in (True, False)]
        found, wanted = (torch.autograd.grad(s, (q, v)) for s in sums)
        assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])


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
