"""Every kernel and configuration, compiled for its GPUs; and the gate itself, which must turn red for kernels that are bad on purpose."""

import re
from pathlib import Path

import pytest
import shoestring
import triton
import triton.language as tl
from shoestring.kernels import quantise
from shoestring.kernels.configs import KernelConfig, choose

from . import gate
from .bad_kernels import BAD, GOOD

LISTED = [(config, architecture) for config in gate.every_config() for architecture in config.architectures]
DOCS = Path(shoestring.__file__).resolve().parent / "docs" / "kernels.md"


@pytest.mark.parametrize(("config", "architecture"), LISTED, ids=[f"{c.name}, sm_{a}" for c, a in LISTED])
def test_every_configuration(config, architecture):
    assert gate.faults(gate.compile_ahead(config, architecture)) == []


def test_every_kernel_is_listed_and_every_name_is_one():
    assert gate.unlisted() == []
    names = [config.name for config in gate.every_config()]
    assert len(names) == len(set(names))


def test_the_page_has_every_configuration():
    rows = set(re.findall(r"^\| ([^|]+) \| (sm_\d+) \|", DOCS.read_text(), re.MULTILINE))
    assert rows == {(config.name, f"sm_{architecture}") for config, architecture in LISTED}, (
        "print docs/kernels.md's table again: python tests/kernels/gate.py"
    )


def test_an_unlisted_kernel_is_found(monkeypatch):
    monkeypatch.setattr(quantise, "CONFIGS", quantise.CONFIGS[:1])
    assert gate.unlisted() == ["shoestring.kernels.quantise.quantise_blocks_kernel", "shoestring.kernels.quantise.quantise_columns_kernel"]


@pytest.mark.parametrize("config", GOOD, ids=lambda config: config.name)
def test_what_is_well_made_passes(config):
    found = gate.compile_ahead(config, 90)
    assert gate.faults(found) == []
    # what is counted, is counted exactly: each product of the tile once, each of its sums promoted once
    tile = config.meta["BM"] * config.meta["BN"]
    assert (found.macs, found.promotions) == (tile * 128, tile)


@pytest.mark.parametrize("fault", BAD)
def test_what_is_bad_is_refused_for_that_reason(fault):
    found = gate.faults(gate.compile_ahead(BAD[fault], 90))
    assert [sentence for sentence in found if fault in sentence] == found != []


@pytest.mark.parametrize("fault", ["no fp8 tensor-core instruction", "additions in the main loop"])
def test_blackwell_too(fault):
    """Its tensor core sums FP8 in FP32 whatever was asked, so that both are the same fault there: never promoted."""
    assert gate.faults(gate.compile_ahead(GOOD[1], 100)) == []
    assert "additions in the main loop" in gate.faults(gate.compile_ahead(BAD[fault], 100))[0]


@triton.jit
def bf16_product(a, b, c, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m, n, k = tl.program_id(0) * BM + tl.arange(0, BM), tl.program_id(1) * BN + tl.arange(0, BN), tl.arange(0, BK)
    total = tl.zeros((BM, BN), tl.float32)
    for i in tl.range(0, K, BK):
        x, y = tl.load(a + m[:, None] * K + i + k[None, :]), tl.load(b + n[None, :] * K + i + k[:, None])
        total = tl.dot(x, y, total)
    tl.store(c + m[:, None] * N + n[None, :], total.to(tl.bfloat16))


@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_bf16_needs_no_promotion(architecture):
    fields = dict(
        kernel=bf16_product,
        name="bf16 product",
        signature={"a": "*bf16", "b": "*bf16", "c": "*bf16", "M": "i32:16", "N": "i32:16", "K": "i32:16"},
        meta={"BM": 64, "BN": 128, "BK": 64},
        operands="bf16",
    )
    found = gate.compile_ahead(KernelConfig(**fields, macs_per_step=64 * 128 * 64), architecture)
    assert gate.faults(found) == []
    if architecture < 100:  # a step that needs half as much: the tile is computed twice
        assert gate.faults(gate.compile_ahead(KernelConfig(**fields, macs_per_step=64 * 128 * 32), architecture)) == [
            "2 x the multiply-adds that a step needs"
        ]


def test_a_configuration_names_the_kernels_arguments_and_is_consistent():
    fields = dict(kernel=bf16_product, name="x", signature={"a": "*bf16"}, meta={"BM": 64})
    with pytest.raises(ValueError, match=r"x: \['BK', 'BN', 'K', 'M', 'N', 'b', 'c'\]"):
        gate.build(KernelConfig(**fields), 90)
    with pytest.raises(ValueError, match="sm_80 has no FP8"):
        KernelConfig(**fields, operands="fp8", macs_per_step=1)
    with pytest.raises(ValueError, match="macs_per_step 0"):
        KernelConfig(**fields, operands="bf16")


def test_only_what_is_listed_is_launched():
    assert choose(quantise.CONFIGS, quantise.quantise_rows_kernel, POWER_OF_TWO=True).meta["POWER_OF_TWO"]
    with pytest.raises(LookupError, match="quantise_rows_kernel"):
        choose(quantise.CONFIGS, quantise.quantise_rows_kernel, POWER_OF_TWO=2)


def test_the_table():
    found = gate.compile_ahead(GOOD[1], 90)
    assert gate.table([found]).splitlines()[-1] == f"| eight warps | sm_90 | 8, 3 | {found.registers} | 96 | 4 QGMMA | 16384 | ok |"
