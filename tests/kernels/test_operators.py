"""Every operator of the namespace `shoestring`, found in torch's own list: rehearsal and FLOP counters must be able to trace each."""

import importlib
import pkgutil

import pytest
import torch
from shoestring import kernels
from shoestring.kernels.e5m6 import pack_e5m6
from shoestring.kernels.quantise import quantise_blocks, quantise_columns, quantise_rows
from torch.library import opcheck
from torch.utils.flop_counter import flop_registry

R, D, E, K = 256, 256, 2, 2  # rows, dim, experts, top-k
PRODUCTS = {"fp8_matmul", "add_fp8_outer", "fp8_grouped_matmul", "add_fp8_grouped_outer"}


def operators():
    for module in pkgutil.iter_modules(kernels.__path__):
        importlib.import_module(f"{kernels.__name__}.{module.name}")
    return {name.removeprefix("shoestring::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("shoestring::")}


def inputs():
    """Of each operator, by name: as its public function calls it."""
    g = torch.Generator().manual_seed(0)
    x, weight_R = torch.randn(R, D, generator=g).bfloat16(), torch.rand(R, generator=g)
    rows, blocks, columns, packed = quantise_rows(x), quantise_blocks(x), quantise_columns(x), pack_e5m6(x)
    as_tuple = lambda q: (q.codes, q.scales)
    experts = quantise_blocks(x), quantise_blocks(-x)
    stacked = tuple(torch.stack(parts) for parts in zip(*map(as_tuple, experts)))
    ends, place = torch.tensor([128, R], dtype=torch.int32), torch.arange(R).view(-1, K)
    scores = torch.rand(R, E, generator=g)
    return {
        "pack_e5m6": [(x, 1e-4)],
        "unpack_e5m6": [(packed.data, packed.scales, D)],
        "fp8_matmul": [(*as_tuple(rows), *as_tuple(blocks), torch.bfloat16)],
        "add_fp8_outer": [(torch.zeros(D, D), *as_tuple(columns), *as_tuple(columns))],
        "fp8_grouped_matmul": [(*as_tuple(rows), *stacked, ends, torch.bfloat16)],
        "add_fp8_grouped_outer": [(torch.zeros(2, D, D), *as_tuple(columns), *as_tuple(columns), ends)],
        "permute": [(x, place.flatten() - 1), (weight_R, place.flatten())],
        "permute_scales": [(rows.scales, place.flatten() - 1)],
        "sum_copies": [(x, place, None), (x, place, torch.rand(R // K, K, generator=g))],
        "quantise_rows": [(x, False, 1e-4), (x[:, :200].contiguous(), True, 1e-4)],
        "quantise_blocks": [(x,)],
        "quantise_columns": [(x, None, 1e-4), (rows.codes, rows.scales, 1e-4)],
        "rms_norm_quantised": [(x, x[0], 1e-6, False)],
        "route": [(scores, torch.zeros(E), K, 1, 1, False, True, 2.5)],
        "route_backward": [(scores, scores, scores, torch.randint(0, E, (R, K), generator=g), True, True, 2.5)],
        "row_maps": [(torch.randint(0, 4, (R,), generator=g), 4, 128)],
        "swiglu_quantised": [(x, None, None), (*as_tuple(rows), weight_R)],
        "swiglu_backward": [(*as_tuple(rows), x[:, : D // 2].contiguous(), weight) for weight in (None, weight_R)],
    }


def test_every_operator_is_here_and_products_have_flops():
    names = operators()
    assert names == inputs().keys()
    counted = {name for name in names if getattr(torch.ops.shoestring, name) in flop_registry}
    assert counted == PRODUCTS == {name for name in names if "matmul" in name or "outer" in name}


@pytest.mark.parametrize("name", inputs())
def test_fake_results_and_schema_are_those_of_the_real_one(name):
    for args in inputs()[name]:
        in_fp8 = any(isinstance(arg, torch.Tensor) and arg.dtype == torch.float8_e4m3fn for arg in args)
        checks = ["test_faketensor"] if in_fp8 else ["test_faketensor", "test_schema"]  # which multiplies its inputs: not for FP8
        opcheck(getattr(torch.ops.shoestring, name).default, args, test_utils=checks)
