"""The FP8 casts: references against exact rational arithmetic, kernels against references to the bit, operators under fake tensors."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shoestring.kernels import quantise as Q
from shoestring.kernels.quantise import ACTIVATION_FLOOR, GRADIENT_FLOOR, Quantised
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from .triton_interpreter import interpreted

# ---------------------------------------------------------------- the oracle: rational numbers, nothing of torch's rounding

E4M3 = sorted(
    {s * m * Fraction(2) ** (e - 10) for s in (-1, 1) for e in range(1, 16) for m in range(16) if (m >= 8 or e == 1) and (e, m) != (15, 15)}
)


def nearest(value: Fraction, mantissa_bits: int, lowest_exponent: int) -> Fraction:
    """To nearest even in a binary format; no overflow here."""
    if not value:
        return value
    exponent = max(math.floor(math.log2(abs(value))), lowest_exponent)
    while exponent > lowest_exponent and Fraction(2) ** exponent > abs(value):
        exponent -= 1
    while Fraction(2) ** (exponent + 1) <= abs(value):
        exponent += 1
    step = Fraction(2) ** (exponent - mantissa_bits)
    return round(value / step) * step  # a Fraction rounds to even


def fp32(value: Fraction) -> Fraction:
    return nearest(value, 23, -126)


def tile_oracle(values: list[float], floor: float, power_of_two: bool) -> tuple[Fraction, list[Fraction]]:
    scale = fp32(max(max(map(abs, map(Fraction, values))), Fraction(torch.tensor(floor).item())) / 448)
    if power_of_two:
        scale = next(Fraction(2) ** e for e in itertools.count(-150) if Fraction(2) ** e >= scale)
    clamped = [min(max(fp32(Fraction(v) / scale), Fraction(-448)), Fraction(448)) for v in values]
    return scale, [nearest(v, 3, -6) for v in clamped]


def test_the_oracle_knows_e4m3():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    assert [Fraction(x) for x in sorted(set(codes[codes.isfinite()].tolist()))] == E4M3
    assert all(nearest(value, 3, -6) == value for value in E4M3)


magnitudes = st.integers(-40, 40).flatmap(lambda e: st.lists(st.floats(-(2.0**e), 2.0**e, width=32), min_size=1, max_size=128))


@given(values=magnitudes, power_of_two=st.booleans(), floor=st.sampled_from([ACTIVATION_FLOOR, GRADIENT_FLOOR]))
def test_a_tile_is_rounded_as_exact_arithmetic_says(values, power_of_two, floor):
    values = torch.tensor(values).tolist()
    scale, codes = tile_oracle(values, floor, power_of_two)
    q = Q.quantise_rows_reference(torch.tensor([values]), power_of_two=power_of_two, floor=floor)
    assert Fraction(q.scales.item()) == scale
    assert list(map(Fraction, q.codes[0].float().tolist())) == codes


# ---------------------------------------------------------------- which tile a value belongs to


def randn(*shape, scale=1.0, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def spread(T, K):
    """Tiles of very different size, next to each other along both dimensions."""
    return (
        randn(T, K)
        * 10.0 ** torch.randint(-12, 12, (T, K // 32 + 1), generator=torch.Generator().manual_seed(1)).repeat_interleave(32, 1)[:, :K]
    )


def largest_of_tiles(x, rows, columns):
    return torch.tensor(
        [[x[i : i + rows, j : j + columns].abs().max().item() for j in range(0, x.shape[1], columns)] for i in range(0, x.shape[0], rows)]
    )


@pytest.mark.parametrize(("T", "K"), [(3, 200), (130, 128), (257, 272)])
def test_tiles_are_where_the_recipe_has_them(T, K):
    x = spread(T, K)
    scale = lambda largest: largest.clamp_min(ACTIVATION_FLOOR) / 448
    assert torch.equal(Q.quantise_rows(x).scales, scale(largest_of_tiles(x, 1, 128)).T)
    assert torch.equal(Q.quantise_blocks(x).scales, scale(largest_of_tiles(x, 128, 128)))
    assert torch.equal(Q.quantise_columns(x).scales, scale(largest_of_tiles(x, 128, 1)))


@pytest.mark.parametrize(("T", "K"), [(3, 200), (130, 128), (257, 272)])
def test_what_is_read_back(T, K):
    """Half a step of E4M3 off, 1/16 of the value; below the smallest normal code, half of the smallest step."""
    x = randn(T, K)
    columns = Q.quantise_columns(x)
    for found in (
        Q.dequantise_rows(Q.quantise_rows(x), torch.float64),
        Q.dequantise_rows(Q.quantise_rows(x, power_of_two=True), torch.float64),
        Q.dequantise_rows(columns, torch.float64).T,
        Q.dequantise_rows(Q.columns_of(Q.quantise_rows(x)), torch.float64).T,
        Q.dequantise_blocks(Q.quantise_blocks(x), torch.float64),
    ):
        assert found.shape == x.shape
        assert ((found - x).abs() <= x.abs() / 8 + x.abs().max() / 448 / 2**9).all()  # 1/16 each time, and columns_of rounds twice
    assert columns.codes.is_contiguous() and columns.codes.shape == (K, T)


def test_gradients_of_1e_10_keep_their_precision_under_their_own_floor():
    x = randn(64, 256, scale=1e-10)
    error = lambda floor: ((Q.dequantise_rows(Q.quantise_rows(x, floor=floor), torch.float64) - x).norm() / x.norm()).item()
    assert error(GRADIENT_FLOOR) < 0.04 and error(ACTIVATION_FLOOR) > 0.5


# ---------------------------------------------------------------- the kernels

SHAPES = {
    "one tile": (16, 128),
    "one row": (1, 256),  # programs of 16 rows are masked
    "rows that fill no program": (17, 128),
    "tokens past one block of columns": (129, 64),  # also: fewer channels than a tile
    "channels that are no multiple of 128": (5, 208),
    "no row": (0, 128),
}


def specials(x):
    if x.numel():
        x = x.clone()
        x[0, :8] = torch.tensor([torch.nan, -torch.nan, torch.inf, 0.0, -0.0, 3e38, 1e-38, -1e-40])
        x[-1, -1] = torch.nan
    return x


VALUES = {
    "normal": lambda T, K: randn(T, K),
    "wide spread": spread,  # scales of neighbouring tiles differ by 1e24
    "gradients": lambda T, K: randn(T, K, scale=1e-10),
    "zeros": lambda T, K: torch.zeros(T, K),  # every scale is the floor's
    "NaN, infinity, subnormal": lambda T, K: specials(randn(T, K)),
    "all NaN": lambda T, K: torch.full((T, K), torch.nan),
    "powers of two": lambda T, K: 2.0 ** torch.randint(-20, 20, (T, K)),  # quotients are ties and exact codes
    "448 times a power of two": lambda T, K: torch.full((T, K), 448 * 2.0**-3),  # the scale is one exactly: not rounded up
}


def check(found: tuple, wanted: Quantised):
    bits = lambda codes: torch.where(codes.float().isnan(), 127, codes.view(torch.uint8))  # NaN of either sign
    assert torch.equal(bits(found[0]), bits(wanted.codes))
    assert torch.equal(found[1].view(torch.int32), wanted.scales.view(torch.int32))


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_equal_references_to_the_bit(shape, values):
    x = VALUES[values](*SHAPES[shape]).bfloat16()
    with interpreted():
        for floor in (ACTIVATION_FLOOR, GRADIENT_FLOOR):
            for power_of_two in (False, True):
                rows = Q.quantise_rows_triton(x, power_of_two, floor)
                check(rows, Q.quantise_rows_reference(x, power_of_two=power_of_two, floor=floor))
            check(Q.quantise_columns_triton(x, None, floor), Q.quantise_columns_reference(x, floor=floor))
            check(Q.quantise_columns_triton(*rows, floor), Q.columns_of_reference(Quantised(*rows), floor=floor))
        if len(x):
            check(Q.quantise_blocks_triton(x), Q.quantise_blocks_reference(x))


def test_nan_stays_alone_and_infinity_takes_its_tile():
    x = randn(4, 256).bfloat16()
    x[1, 5], x[2, 130] = torch.nan, -torch.inf
    wrong = Q.dequantise_rows(Q.quantise_rows(x), torch.float32).isnan()
    wanted = torch.zeros(4, 256, dtype=torch.bool)
    wanted[1, 5] = wanted[2, 128:] = True
    assert torch.equal(wrong, wanted)


def test_other_inputs_are_refused_where_no_kernel_was_compiled():
    with pytest.raises(TypeError, match="float32"):
        Q.quantise_rows_triton(torch.zeros(2, 128), False, 1.0)


# ---------------------------------------------------------------- the operators

CALLS = {
    "rows": lambda x: Q.quantise_rows(x),
    "powers of two": lambda x: Q.quantise_rows(x, power_of_two=True, floor=GRADIENT_FLOOR),
    "blocks": lambda x: Q.quantise_blocks(x),
    "columns": lambda x: Q.quantise_columns(x),
    "columns of rows": lambda x: Q.columns_of(Q.quantise_rows(x)),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_operators_have_the_same_form_without_data(call):
    x = randn(130, 208).bfloat16()
    real = call(x)
    with FakeTensorMode() as mode:
        fake = call(mode.from_tensor(x))
    for a, b in ((real.codes, fake.codes), (real.scales, fake.scales)):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
    with FlopCounterMode(display=False) as counter:
        call(x)
    assert counter.get_total_flops() == 0


def test_torchs_own_check_of_an_operator():
    """Not of `columns_of`: the check itself multiplies FP8."""
    x = randn(130, 208).bfloat16()
    for op, args in (
        (torch.ops.shoestring.quantise_rows, (x, True, 1e-4)),
        (torch.ops.shoestring.quantise_blocks, (x,)),
        (torch.ops.shoestring.quantise_columns, (x, None, 1e-4)),
    ):
        torch.library.opcheck(op.default, args, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(("T", "K"), [(0, 128), (130, 208), (128, 256)])
def test_bytes(T, K):
    x = torch.zeros(T, K).bfloat16()
    size = lambda q: q.codes.nbytes + q.scales.nbytes
    assert (size(Q.quantise_rows(x)), size(Q.quantise_columns(x))) == (Q.rows_bytes(T, K), Q.rows_bytes(K, T))
    if T:
        assert size(Q.quantise_blocks(x)) == Q.blocks_bytes(T, K)
