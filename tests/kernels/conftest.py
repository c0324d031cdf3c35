"""Every kernel is held against plain autograd in FP64, on the operands as they are after rounding to the dtype under test."""

from types import SimpleNamespace

import pytest
import torch
from shoestring.kernels.weight_grad import WeightGradStore

# Of a whole tensor's norm. A BF16 value is off by up to 2^-9; a kernel rounds a few times on the way.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 8e-3}


@pytest.fixture(params=TOLERANCE, ids=lambda d: str(d).removeprefix("torch."))
def kit(request):
    """`dtype`, a seeded `randn(*shape)`, `param(*shape)` with a main_grad, a weight-gradient `store` with
    `run_closures()`, and `check(found, wanted)`."""
    dtype, generator = request.param, torch.Generator().manual_seed(0)

    def randn(*shape, dtype=dtype):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    def param(*shape):
        weight = torch.nn.Parameter(randn(*shape))
        weight.main_grad = torch.zeros(shape, dtype=torch.promote_types(dtype, torch.float32))
        return weight

    def check(found, wanted, tolerance=TOLERANCE[dtype]):
        assert found.shape == wanted.shape and found.isfinite().all()
        assert (found.double() - wanted.double()).norm() <= tolerance * wanted.double().norm() + 1e-30

    @torch.no_grad()  # as the executor does
    def run_closures():
        """All that wait; their number."""
        waiting = store.take()
        for closure in waiting:
            closure()
        return len(waiting)

    store, wide = WeightGradStore(), torch.promote_types(dtype, torch.float32)
    return SimpleNamespace(dtype=dtype, wide=wide, randn=randn, param=param, check=check, store=store, run_closures=run_closures)


@pytest.fixture
def leaf():
    """A detached copy that asks for its gradient; with `wide`, in FP64."""
    return lambda t, wide=False: (t.detach().double() if wide else t.detach().clone()).requires_grad_()
