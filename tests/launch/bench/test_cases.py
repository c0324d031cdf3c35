"""Every kernel has a case; every case is right where it is run, and notices where it is not."""

import importlib
import math
import pkgutil
import sys
from types import SimpleNamespace

import pytest
import shoestring.kernels
import torch
from shoestring.kernels import fp8_linear, paced_copy, quantise
from shoestring.kernels.quantise import Quantised, dequantise_blocks, dequantise_rows
from shoestring.launch.bench import peers
from shoestring.launch.bench.case import FACTS, SMALL, Maker, sqnr
from shoestring.launch.bench.run import Bench, architecture_of, every_case, preferred, run_case

CPU = torch.device("cpu")
CASES = every_case(SMALL)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.op}, {case.shape}")
def test_right_on_a_cpu(case):
    row = run_case(case, Bench(device=CPU))
    assert row.passed and not row.error
    assert row.seconds is None and not row.peers and not row.configs


def test_every_kernel_with_configurations_has_a_case():
    modules = [importlib.import_module(f"shoestring.kernels.{info.name}") for info in pkgutil.iter_modules(shoestring.kernels.__path__)]
    listed = {config.kernel for module in modules for config in getattr(module, "CONFIGS", ())}
    used = {use.kernel for case in CASES for use in case.uses}
    paced = {config.kernel for config in paced_copy.CONFIGS}  # they take as long as they are told to
    assert listed - used == paced, "a kernel that no case of launch/bench times: add one"


@pytest.mark.parametrize("architecture", [90, 100])
def test_every_case_has_a_configuration_for_each_gpu_that_has_fp8(architecture):
    for case in every_case(FACTS):
        for use in case.uses:
            assert use.configs(architecture), (case.op, case.shape)


def test_the_published_shapes_are_all_there():
    with_rates = {(case.op, case.shape): case.published for case in every_case(FACTS) if case.published}
    assert len(with_rates) == 8 and with_rates["fp8 fprop", "4096x7168x16384"] == 1520
    assert with_rates["fp8 grouped fprop", "4*8192x7168x2048"] == 1214


def test_flops_and_bytes_of_a_product():
    case = next(c for c in every_case(FACTS) if (c.op, c.shape) == ("fp8 fprop", "4096x4096x7168"))
    assert case.flops == 2 * 4096 * 4096 * 7168
    # codes and scales of both operands, and BF16 out
    assert case.bytes == 4096 * 7168 * (1 + 4 / 128) + 4096 * 7168 * (1 + 4 / 128**2) + 2 * 4096 * 4096


def test_names_are_unique():
    for sizes in (SMALL, FACTS):
        names = [(case.op, case.shape) for case in every_case(sizes)]
        assert len(names) == len(set(names))


@pytest.mark.parametrize("op", ["cast by rows", "fp8 fprop", "fp8 grouped wgrad", "permute fp8", "row maps", "swiglu backward"])
def test_one_number_that_is_wrong_is_noticed(op):
    """The largest of the result is lost. Of a cast with 31 dB only a larger fault shows: a tenth of the rows."""
    case = next(case for case in CASES if case.op == op)
    args = case.make(Maker(CPU))
    found = [t.double().clone() for t in case.read(case.run(*args))]
    if op == "cast by rows":
        found[0][: len(found[0]) // 10] = 0
    else:
        found[0].view(-1)[found[0].abs().argmax()] = 0
    assert sqnr(found, case.exact(*args)) < case.least_db


def test_sqnr():
    ones = torch.ones(100)
    assert sqnr([ones], [ones]) == math.inf
    assert sqnr([ones * 1.01], [ones]) == pytest.approx(40, abs=0.01)
    assert sqnr([ones, ones * 1.1], [ones, ones]) == pytest.approx(20, abs=0.01)  # the worst
    assert sqnr([ones[:5]], [ones]) == -math.inf
    assert sqnr([ones * math.nan], [ones]) == -math.inf
    assert sqnr([torch.zeros(3)], [torch.zeros(3)]) == math.inf


def test_what_fails_is_a_row_that_says_so():
    broken = SimpleNamespace(**{**vars(CASES[0]), "run": lambda *_: (_ for _ in ()).throw(RuntimeError("\nno such\nkernel"))})
    row = run_case(broken, Bench(device=CPU))
    assert not row.passed and row.error == "RuntimeError: no such"


def test_a_gpu_without_fp8_is_no_failure():
    row = run_case(CASES[0], Bench(device=CPU, architecture=80))
    assert row.passed and row.error == "not here: no configuration is for sm_80"


@pytest.mark.parametrize(("capability", "architecture"), [((8, 0), 80), ((8, 9), 80), ((9, 0), 90), ((10, 0), 100), ((10, 3), 100)])
def test_architectures(capability, architecture):
    assert architecture_of(capability) == architecture


def test_a_preferred_configuration_is_the_first_and_only_for_a_while(monkeypatch):
    before = fp8_linear.CONFIGS
    wanted = [c for c in before if c.kernel is fp8_linear.fp8_matmul_kernel and not c.meta["GROUPED"]][-1]
    for capability in ((9, 0), (10, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        plain = fp8_linear._chosen(fp8_linear.fp8_matmul_kernel, False)
        assert plain.warp_specialised == (capability == (9, 0)) and plain is not wanted
        with pytest.raises(KeyError), preferred(fp8_linear, wanted):
            assert fp8_linear._chosen(fp8_linear.fp8_matmul_kernel, False) is wanted
            raise KeyError
    assert fp8_linear.CONFIGS is before


# ---------------------------------------------------------------- operands as torch wants them


def test_block_wise_operands_stand_for_the_same_numbers():
    """Scales for torch have strides (1, rows), and those of a weight a multiple of 4 along K."""
    maker = Maker(CPU)
    a, b = quantise.quantise_rows(maker.normal(130, 640)), quantise.quantise_blocks(maker.normal(256, 640))
    codes_a, scales_a, codes_b, scales_b = peers.blocks_for_torch(a, b, weight=True)
    assert scales_a.shape == (130, 5) and scales_a.stride() == (1, 130)
    assert scales_b.shape == (8, 2) and scales_b.stride() == (1, 8) and (scales_b[5:] == 0).all()
    assert codes_b.shape == (640, 256) and codes_b.stride() == (1, 640)
    wide_a = (codes_a.float().view(130, 5, 128) * scales_a[:, :, None]).flatten(1)
    wide_b = codes_b.t().float() * scales_b.t()[:, :5].repeat_interleave(128, 0).repeat_interleave(128, 1)
    assert torch.equal(wide_a, dequantise_rows(a, torch.float32)) and torch.equal(wide_b, dequantise_blocks(b, torch.float32))
    by_rows = Quantised(*peers.blocks_for_torch(a, a, weight=False)[2:])
    assert by_rows.scales.shape == (130, 5) and by_rows.scales.stride() == (1, 130)


def test_row_wise_operands():
    x, w = Maker(CPU).normal(32, 64), Maker(CPU).normal(48, 64)
    a, scale_a, b, scale_b = peers.rows_for_torch(x, w)
    assert (scale_a.shape, scale_b.shape, b.shape) == ((32, 1), (1, 48), (64, 48))
    assert sqnr([(a.float() * scale_a) @ (b.float() * scale_b)], [x.double() @ w.double().t()]) > 25


def test_transformers_layer_has_the_same_weights():
    """Its output agrees with ours, which it can only with every weight in its place."""
    case = next(case for case in CASES if case.op.startswith("moe layer bf16"))
    args = case.make(Maker(CPU))
    [peer] = case.peers
    assert sqnr(peer.read(peer.run(*peer.prepare(*args))), case.exact(*args)) > 35
    assert "transformers" in sys.modules
