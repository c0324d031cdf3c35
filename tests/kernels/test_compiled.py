"""What torch.compile makes of the elementwise kernels is what they are without it."""

import os
import shutil

import pytest
import torch
from shoestring.kernels.ops import Ops

missing = shutil.which("c++") is None and shutil.which("g++") is None and "CI" not in os.environ
pytestmark = pytest.mark.skipif(missing, reason="torch.compile on CPU wants a C++ compiler")

CALLS = {
    "rms_norm": lambda ops, a, b: ops.rms_norm(a, b[0], 1e-6),
    "swiglu": lambda ops, a, b: ops.swiglu(a),
    "weighted swiglu": lambda ops, a, b: ops.swiglu(a, b[:, 0].float()),
    "rotate": lambda ops, a, b: ops.rotate(a.view(2, 4, 1, 16), torch.polar(torch.ones(4, 8), torch.rand(4, 8) * 6)),
    "cross_entropy": lambda ops, a, b: ops.cross_entropy(a, torch.nn.Parameter(b), torch.arange(8) - 1, 0.5),
}


@pytest.mark.parametrize("name", CALLS)
def test_compiled_equals_plain(name):
    def run(compiled):
        torch.manual_seed(0)
        a, b = (torch.randn(8, 16, dtype=torch.bfloat16, requires_grad=True) for _ in range(2))
        out = CALLS[name](Ops(compiled=compiled), a, b)
        out.backward(torch.randn_like(out))
        return out.float(), a.grad.float()

    for plain, compiled in zip(run(False), run(True)):
        assert (plain - compiled).norm() <= 8e-3 * plain.norm()
