"""The 12-bit float: every code, every tie, against rational arithmetic; its packing; kernels against references to the bit."""

from fractions import Fraction

import pytest
import torch
from shoestring.kernels import e5m6 as E
from shoestring.kernels.quantise import ACTIVATION_FLOOR, GRADIENT_FLOOR
from torch._subclasses.fake_tensor import FakeTensorMode

from .triton_interpreter import interpreted

CODES = torch.arange(4096, dtype=torch.int32)


def meaning(code: int) -> Fraction | None:
    """By the definition of a binary float; None for what is no number."""
    sign, exponent, mantissa = (-1) ** (code >> 11), code >> 6 & 31, code & 63
    if exponent == 31:
        return None
    return sign * (
        Fraction(64 + mantissa, 64) * Fraction(2) ** (exponent - 15) if exponent else Fraction(mantissa, 64) * Fraction(2) ** -14
    )


NUMBERS = {code: value for code in range(4096) if (value := meaning(code)) is not None}


def encode_triton(x: torch.Tensor) -> torch.Tensor:
    """Through the kernel itself, in tiles whose last value, 65024, makes their scale 1."""
    rows = torch.nn.functional.pad(x, (0, -len(x) % 127)).view(-1, 127)
    with interpreted():
        data, scales = kernel_pack(torch.nn.functional.pad(rows, (0, 1), value=E.E5M6_MAX))
    assert (scales == 1).all()
    low, high = data.int().split([128, 64], 1)
    return (low | torch.cat([high & 0xF, high >> 4], 1) << 8)[:, :127].flatten()[: len(x)]


def kernel_pack(x: torch.Tensor, floor=ACTIVATION_FLOOR):
    """`pack_e5m6_triton`'s launch, for FP32 too: the interpreter has no compiled signature."""
    data, scales = E._outputs(x)
    E.pack_e5m6_kernel[(-(-len(x) // 16), len(scales))](x, data, scales, *x.shape, floor, ROWS=16)
    return data, scales


ENCODERS = {"reference": E.encode_reference, "kernel": encode_triton}


def test_every_code_means_what_the_format_says():
    values = E.decode_reference(CODES).tolist()
    assert all(Fraction(values[code]) == value for code, value in NUMBERS.items())
    assert len(NUMBERS) == 4096 - 2 * 64 and max(NUMBERS.values()) == E.E5M6_MAX
    assert not any(torch.tensor(values[code]).isfinite() for code in range(4096) if code not in NUMBERS)


@pytest.mark.parametrize("encode", ENCODERS.values(), ids=ENCODERS)
def test_every_code_comes_back_and_ties_go_to_even(encode):
    codes = torch.tensor(sorted(code for code in NUMBERS if code < 2048))  # ascending in value too
    values = E.decode_reference(codes.int())
    ties = (values[1:] + values[:-1]) / 2  # exact in FP32
    up, down = ties.nextafter(torch.tensor(torch.inf)), ties.nextafter(torch.tensor(0.0))
    even = torch.where(codes[1:] % 2 == 0, codes[1:], codes[:-1])
    for x, wanted in ((values, codes), (ties, even), (up, codes[1:]), (down, codes[:-1])):
        assert torch.equal(encode(x), wanted.int())
        assert torch.equal(encode(-x), wanted.int() | 0x800)


def test_what_is_too_large_saturates():
    """Only by rounding can a quotient pass 65024: scales are made for the largest value."""
    x = torch.tensor([65024.0, 65055.0, 65056.0, 1e9, -1e30])
    assert E.decode_reference(E.encode_reference(x)).tolist() == [E.E5M6_MAX] * 4 + [-E.E5M6_MAX]


def randn(*shape, scale=1.0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * scale


def nan_and_infinity(T, K):
    x = randn(T, K)
    x[:1, 3], x[-1:, -1] = torch.nan, torch.inf
    return x


VALUES = {
    "normal": randn,
    "wide spread": lambda T, K: randn(T, K) * 10.0 ** (torch.arange(K) % 13 - 9),  # subnormal codes and zeros beside large values
    "tiny": lambda T, K: randn(T, K, scale=1e-12),
    "zeros": torch.zeros,
    "NaN, infinity": nan_and_infinity,
}
SHAPES = {"no row": (0, 128), "one row, two tiles": (1, 256), "ragged": (17, 208), "less than half a tile": (3, 48)}


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_equal_references_to_the_bit(shape, values):
    x = VALUES[values](*SHAPES[shape]).bfloat16()
    for floor in (ACTIVATION_FLOOR, GRADIENT_FLOOR):
        data, scales = E.pack_e5m6_reference(x, floor)
        with interpreted():
            found = E.pack_e5m6_triton(x, floor)
            back = E.unpack_e5m6_triton(data, scales, x.shape[1])
        assert torch.equal(found[1], scales)
        assert values == "NaN, infinity" or torch.equal(found[0], data)  # a NaN may have either sign
        wanted = E.unpack_e5m6_reference(data, scales, x.shape[1], torch.bfloat16)
        for y in (back, E.unpack_e5m6_reference(*found, x.shape[1], torch.bfloat16)):
            assert torch.equal(y.view(torch.int16)[~y.isnan()], wanted.view(torch.int16)[~wanted.isnan()])
            assert torch.equal(y.isnan(), wanted.isnan())


@pytest.mark.parametrize("values", ["normal", "wide spread"])
def test_what_is_read_back(values):
    x = VALUES[values](33, 208).bfloat16()
    packed = E.pack_e5m6(x)
    assert (packed.scales.log2() % 1 == 0).all()
    exact = E.unpack_e5m6_reference(packed.data, packed.scales, 208, torch.float64)
    step = packed.scales.T.repeat_interleave(128, 1)[:, :208] * 2.0**-21  # half of the smallest
    assert ((exact - x.double()).abs() <= x.double().abs() / 2**7 + step).all()
    assert torch.equal(E.unpack_e5m6(packed), exact.bfloat16())
    assert packed.data.nbytes + packed.scales.nbytes == E.e5m6_bytes(33, 208)


def test_infinity_takes_its_tile_and_nan_stays_alone():
    wrong = E.unpack_e5m6(E.pack_e5m6(nan_and_infinity(3, 256).bfloat16())).isnan()
    wanted = torch.zeros(3, 256, dtype=torch.bool)
    wanted[0, 3] = wanted[2, 128:] = True
    assert torch.equal(wrong, wanted)


def test_operators_have_the_same_form_without_data():
    x = randn(5, 208).bfloat16()
    packed = E.pack_e5m6(x)
    with FakeTensorMode() as mode:
        fake = E.pack_e5m6(mode.from_tensor(x))
        y = E.unpack_e5m6(fake)
    for a, b in ((packed.data, fake.data), (packed.scales, fake.scales), (E.unpack_e5m6(packed), y)):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
    torch.library.opcheck(torch.ops.shoestring.pack_e5m6.default, (x, 1e-4), test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(
        torch.ops.shoestring.unpack_e5m6.default, (packed.data, packed.scales, 208), test_utils=("test_schema", "test_faketensor")
    )
