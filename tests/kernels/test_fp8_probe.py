"""The sentinel's measures, against the same numbers worked out here in FP64."""

import pytest
import torch
from shoestring.kernels.fp8_layers import Fp8Linears
from shoestring.kernels.fp8_probe import MEASURES, Probe
from shoestring.kernels.fp8_weights import WeightCache
from shoestring.kernels.grouped import RowGroups
from shoestring.kernels.quantise import Quantised, dequantise_blocks, dequantise_rows, quantise_blocks, quantise_rows
from shoestring.kernels.weight_grad import WeightGradStore

R, I, O = 256, 176, 144  # noqa: E741


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def off(found, wanted):
    return ((found.double() - wanted.double()).norm() / wanted.double().norm()).item()


def probed(rows, weight, grad, groups=None):
    """What a linear's probe found, and what the linear gave."""
    fp8 = Fp8Linears(casts=WeightCache(), store=WeightGradStore())
    weight, rows = torch.nn.Parameter(weight), rows.clone().requires_grad_()
    weight.main_grad = torch.zeros(weight.shape)
    fp8.probes[weight] = None
    with torch.no_grad():
        fp8.linear(rows, weight, groups)
    assert fp8.probes[weight] is None, "evaluation is not looked at"
    outs = [fp8.linear(rows, weight, groups) for _ in range(2)]
    for out in outs:  # the first is looked at, and only that
        rows.grad = None
        out.backward(grad)
    first, _ = fp8.store.take()
    with torch.no_grad():
        first()
    return {name: value.item() for name, value in fp8.probes[weight].found.items()}, (outs[0].detach(), rows.grad, weight.main_grad)


def test_errors_and_underflow():
    rows, weight, grad = randn(R, I), randn(O, I, seed=1), randn(R, O, seed=2) * 2.0**-33
    rows[:, ::7] *= 2.0**-30  # beside others of a tile: codes of zero
    found, (out, grad_rows, grad_weight) = probed(rows, weight, grad)
    assert set(found) == set(MEASURES)
    x, w, g = rows.double(), weight.double(), grad.double()
    wanted = {
        "input.error": off(dequantise_rows(quantise_rows(rows), torch.float64), x),
        "input.underflow": (dequantise_rows(quantise_rows(rows), torch.float64) == 0).double().mean().item(),
        "weight.error": off(dequantise_blocks(quantise_blocks(weight), torch.float64), w),
        "gradient.error": off(dequantise_rows(quantise_rows(grad, floor=1e-30), torch.float64), g),
        "forward.error": off(out, x @ w.t()),
        "dgrad.error": off(grad_rows, g @ w),
        "wgrad.error": off(grad_weight, g.t() @ x),
    }
    for name, value in wanted.items():
        assert found[name] == pytest.approx(value, rel=0.02), name  # held against BF16 products, which are off by 0.002 themselves
    assert found["input.underflow"] == pytest.approx(1 / 7, abs=0.01)
    assert all(found[f"{name}.saturated"] == 0 for name in ("input", "weight", "gradient"))


def test_scales_that_are_too_small_saturate():
    rows, weight = randn(R, I), randn(O, I, seed=1)
    good = quantise_rows(rows)
    small = Quantised(
        (rows.float() / (good.scales / 2).t().repeat_interleave(128, 1)[:, :I]).clamp(-448, 448).to(good.codes.dtype), good.scales / 2
    )
    probe = Probe(weight, None)
    probe.forward(rows, small, quantise_blocks(weight), rows @ weight.t())
    lost = rows.abs().float() > 464 * small.scales.t().repeat_interleave(128, 1)[:, :I]
    assert probe.found["input.saturated"].item() == pytest.approx(lost.double().mean().item(), abs=1e-4) and lost.any()


def test_rows_of_nobody_do_not_count():
    sizes = [128, 0, 128]
    rows, weight, grad = randn(R, I), randn(3, O, I, seed=1), randn(R, O, seed=2)
    whole, _ = probed(rows, weight, grad, RowGroups.of(sizes))
    tail = lambda t: torch.cat([t, torch.full_like(t[:128], torch.nan)])
    assert probed(tail(rows), weight, tail(grad), RowGroups.of(sizes))[0] == whole
    assert 0.02 < whole["forward.error"] < 0.06


def test_nothing_lost_of_nothing():
    """Zeros, and experts without rows."""
    found, _ = probed(torch.zeros(R, I).bfloat16(), randn(O, I), torch.zeros(R, O).bfloat16())
    assert all(found[name] == 0 for name in MEASURES if not name.startswith("weight"))
    found, _ = probed(randn(0, I), randn(2, O, I), randn(0, O), RowGroups.of([0, 0]))
    assert all(found[name] == 0 for name in MEASURES if not name.startswith("weight"))
