"""How much a rank does before its first step, counted and not timed: nothing grows faster with the world than it must."""

import collections
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from shoestring.conf.schema import ParallelConfig
from shoestring.launch.local import fork_ranks
from shoestring.parallel import world
from shoestring.parallel.groups import Mesh

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "startup.py"
_spec = importlib.util.spec_from_file_location("startup", SCRIPT)
startup = sys.modules["startup"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(startup)
LAYOUTS, fit = startup.LAYOUTS, startup.fit
NAMES = 12  # of groups that a rank is in, at most (tests/scale/test_ranks.py)


@pytest.mark.parametrize("size", LAYOUTS)
@pytest.mark.parametrize("splits", [True, False], ids=["nccl", "gloo"])
def test_calls_that_make_a_ranks_groups(monkeypatch, size, splits):
    """NCCL: one for each name, whatever the world. gloo: one for each group of the world, whose number is linear in it."""
    pp, edp, ep = LAYOUTS[size]
    calls = []
    monkeypatch.setattr(world, "_on_gpu", lambda: splits)
    monkeypatch.setattr(world, "SPLITS_BY_BACKEND", True)
    monkeypatch.setattr(dist, "get_world_size", lambda: size)
    monkeypatch.setattr(dist, "get_rank", lambda: size - 1)
    monkeypatch.setattr(dist, "split_group", lambda *, split_ranks, **_: calls.append(sum(map(len, split_ranks))))
    monkeypatch.setattr(dist, "new_group", lambda ranks, **_: calls.append(len(ranks)))
    Mesh.create(ParallelConfig(pp=pp, edp=edp, ep=ep), size - 1, embeds_at_head=True)
    assert sum(calls) <= NAMES * size, "a rank is named more than once for each name"
    assert len(calls) <= (NAMES if splits else 3 * size)


class _Counting(dist.Store):
    """A store that counts what it is asked for."""

    def __init__(self, store):
        super().__init__()
        self.store, self.calls = store, collections.Counter()

    def _ask(self, name, *args):
        self.calls[name] += 1
        return getattr(self.store, name)(*args)

    def set(self, *args):
        return self._ask("set", *args)

    def get(self, *args):
        return self._ask("get", *args)

    def add(self, *args):
        return self._ask("add", *args)

    def wait(self, *args):
        return self._ask("wait", *args)

    def check(self, *args):
        return self._ask("check", *args)


def _count(folder):
    """In ranks that have met by another way: store operations of joining, of a pair's group, and of one of all."""
    rank, size = dist.get_rank(), dist.get_world_size()
    dist.barrier()  # whoever leaves while others still connect to it is an error of theirs
    world.leave()
    store = _Counting(dist.FileStore(f"{folder}/{size}", size))
    counts = []
    for step in (
        lambda: world.join(store=store, rank=rank, world_size=size, timeout_s=30),
        lambda: world.part("pairs", [[n, n + 1] for n in range(0, size, 2)]),
        lambda: world.on_hosts("all"),
    ):
        before = store.calls.total()
        step()
        counts.append(store.calls.total() - before)
    dist.barrier()
    return counts


def test_store_operations_of_a_rank(tmp_path):
    """A join and a group ask for each member once (to wait for it, and to read it), and publish themselves: linear in the members, whatever
    the world. In particular no group waits at a barrier of the world, which has 1,361 groups in DeepSeek-V3's layout."""
    found = {size: fork_ranks(size, _count, tmp_path) for size in (2, 4, 8)}
    for size, counts in found.items():
        assert max(join for join, _, _ in counts) <= 2 * size + 2
        assert max(group for _, _, group in counts) <= 2 * size + 2
    pairs = {pair for counts in found.values() for _, pair, _ in counts}
    assert len(pairs) == 1 and pairs.pop() <= 6


def test_what_a_rank_imports():
    """Libraries that only some runs use: thousands of ranks would read thousands of files each for nothing."""
    unused = ["datasets", "pandas", "huggingface_hub", "deepspeed", "transformers", "wandb"]
    unused += ["torch.distributed.pipelining", "torch._inductor"]
    code = f"import sys, shoestring.launch.launcher, shoestring.launch.worker; print([m for m in {unused} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert out.stdout == "[]\n", out.stdout + out.stderr


@pytest.mark.parametrize(
    ("shape", "seconds", "there"),
    [("constant", lambda n: 3.0, 3.0), ("linear", lambda n: 0.5 + 0.01 * n, 20.98), ("log", lambda n: 0.1 + 0.2 * n.bit_length(), 2.5)],
)
def test_growth_is_recognised(shape, seconds, there):
    name, value = fit({n: seconds(n) for n in (4, 8, 16, 32, 64)}, 2048)
    assert name == shape and value == pytest.approx(there, rel=1e-3)


def test_noise_is_no_growth():
    assert fit({4: 1.3, 8: 1.27, 16: 1.32, 32: 1.29, 64: 1.3}, 256)[0] == "constant"
