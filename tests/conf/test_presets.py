"""What the shipped clusters and the budget ladder are, against their own claims and published figures."""

import re
from importlib import resources

import pytest
import yaml
from shoestring.conf.compose import load
from shoestring.conf.schema import ClusterConfig, RatesConfig
from shoestring.launch.validate import validate
from shoestring.train import cost

CLUSTERS = ["a100", "b200", "gb200", "gb300", "h100", "h20", "h200", "h800", "mi300x", "rtx4090"]
# Experiment: GPUs, billions of parameters and of active ones, tokens, micro-batches of a pipeline.
LADDER = {
    "ladder_1": (1, 0.295, 0.088, 2e9, 16),
    "ladder_8": (8, 2.70, 0.45, 200e9, 16),
    "ladder_64": (64, 15.96, 2.58, 2e12, 64),
    "ladder_2048": (2048, 671.03, 36.63, 14.8e12, 120),
}


def text(name: str) -> str:
    return (resources.files("shoestring.conf") / "cluster" / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", CLUSTERS)
def test_a_cluster_says_everything_itself(name):
    """No rate of a GPU is left to the schema's defaults, which are another's; FP8 apart, where a device has none."""
    written = yaml.safe_load(text(name))
    assert set(written) | {"env", "pin", "threads"} == set(ClusterConfig.__dataclass_fields__)  # what ranks are told is no figure
    assert set(written["rates"]) == set(RatesConfig.__dataclass_fields__)
    kinds = RatesConfig()
    assert set(written["rates"]["memory"]) == set(kinds.memory) and set(written["rates"]["attention"]) == set(kinds.attention)
    made = {kind for kind in kinds.products if kind.removesuffix("_wgrad") in written["peak_tflops"]}
    assert set(written["rates"]["products"]) == set(written["rates"]["products_half"]) == made


@pytest.mark.parametrize("name", CLUSTERS)
def test_what_no_vendor_says_has_a_source(name):
    for field in ("kw_per_gpu", "mttf_gpu_hours", "restart_minutes", "checkpoint_gb_s"):
        assert re.search(rf"^{field}: \S+ # \S", text(name), re.MULTILINE), field
    rates = text(name).split("rates:\n")[1]
    for field in ("launch_us", "exchange_sms", "intra_latency_us", "inter_latency_us"):
        assert re.search(rf"^  {field}: \S+ # \S", rates, re.MULTILINE), field
    for field in ("products", "attention", "memory", "intra_node", "inter_node"):
        assert re.search(rf"^  (#.*\n  {field}:|{field}:.* # \S)", rates, re.MULTILINE), field


@pytest.mark.parametrize("name", CLUSTERS)
def test_no_share_is_above_one(name):
    cluster = load([f"cluster={name}", "precision=bf16"]).cluster
    r = cluster.rates
    shares = [*r.products.values(), *r.attention.values(), *r.memory.values()]
    shares += [r.compute_beside_exchange, r.exchange_beside_compute, r.intra_node, r.inter_node]
    assert all(0 < share <= 1 for share in shares) and r.exchange_sms < r.sms


def test_a_device_without_fp8_is_refused_fp8():
    with pytest.raises(ValueError, match=r"cluster.peak_tflops.*has no peak for precision fp8"):
        load(["cluster=a100", "model=small", "precision=fp8"])


@pytest.mark.parametrize("name", LADDER)
def test_the_ladder(name):
    gpus, params, active, tokens, micro_batches = LADDER[name]
    config = load([f"experiment={name}"])
    validate(config)
    count = cost.num_params(config.model)
    assert (config.parallel.world_size, config.train.tokens, config.num_micro_batches) == (gpus, tokens, micro_batches)
    assert (count.total / 1e9, count.active / 1e9) == pytest.approx((params, active), rel=0.005)


def test_the_dense_model_is_llamas():
    """Parameters of a layer, and FLOPs of its attention, by Llama's own formula: 8 heads of keys and values."""
    m = load(["model=llama3_405b"]).model
    block, dim, hidden = cost.block_params(m, 0), 16384, 53248
    assert (block.attention, block.dense_mlp) == (pytest.approx(2 * dim * dim + 2 * dim * 8 * 128, rel=0.001), 3 * dim * hidden)
    assert block.experts == block.router == block.shared == 0
    assert cost.attention_flops(m, 8191) == 2 * 2 * dim * 8192 / 2
    assert cost.num_params(m).total == pytest.approx(405.85e9, rel=0.001)
    config = load(["experiment=dense_405b"])
    validate(config)
    assert (config.model.name, config.precision.products, config.data.seq_len) == ("llama3_405b", "bf16", 8192)
    assert (config.train.tokens, config.train.global_batch_tokens) == (15.6e12, 2**24)
