"""The router in one pass, against the published rule written out token by token, and gradients against autograd in FP64."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shoestring.kernels import router as module
from shoestring.kernels.router import Routes, route
from torch._subclasses import FakeTensorMode

from .triton_interpreter import interpreted

CASES = {  # tokens, experts, how
    "V3 in small: 4 of 8 groups": (9, 32, Routes(top_k=6, num_groups=8, num_limited_groups=4, route_scale=2.5)),
    "V2-Lite: softmax, weights as they are": (5, 16, Routes(top_k=3, softmax=True, norm_topk=False)),
    "experts no power of two": (3, 20, Routes(top_k=4, num_groups=5, num_limited_groups=2)),
    "all experts chosen": (2, 4, Routes(top_k=4)),
    "one token": (1, 8, Routes(top_k=1, norm_topk=False)),
    "no token": (0, 8, Routes(top_k=2)),
}
cases = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def given_logits(tokens, experts, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, experts, generator=g), 0.1 * torch.randn(experts, generator=g)


def chosen(score, bias, r):
    """One token's experts, best first: lists and `sorted`, which keeps equals in order."""
    choice = [s + b for s, b in zip(score, bias)]
    per_group = len(choice) // r.num_groups
    groups = [range(g * per_group, (g + 1) * per_group) for g in range(r.num_groups)]
    if r.num_limited_groups < r.num_groups:
        groups = sorted(groups, key=lambda own: -sum(sorted((choice[i] for i in own), reverse=True)[:2]))[: r.num_limited_groups]
    return sorted(sorted(i for own in groups for i in own), key=lambda i: -choice[i])[: r.top_k]


@cases
def test_choice_weights_and_counts(case):
    tokens, experts, r = case
    logits, bias = given_logits(tokens, experts)
    with interpreted():
        by_kernel = module.route_triton(logits, bias, r)
    for weight, score, expert, count in (route(logits, bias, r), by_kernel):
        wanted = logits.double().softmax(1) if r.softmax else logits.double().sigmoid()
        assert score.shape == logits.shape and weight.shape == expert.shape == (tokens, r.top_k) and weight.dtype == torch.float32
        torch.testing.assert_close(score.double(), wanted, rtol=1e-6, atol=0)
        for t in range(tokens):
            own = chosen(score[t].tolist(), bias.tolist(), r)
            assert expert[t].tolist() == own
            exact = wanted[t, own] / (wanted[t, own].sum() if r.norm_topk else 1) * r.route_scale
            torch.testing.assert_close(weight[t].double(), exact, rtol=1e-6, atol=0)
        assert torch.equal(count, torch.bincount(expert.flatten(), minlength=experts))


@given(st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=8, max_size=8), st.integers(1, 2))
def test_equals_are_taken_in_the_order_of_experts(logits, num_limited_groups):
    r, bias = Routes(top_k=3, num_groups=4, num_limited_groups=num_limited_groups + 1), torch.zeros(8)
    score, expert = route(torch.tensor([logits]), bias, r)[1:3]
    assert expert[0].tolist() == chosen(score[0].tolist(), bias.tolist(), r)


def test_kernel_takes_equals_in_the_order_of_experts():
    logits, r = torch.tensor([[0.0] * 8, [1.0, 2.0, 2.0, 1.0, 2.0, 1.0, 1.0, 2.0]]), Routes(top_k=3, num_groups=4, num_limited_groups=2)
    with interpreted():
        expert = module.route_triton(logits, torch.zeros(8), r)[2]
    assert expert.tolist() == [[0, 1, 2], [1, 2, 0]]


def test_bias_chooses_and_does_not_weigh():
    logits, r = torch.zeros(1, 4), Routes(top_k=2, route_scale=3.0)
    weight, _, expert, _ = route(logits, torch.tensor([0.0, 0.3, 0.0, 0.2]), r)
    assert expert.tolist() == [[1, 3]] and weight.tolist() == [[1.5, 1.5]]


@cases
def test_a_choice_from_outside_that_is_its_own_changes_nothing(case):
    tokens, experts, r = case
    logits, bias = given_logits(tokens, experts)
    results = []
    for choose in (None, lambda score: module.select(score, bias, r)):
        own = logits.clone().requires_grad_()
        out = route(own, bias, r, choose=choose)
        torch.autograd.backward(out[:2], [torch.ones_like(out[0]), out[1].detach()])
        results.append((*out, own.grad))
    *one, grad = results[0]
    *other, other_grad = results[1]
    assert all(torch.equal(a, b) for a, b in zip(one, other)) and torch.allclose(grad, other_grad, rtol=1e-5, atol=1e-7)


def test_a_choice_from_outside():
    logits, r = torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]], dtype=torch.float64), Routes(top_k=1, norm_topk=False)
    weight, _, expert, count = route(logits, torch.zeros(3), r, choose=lambda score: torch.tensor([[0], [1]]))
    assert expert.tolist() == [[0], [1]] and count.tolist() == [1, 1, 0]
    assert weight.flatten().tolist() == pytest.approx([0.5, 1 / (1 + 2.718281828459045**-4)])


@cases
def test_gradients(case):
    """Of the weights, and of the scores, which the balance loss reads."""
    tokens, experts, r = case
    logits, bias = given_logits(tokens, experts, seed=1)
    grad_TK, grad_TE = torch.randn(tokens, r.top_k), torch.randn(tokens, experts)
    ours, wide = logits.clone().requires_grad_(), logits.double().requires_grad_()
    weight, score, expert, _ = route(ours, bias, r)
    torch.autograd.backward([weight, score], [grad_TK, grad_TE])
    scores = wide.softmax(1) if r.softmax else wide.sigmoid()
    weights = scores.gather(1, expert)
    weights = (weights / weights.sum(1, keepdim=True) if r.norm_topk else weights) * r.route_scale
    torch.autograd.backward([weights, scores], [grad_TK.double(), grad_TE.double()])
    with interpreted():
        by_kernel = module.route_backward_triton(grad_TK, grad_TE, score.detach(), expert, r)
    for found in (ours.grad, by_kernel):
        assert found.shape == logits.shape and (found - wide.grad).norm() <= 1e-6 * wide.grad.norm()


def test_large_logits_stay_finite():
    r = Routes(top_k=2)
    for softmax in (False, True):
        logits = torch.tensor([[500.0, -500.0, 0.0, 400.0]], requires_grad=True)
        weight, score, _, _ = route(logits, torch.zeros(4), replace(r, softmax=softmax))
        (weight.sum() + score.sum()).backward()
        assert weight.isfinite().all() and score.isfinite().all() and logits.grad.isfinite().all()


def test_fake_tensors_have_the_same_shapes():
    _, _, r = CASES["V3 in small: 4 of 8 groups"]
    real = route(*given_logits(9, 32), r)
    with FakeTensorMode():
        fake = route(torch.empty(9, 32), torch.empty(32), r)
    assert [(t.shape, t.dtype) for t in fake] == [(t.shape, t.dtype) for t in real]


def test_bytes():
    """One token, two experts, top-1: logits and scores, a weight of 4 and an index of 8; bias and counts."""
    assert module.route_bytes(1, 2, 1) == 16 + 12 + 24
    assert module.route_backward_bytes(1, 2, 1) == 24 + 12
