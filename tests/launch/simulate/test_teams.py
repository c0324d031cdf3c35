"""What a plan says of other software: teams of GPUs, gathered weights, reductions beside backward, FP8 with a scale for each tensor."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shoestring.conf.compose import load
from shoestring.conf.errors import ConfigError
from shoestring.launch.simulate import project_step
from shoestring.launch.simulate.rates import Rates
from shoestring.launch.simulate.teams import as_teams, beside_gathers, gather_seconds, team_seconds
from shoestring.launch.validate import validate
from shoestring.train import cost

# Dense, two stages on four ranks: with pipelines, reductions and a head.
WORDS = ("model=llama3_405b", "model.num_layers=4", "model.num_dense_layers=4", "cluster=h100", "precision=bf16", "data=synthetic",
         "data.seq_len=4096", "parallel.pp=2", "parallel.edp=2", "train.global_batch_tokens=65536")  # fmt: skip


def step(*words: str):
    return project_step(load([*WORDS, *words]), terms=False)


def rates_of(config) -> Rates:
    teams = as_teams(config)
    return Rates(cluster=teams.cluster, linear="bf16", plain="bf16")


def test_what_a_team_sends_is_its_share_of_the_tokens_over_its_own_links():
    """Sequence parallelism: each of 4 gathers the other 3 quarters of 4096 x 16384 BF16 numbers, twice a phase: before and after."""
    config = load([*WORDS, "stack.tensor=4"])
    c = config.cluster
    bare = 2 * (4096 * 16384 * 2 * 3 / 4 / (c.intra_node_gb_s * 1e9 * c.rates.intra_node) + c.rates.intra_latency_us * 1e-6)
    found = team_seconds(config, rates_of(config), "attention")
    assert found == {"F": pytest.approx(bare), "B": pytest.approx(bare)}
    again = load([*WORDS, "stack.tensor=4", "train.recompute=[experts]"])
    assert team_seconds(again, rates_of(again), "mlp") == {"F": pytest.approx(bare), "B": pytest.approx(2 * bare)}
    both = load([*WORDS, "stack.tensor=4", "stack.context=2"])
    assert team_seconds(both, rates_of(both), "mlp")["F"] < 0.52 * bare  # of half the tokens; as late
    assert team_seconds(config, rates_of(config), "experts") == {} == team_seconds(load(WORDS), rates_of(load(WORDS)), "attention")


def test_a_team_computes_as_fast_as_its_members_together():
    """Wide products, so that tiles fill all SMs: compute takes a quarter, and what members send stands beside it."""
    alone, four = step(), step("stack.tensor=4")
    config = load([*WORDS, "stack.tensor=4"])
    sent = {name: sum(team_seconds(config, rates_of(config), name).values()) for name in ("attention", "mlp", "embed", "head")}
    micro_batches = 8
    mean = micro_batches * (4 * (sent["attention"] + sent["mlp"]) + sent["embed"] + sent["head"]) / 2  # of two stages
    assert four.parts["compute"] - mean == pytest.approx(alone.parts["compute"] / 4, rel=0.03)
    assert cost.num_devices(config) == 4 * cost.num_devices(load(WORDS)) == 16


def test_links_and_memory_of_a_team_are_its_members():
    plain, teams = load(WORDS).cluster, as_teams(load([*WORDS, "stack.tensor=2", "stack.context=2"])).cluster
    assert (teams.gpus_per_node, teams.inter_node_gb_s, teams.memory_tb_s) == (2, 4 * plain.inter_node_gb_s, 4 * plain.memory_tb_s)
    assert teams.peak_tflops["bf16"] == 4 * plain.peak_tflops["bf16"] and teams.rates.sms == 4 * plain.rates.sms


@given(alone=st.floats(1e-3, 1), slower=st.floats(1, 2), gathered=st.floats(0, 3))
def test_gathers_beside_compute(alone, slower, gathered):
    """A phase ends when both have: compute at its own rate and, while weights travel, at the rate that it has beside them."""
    done = min(gathered, alone * slower) / slower  # of the compute, meanwhile
    assert alone + beside_gathers(alone, alone * slower, gathered) == pytest.approx(gathered + max(0.0, alone - done))


def test_sharded_weights_travel_with_each_block():
    """In both passes, in BF16, and their gradients once, in FP32: so much over NVLink between two GPUs of a node."""
    config = load([*WORDS, "stack.sharded_weights=true"])
    link = config.cluster.intra_node_gb_s * 1e9 * config.cluster.rates.intra_node
    found, late = gather_seconds(config, rates_of(config), dense=10**9, experts=0), config.cluster.rates.intra_latency_us * 1e-6
    assert found["F"] == pytest.approx(2e9 / 2 / link + late) and found["B"] == pytest.approx((2e9 + 4e9) / 2 / link + 2 * late)
    whole, shards = step(), step("stack.sharded_weights=true")
    assert shards.parts["reduce"] == 0 < whole.parts["reduce"]
    assert shards.parts["compute"] > whole.parts["compute"]


def test_a_reduction_beside_backward_saves_at_most_itself():
    bare, beside = step(), step("stack.overlap_reduce=true")
    assert bare.ideal - bare.parts["reduce"] <= beside.ideal < bare.ideal
    slow = "cluster.inter_node_gb_s=0.001", "cluster.gpus_per_node=1"  # never done within a backward
    assert step(*slow, "stack.overlap_reduce=true").parts["reduce"] > 0.9 * step(*slow).parts["reduce"]


def test_weight_gradients_of_plain_scales_are_as_fast_as_the_rest():
    fp8 = "precision=fp8"
    assert step(fp8, "stack.block_scales=false").parts["compute"] < 0.95 * step(fp8).parts["compute"]
    assert step("stack.block_scales=false").ideal == step().ideal


@pytest.mark.parametrize("word", ["tensor=2", "context=2", "sharded_weights=true", "overlap_reduce=true"])
def test_no_run_of_ours_starts_with_it(word):
    config = load([*WORDS, f"stack.{word}"])
    validate(config)
    with pytest.raises(ConfigError, match=f"stack.{word.split('=')[0]}.*none of ours starts"):
        validate(config, config.parallel.world_size)
