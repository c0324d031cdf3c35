"""What a stack's phases add to a step, and processes that share the cores of one machine."""

import pytest
from shoestring.conf.compose import load
from shoestring.conf.errors import ConfigError
from shoestring.launch.simulate import project_step

# Links between "nodes" as those inside one.
USUAL = ["experiment=tiny", "stack.peer_wait=0", "cluster.rates.inter_latency_us=10", "cluster.rates.inter_node=0.94"]


def projected(*words):
    config = load([*USUAL, *words])
    return config, project_step(config, terms=False)


def test_host_and_times_of_a_phase():
    alone = ("parallel.pp=1", "parallel.ep=1")
    config, plain = projected(*alone)
    num, layers = config.num_micro_batches, config.model.num_layers
    _, waits = projected(*alone, "+stack.phases.attention_B={host_us: 500}")
    assert waits.ideal - plain.ideal == pytest.approx(num * layers * 500e-6)
    blocks = [f"+stack.phases.{name}_{when}={{times: 3}}" for name in ("attention", "experts", "mlp") for when in "FBW"]
    ends = [f"+stack.phases.{name}_{when}={{times: 3}}" for name in ("embed", "head") for when in "FBW"]
    _, longer = projected(*alone, *blocks, *ends)
    assert longer.parts["compute"] == pytest.approx(3 * plain.parts["compute"]) and longer.parts["optimizer"] == plain.parts["optimizer"]
    split = ("parallel.pp=1", "parallel.ep=2")
    config, plain = projected(*split)
    _, later = projected(*split, "+stack.phases.exchange={host_us: 200}")
    routed = layers - config.model.num_dense_layers  # four exchanges; half of backward's are under weight gradients, if those are long
    assert 2 * routed <= (later.ideal - plain.ideal) / (config.num_micro_batches * 200e-6) <= 4 * routed + 1e-6


def test_a_phase_that_is_none():
    with pytest.raises(ConfigError, match="attention_F"):
        projected("+stack.phases.atention_F={times: 2}")


def test_processes_take_turns_on_cores():
    """All busy: half as fast on half of the cores. Of two stages and one micro-batch, one waits for the other: one core is enough."""
    of_cores = lambda cores, *words: projected(f"cluster.gpus_per_node={cores}", *words)[1]
    busy = "parallel.pp=1", "parallel.ep=4"
    assert of_cores(2, *busy).ideal == pytest.approx(2 * of_cores(4, *busy).ideal, rel=0.03)  # exchanges share nothing
    stages = "parallel.pp=2", "parallel.ep=1", "train.global_batch_tokens=1024", "stack.host_us_per_step=0"
    one, two = of_cores(1, *stages), of_cores(2, *stages)
    assert one.parts["compute"] == pytest.approx(two.parts["compute"], rel=0.02)
    assert sum(one.parts.values()) == pytest.approx(one.ideal)
    many = of_cores(1, *stages, "train.global_batch_tokens=16384"), of_cores(2, *stages, "train.global_batch_tokens=16384")
    assert many[0].ideal > 1.7 * many[1].ideal
