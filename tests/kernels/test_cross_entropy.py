"""Summed cross-entropy from hidden states, in chunks, with targets that do not count."""

import pytest
import shoestring.kernels.cross_entropy as module
import torch
import torch.nn.functional as F
from shoestring.kernels.cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from shoestring.kernels.weight_grad import WeightGradStore
from torch.utils._python_dispatch import TorchDispatchMode


@pytest.mark.parametrize("chunk", [1 << 22, 4 * 11 * 3, 1])  # all rows at once; three and a rest; one by one
def test_forward_and_gradients(kit, leaf, monkeypatch, chunk):
    monkeypatch.setattr(module, "CHUNK_BYTES", chunk)
    rows, weight, target = kit.randn(8, 6), kit.param(11, 6), torch.tensor([0, 10, -100, 3, 3, -100, 7, 1])
    x, xw, ww = leaf(rows), leaf(rows, wide=True), leaf(weight.detach(), wide=True)
    wanted = F.cross_entropy(xw @ ww.T, target, reduction="sum", ignore_index=-100) * 0.25
    wanted.backward(torch.tensor(3.0))
    loss = linear_cross_entropy(x, weight, target, 0.25, kit.store)
    assert loss.dtype == kit.wide
    kit.check(loss[None], wanted[None])
    kit.check(linear_cross_entropy_reference(rows, weight, target, 0.25)[None], wanted[None])
    loss.backward(torch.tensor(3.0))
    assert kit.run_closures() == 1
    kit.check(x.grad, xw.grad)
    kit.check(weight.main_grad, ww.grad)
    assert (x.grad[target < 0] == 0).all()


def test_large_logits(kit):
    """Logits of +-1000 neither overflow nor vanish: the loss of the right answer is 0, of the wrong one their distance."""
    weight = torch.nn.Parameter(torch.tensor([[1000.0], [-1000.0]], dtype=kit.dtype))
    right, wrong = (linear_cross_entropy(torch.ones(1, 1, dtype=kit.dtype), weight, torch.tensor([t]), 1.0, kit.store) for t in (0, 1))
    assert right == 0 and wrong == 2000


def test_evaluation_keeps_nothing(kit):
    x, weight = kit.randn(4, 6), kit.param(11, 6)
    with torch.no_grad():
        loss = linear_cross_entropy(x, weight, torch.tensor([1, 2, 3, 4]), 1.0, kit.store)
    assert not loss.requires_grad and len(kit.store) == 0


class Largest(TorchDispatchMode):
    """What makes tensors of `at_least` elements or more."""

    def __init__(self, at_least):
        super().__init__()
        self.at_least, self.makers = at_least, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.numel() >= self.at_least:
            self.makers.append((str(function), out.dtype))
        return out


@pytest.mark.parametrize("training", [False, True])
def test_the_vocabularys_logits_never_exist_at_once(monkeypatch, training):
    """64 tokens x 32 words, eight tokens at a time. Training keeps the logits' *gradient*, in BF16; evaluation nothing."""
    monkeypatch.setattr(module, "CHUNK_BYTES", 4 * 32 * 8)
    x, weight = torch.randn(64, 4, dtype=torch.bfloat16, requires_grad=training), torch.nn.Parameter(torch.randn(32, 4).bfloat16())
    weight.main_grad, store = torch.zeros(32, 4), WeightGradStore()
    with Largest(8 * 32 + 1) as largest, torch.set_grad_enabled(training):
        loss = linear_cross_entropy(x, weight, torch.arange(64) % 32, 1.0, store)
        if training:
            loss.backward()
            with torch.no_grad():
                [closure() for closure in store.take()]
    kept = [(maker, dtype) for maker, dtype in largest.makers if "view" not in maker and "aten.t." not in maker and "detach" not in maker]
    assert kept == ([("aten.new_empty.default", torch.bfloat16)] if training else [])
