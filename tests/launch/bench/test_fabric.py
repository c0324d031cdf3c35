"""Rates from made-up times whose rates are known; the file that is written; what is refused; and two real processes."""

import dataclasses
import socket
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shoestring.conf.compose import load
from shoestring.conf.errors import ConfigError
from shoestring.conf.schema import RatesConfig
from shoestring.kernels import fp8_linear  # noqa: F401 (its FLOPs are registered there)
from shoestring.launch import cli, exit_codes
from shoestring.launch.bench import cluster_file, fabric, fit, links, probes, stack
from shoestring.launch.bench.case import Maker
from shoestring.launch.bench.cluster_file import Found, Machine
from shoestring.launch.bench.fit import Rate, Sample
from shoestring.launch.bench.links import Links
from shoestring.launch.local import fork_ranks
from shoestring.train.block_ops import block_calls
from torch.utils.flop_counter import FlopCounterMode

from .test_timing import FakeClock

CPU = torch.device("cpu")
CORES = Machine(gpu=False, device="CPU core", cores=2, memory_gb=8.0, sms=1, precisions=("fp32", "bf16"))
GPU = Machine(gpu=True, device="NVIDIA H100 80GB HBM3", cores=8, memory_gb=84.9, sms=132, precisions=("fp8", "bf16", "fp32"))
PLAIN = RatesConfig(tile=1, sms=1, exchange_sms=0)  # no work is lost to tiles
DEPTHS = {"products": (64, 256, 1024, 7168), "attention": (128, 1024, 4096), "memory": (0,)}


def timed(launch: float, rates: dict, *, noise: float = 0.0, seed: int = 0) -> list[Sample]:
    """What kernels with these rates take, by the formula that plans use."""
    random, found = np.random.default_rng(seed), []
    for (table, kind), rate in rates.items():
        for depth in DEPTHS[table]:
            for work in (1e-4 * rate.per_second, 1e-2 * rate.per_second):
                seconds = 2 * launch + work / rate.per_second * ((depth + rate.half) / depth if depth else 1)
                seconds *= 1 + noise * random.uniform(-1, 1)
                found.append(Sample(table=table, kind=kind, seconds=seconds, work=work, depth=depth, launches=2))
    return found


# ---------------------------------------------------------------- fits

speeds, halves = st.floats(1e9, 1e15), st.floats(1, 2000)


@given(launch=st.floats(1e-6, 1e-4), speed=st.lists(speeds, min_size=3, max_size=3), half=halves, other=halves)
@settings(deadline=None)
def test_rates_are_found_again(launch, speed, half, other):
    rates = {
        ("products", "fp8"): Rate(per_second=speed[0], half=half),
        ("attention", "forward"): Rate(per_second=speed[1], half=other),
        ("memory", "norm"): Rate(per_second=speed[2]),
    }
    found_launch, found = fit.kernels(timed(launch, rates))
    assert found_launch == pytest.approx(launch, rel=1e-4)
    for kind, rate in rates.items():
        assert (found[kind].per_second, found[kind].half) == pytest.approx((rate.per_second, rate.half), rel=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_noise_stays_noise(seed):
    rates = {("products", "bf16"): Rate(per_second=1e12, half=250), ("memory", "norm"): Rate(per_second=1e11)}
    samples = timed(1e-5, rates, noise=0.05, seed=seed)
    launch, found = fit.kernels(samples)
    assert found["products", "bf16"].per_second == pytest.approx(1e12, rel=0.15)
    assert max(fit.errors(samples, launch, found).values()) < 0.06


def test_nothing_is_negative():
    """Kernels that are slower the larger they are want a negative launch, products that are slower the deeper a negative half."""
    slower = [Sample(table="memory", kind="sum", seconds=1e-12 * n**1.2, work=n) for n in (1e6, 1e7, 1e8)]
    deeper = [Sample(table="products", kind="fp32", seconds=1e-3 * k**0.2, work=1e9, depth=k) for k in (64, 512, 4096)]
    launch, found = fit.kernels(slower + deeper)
    assert launch >= 0 and found["products", "fp32"].half == 0
    assert all(0 < rate.per_second < np.inf for rate in found.values())


@given(latency=st.floats(1e-6, 1e-3), speed=st.floats(1e8, 1e12))
@settings(deadline=None)
def test_messages(latency, speed):
    sizes = [1 << n for n in range(8, 31, 2)]
    assert fit.message([(size, latency + size / speed) for size in sizes]) == pytest.approx((latency, speed), rel=1e-4)


# ---------------------------------------------------------------- probes


def test_every_rate_that_plans_look_up_is_timed():
    kinds = RatesConfig()
    for gpu in (False, True):
        found = [
            *probes._products(gpu, ("fp8", "bf16", "fp32"), PLAIN),
            *probes._attention(gpu),
            *(probes._cases() if gpu else probes._memory()),
        ]
        by_table = {table: {p.kind for p in found if p.table == table} for table in ("products", "attention", "memory")}
        assert by_table["memory"] == set(kinds.memory) and by_table["attention"] == set(kinds.attention)
        assert by_table["products"] == {"fp8", "fp8_wgrad", "bf16", "bf16_wgrad", "fp32", "fp32_wgrad"}


def test_work_is_what_runs():
    """FLOPs of products, by torch's counter (which has none for grouped ones)."""
    counted = 0
    for probe in probes._products(False, ("fp8", "bf16", "fp32", "fp64"), PLAIN):
        args = probe.make(Maker(CPU))
        with FlopCounterMode(display=False) as counter:
            probe.run(*args)
        if flops := counter.get_total_flops():
            counted += 1
            assert flops == probe.work, probe.kind
    assert counted > 30


def test_work_is_what_plans_count():
    """Of attention, and of what is around it: the heads on a CPU are those of `tiny`."""
    calls = block_calls(load(["model=tiny"]).model, 0, tokens=512, seq_len=256, fp8=False, width=4)
    of = lambda *kernels: [call for call in calls if call.kernel in kernels and call.phase == "attention"]
    core = [probe.work for probe in probes._attention(False) if probe.depth == 256]
    assert core == [pytest.approx(call.flops) for call in of("attention", "attention_backward")]
    assert probes._heads(512).work == sum(call.bytes for call in of("elementwise") if call.when == "F")


def test_tiles_that_do_not_fill_the_last_wave():
    rates = RatesConfig(tile=128, sms=132)
    full, one_more = (probes.work_of(128 * n, 1000, 128, rates) for n in (132, 133))
    assert full == 2 * 128 * 132 * 1000 * 128 and one_more == pytest.approx(2 * full)
    assert probes.work_of(128, 1000, 128, rates, matrices=66) == full


def test_of_calls_the_lower_quartile_counts_and_what_is_a_part_does_not():
    clock = FakeClock()

    def taking(times):
        left = iter(times)
        return lambda: setattr(clock, "device", clock.device + next(left))

    part = probes.Probe(table="attention", kind="forward", work=1.0, make=lambda maker: (), run=taking([1e-3] * 500))
    slow_half = [3e-3, 9e-3] * 250
    whole = dataclasses.replace(part, kind="backward", run=taking(slow_half), less=part)
    assert whole.time(CPU, clock, 0.05).seconds == pytest.approx(2e-3)


# ---------------------------------------------------------------- the cluster and its file


def known(machine: Machine) -> tuple[dict, list[Found]]:
    """Rates, and ranks that found them."""
    kinds = RatesConfig()
    precisions = [p for p in machine.precisions for p in (p, f"{p}_wgrad")]
    rates = {("products", p): Rate(per_second=(1 + n) * 1e13, half=100.0 * n) for n, p in enumerate(precisions)}
    rates |= {("memory", kind): Rate(per_second=(1 + n) * 1e11) for n, kind in enumerate(kinds.memory)}
    rates |= {("attention", kind): Rate(per_second=4e13, half=700.0) for kind in kinds.attention}
    times = [(size, 2e-5 + size / 2e10) for size in links.SIZES]
    one = [(size, 1e-5 + size / 4e10) for size in links.SIZES]
    between = {"intra": Links(to_one=one, among_all=times, ranks=2), "inter": Links()}
    return rates, [Found(samples=timed(5e-6, rates), copy_bytes_per_second=3e11, links=between, beside=(0.9, 0.8)) for _ in range(2)]


def test_a_cpu_is_what_was_measured():
    rates, found = known(CORES)
    base = load([]).cluster
    cluster, notes = cluster_file.conclude("mine", base, CORES, found, {1: 4e9, 2: 2e9, 4: 1e9})
    r = cluster.rates
    peak = max(rate.per_second for (_, kind), rate in rates.items() if kind.startswith("bf16")) / 1e12
    assert cluster.peak_tflops["bf16"] == pytest.approx(peak, rel=1e-3)
    for (table, kind), rate in rates.items():
        whole = {"products": cluster.peak_tflops.get(kind.removesuffix("_wgrad"), 0) * 1e12, "memory": cluster.memory_tb_s * 1e12,
                 "attention": cluster.peak_tflops["fp32"] * 1e12}[table]  # fmt: skip
        assert getattr(r, table)[kind] * whole == pytest.approx(rate.per_second, rel=2e-3)
    assert max(r.memory.values()) == 1  # in a cache, kernels may be faster than a copy
    assert r.products_half["bf16"] == pytest.approx(200, rel=1e-3) and r.attention_half == pytest.approx(700, rel=1e-3)
    assert (r.launch_us, r.sms, r.exchange_sms, cluster.gpus_per_node) == (pytest.approx(5, rel=1e-3), 1, 0, 2)
    # more processes than cores are on this host as well
    assert cluster.intra_node_gb_s == cluster.inter_node_gb_s == pytest.approx(40, rel=1e-3)
    assert (r.intra_node, r.inter_node, r.inter_latency_us) == pytest.approx((0.5, 0.5, 20), rel=1e-3)
    assert (r.compute_beside_exchange, r.exchange_beside_compute) == (0.9, 0.8)
    assert (cluster.price_per_gpu_hour, cluster.mttf_gpu_hours) == (base.price_per_gpu_hour, base.mttf_gpu_hours)
    assert notes[-1].endswith("1: 2.00 (1.00), 2: 1.00 (1.00), 4: 0.50 (0.50)")


def test_a_gpus_rates_are_shares_of_the_vendors_figures():
    _, found = known(GPU)
    base = load(["cluster=h100", "precision=bf16"]).cluster
    cluster, _ = cluster_file.conclude("mine", base, GPU, found, {})
    assert (cluster.peak_tflops, cluster.memory_tb_s, cluster.intra_node_gb_s) == (base.peak_tflops, base.memory_tb_s, base.intra_node_gb_s)
    assert cluster.rates.products["fp8"] == pytest.approx(1e13 / 1979e12, rel=1e-3)
    assert cluster.rates.memory["norm"] == pytest.approx(1e11 / 3.35e12, rel=1e-3)
    assert cluster.rates.intra_node == pytest.approx(20 / 450, rel=1e-3)
    assert (cluster.rates.products["tf32"], cluster.rates.inter_node) == (base.rates.products["tf32"], base.rates.inter_node)  # not timed


@pytest.mark.parametrize("machine", [CORES, GPU], ids=["cpu", "gpu"])
def test_the_file_is_read_back_equal(machine, tmp_path):
    _, found = known(machine)
    base = load(["cluster=h100", "precision=bf16"] if machine.gpu else []).cluster
    cluster, notes = cluster_file.conclude("mine", base, machine, found, {})
    path = cluster_file.write(tmp_path / "cluster" / "mine.yaml", cluster, [*cluster_file.about(machine, 2, 3.0), *notes])
    assert load(["cluster=mine", "precision=bf16"], tmp_path).cluster == cluster
    text = path.read_text()
    assert text.startswith(cluster_file.MARK) and f"torch {torch.__version__}" in text and "# Not measured: price" in text
    assert max(map(len, text.splitlines())) <= 140


# ---------------------------------------------------------------- what is asked for


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["name=a/b"], "name = a/b: is what cluster=NAME will say: letters, digits, _ and -; nearest valid value: a_b"),
        (["processes=1"], "processes = 1: must be a whole number from 2 on, or 0"),
        (["processes=two"], "processes = two: must be a whole number"),
        (["name=mine", "out=other.yaml"], "out = other.yaml: is a file that cluster=mine cannot find; nearest valid value: mine.yaml"),
        (["out=mine.json"], "out = mine.json: is a file that cluster=mine cannot find; nearest valid value: mine.yaml"),
        (["cluster=nope"], "cluster = nope: no such choice"),
        (["out=kept.yaml"], "out = kept.yaml: is there, and was not measured: give another name=; nearest valid value: my_kept.yaml"),
    ],
)
def test_refused(words, says, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "kept.yaml").write_text("name: kept\n")
    monkeypatch.setattr(fabric, "fork_ranks", None)  # nothing is measured before
    with pytest.raises(ConfigError) as caught:
        fabric.main(words)
    assert str(caught.value).startswith(says)


def test_a_gpu_of_which_nobody_has_the_peaks():
    unknown = dataclasses.replace(GPU, device="NVIDIA X1")
    with pytest.raises(ConfigError, match=r"NVIDIA X1: is none of h800, .*give the one most like it"):
        fabric.base_cluster(fabric.parse(["name=mine"]), unknown)
    assert fabric.base_cluster(fabric.parse(["cluster=h200", "cluster.price_per_gpu_hour=9"]), unknown).price_per_gpu_hour == 9
    for device, name in (("NVIDIA GeForce RTX 4090", "rtx4090"), ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA H200", "h200")):
        assert fabric.base_cluster(fabric.parse([]), dataclasses.replace(GPU, device=device)).name == name


def test_words(monkeypatch):
    made = []
    monkeypatch.setattr("shoestring.launch.commands.command.call", lambda *args, **options: made.append((args, options)))
    cli.main(["bench", "fabric", "name=mine", "processes=4"])
    assert made == [(("shoestring.launch.bench.fabric:main", ["name=mine", "processes=4"]), {})]
    request = fabric.parse(made[0][0][1])
    assert (request.name, request.processes, str(request.out), request.words) == ("mine", 4, "conf/cluster/mine.yaml", ())
    assert fabric.parse([]).name.replace("_", "") == "".join(c for c in socket.gethostname().lower() if c.isalnum())


# ---------------------------------------------------------------- real processes


def _linked() -> dict[str, Links]:
    return links.measure(CPU, ["a", "a", "b", "b"], [64, 4096])


def test_links_inside_and_between():
    found = fork_ranks(4, _linked)
    for rank in found:
        for kind in ("intra", "inter"):
            assert rank[kind].ranks == 2 and [size for size, _ in rank[kind].among_all] == [size for size, _ in rank[kind].to_one] == [
                64,
                4096,
            ]
    assert found[0]["intra"].to_one == found[3]["intra"].to_one and all(seconds > 0 for _, seconds in found[0]["inter"].to_one)
    [(size, _)] = fork_ranks(3, links.measure, CPU, ["a"] * 3, [100])[0]["intra"].among_all
    assert size == 200  # what a rank keeps crosses nothing


def test_two_processes(monkeypatch, tmp_path, capsys):
    """The whole command, with fewer kernels and smaller messages. It replaces what was measured before."""

    def some(device, precisions, rates):
        return [*probes._products(False, ("fp32",), rates), *list(probes._attention(False))[:4], *list(probes._memory())[:14]]

    monkeypatch.setattr(fabric, "every_probe", some)
    monkeypatch.setattr(stack, "SIZES", stack.SIZES[:3])
    monkeypatch.setattr(stack, "STEPS", 4)
    monkeypatch.setattr(fabric, "SHARING", (2,))
    monkeypatch.setattr(fabric, "COPY_BYTES", (1 << 16,))
    monkeypatch.setattr(fabric, "_busy", partial(fabric._busy, 0.1))
    monkeypatch.setattr(links, "measure", partial(links.measure, sizes=[64, 1 << 16]))
    monkeypatch.setattr(links, "beside", partial(links.beside, size=1 << 16))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "cluster" / "mine.yaml"
    out.parent.mkdir()
    out.write_text(f"{cluster_file.MARK} yesterday")
    assert fabric.main([f"out={out}", "processes=2", "cluster.price_per_gpu_hour=0.5"]) == exit_codes.OK
    cluster = load(["cluster=mine"], tmp_path).cluster
    assert cluster.name == "mine" and cluster.price_per_gpu_hour == 0.5 and set(cluster.peak_tflops) == {"fp32"}
    assert all(share > 0 for share in cluster.rates.memory.values()) and 0 < cluster.rates.intra_node <= 1
    assert "core sharing" in out.read_text() and f"wrote {out}" in capsys.readouterr().out
