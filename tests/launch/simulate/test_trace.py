"""What the simulator makes of DeepSeek's published profile: H800, EP 64, 4,096 tokens, four MoE layers forward beside four backward.

Microseconds per layer, and of the pair, as measured from profile-data's training trace.
"""

import pytest
from shoestring.conf.compose import load
from shoestring.launch.simulate.actions import RankCosts
from shoestring.launch.simulate.rates import Rates
from shoestring.launch.simulate.stage import Compute, Load, stages
from shoestring.parallel.schedule import Op
from shoestring.train.block_ops import Call

WORDS = "experiment=deepseek_v3 precision=fp8 parallel.dispatcher=deepep stack=deepseek_v3 data=synthetic"
PHASES = {
    ("attention", "F"): 4370, ("attention", "B"): 9341, ("attention", "W"): 2388,
    ("experts", "F"): 4604, ("experts", "B"): 5306, ("experts", "W"): 5063,
}  # fmt: skip
PAIR = 129_000
# Of products beside exchanges, by (rows, K, columns): those of attention forward in sum, and of the experts.
PRODUCTS = {
    "attention": ([(4096, 7168, 2112), (4096, 1536, 24576), (4096, 512, 32768), (4096, 16384, 7168)], 1, 1673),
    "routed experts": ([(32768, 7168, 4096), (32768, 2048, 7168)], 4, 2898),
    "shared expert": ([(4096, 7168, 4096), (4096, 2048, 7168)], 1, 397),
}


@pytest.fixture(scope="module")
def profile():
    c = load(WORDS.split())
    rates = Rates(cluster=c.cluster, linear="fp8", plain="bf16")
    made = stages(c, rates, Load(), [range(3, 7), range(7, 11), range(11, c.model.num_blocks)])
    return c, rates, made


def test_phases(profile):
    _, _, made = profile
    for step in made[1][:4]:
        if isinstance(step, Compute):
            for when in "FBW":
                assert step.of(when, True).seconds * 1e6 == pytest.approx(PHASES[step.name, when], rel=0.05), (step.name, when)


def test_the_pair(profile):
    c, _, made = profile
    pair = RankCosts(made, hidden=c.stack.hidden, peer_wait=c.stack.peer_wait)._pair((Op("F", 1, 0), Op("B", 1, 1)))
    assert pair.seconds * 1e6 == pytest.approx(PAIR, rel=0.02)


@pytest.mark.parametrize("name", PRODUCTS)
def test_products(profile, name):
    shapes, matrices, measured = PRODUCTS[name]
    calls = [Call("", "F", "grouped_matmul", 0, 2 * m * k * n, m, k, n, matrices) for m, k, n in shapes]
    assert sum(profile[1].seconds(call, beside=True) for call in calls) * 1e6 == pytest.approx(measured, rel=0.07)
