"""One update's arithmetic against torch's optimizers and singular values; the average; a missing second moment."""

import logging

import pytest
import torch
import torch.distributed as dist
from shoestring.conf.schema import OptimConfig
from shoestring.launch.local import fork_ranks
from shoestring.parallel.optimizer.average import Average
from shoestring.parallel.optimizer.make import make_optimizer
from shoestring.parallel.optimizer.updates import BLOCK, adamw_, muon_, orthogonal
from shoestring.parallel.optimizer.zero import Spec
from torch import nn

CPU = torch.device("cpu")


def noise(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# ---------------------------------------------------------------- Muon


@pytest.mark.parametrize("shape", [(3, 40, 40), (2, 96, 24), (2, 24, 96), (1, 1, 7)])  # square, tall, wide, a row
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_orthogonal(shape, dtype):
    """The same singular vectors, and singular values near 1, whatever the size of the input, here with values from 1 to 10."""
    left, _, right = torch.linalg.svd(noise(*shape, dtype=torch.float64), full_matrices=False)
    x = left @ torch.diag_embed(torch.linspace(1, 10, left.shape[2], dtype=torch.float64).expand(shape[0], -1)) @ right
    for size in (1e-12, 1.0, 1e6):
        found = orthogonal((size * x).to(dtype)).double()
        values = torch.linalg.svdvals(found)
        assert values.min() > 0.65 and values.max() < 1.25
        inside = left.mT @ found @ right.mT  # diagonal in the input's own bases
        off = inside - torch.diag_embed(inside.diagonal(dim1=1, dim2=2))
        assert off.norm() / inside.norm() < (0.05 if dtype == torch.bfloat16 else 1e-4)
    assert not orthogonal(torch.zeros(shape, dtype=dtype)).any()


@pytest.mark.parametrize("matrices", [((32, 24),), ((10, 24), (16, 24), (6, 24))])
@pytest.mark.parametrize("units", [1, 5])
def test_muon_equals_torch_matrix_by_matrix(matrices, units):
    size = sum(rows * columns for rows, columns in matrices)
    master, momentum = noise(units * size), torch.zeros(units * size)
    split = lambda t: [m.view(s) for unit in t.view(units, size) for m, s in zip(unit.split([r * c for r, c in matrices]), matrices)]
    theirs = [nn.Parameter(m.clone()) for m in split(master)]
    oracle = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    for step in range(3):
        grad = noise(units * size, seed=step)
        for leaf, g in zip(theirs, split(grad)):
            leaf.grad = g.clone()
        oracle.step()
        muon_(master, grad, momentum, matrices, lr=0.02, beta=0.9, weight_decay=0.1, device=CPU)
    for mine, leaf in zip(split(master), theirs):
        assert (mine - leaf).norm() / leaf.norm() < 1e-4
    for mine, leaf in zip(split(momentum), theirs):
        assert torch.allclose(mine, oracle.state[leaf]["momentum_buffer"], rtol=1e-5, atol=1e-7)


def test_an_update_has_the_size_of_adamws():
    """Root mean square about 0.2 learning rates, for every shape (arXiv 2502.16982 §2.2)."""
    for rows, columns in ((64, 64), (256, 32), (32, 256)):
        master = torch.zeros(rows * columns)
        muon_(master, noise(rows * columns), torch.zeros_like(master), ((rows, columns),), lr=1.0, beta=0.95, weight_decay=0.0, device=CPU)
        assert master.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.25)


# ---------------------------------------------------------------- AdamW


@pytest.mark.parametrize("numel", [1, 1000, BLOCK["cpu"], 3 * BLOCK["cpu"] + 17])
def test_narrow_moments_are_rounded_to_the_nearest(numel):
    """Beside torch's AdamW, whose FP32 moments are rounded after each step."""
    wide = nn.Parameter(noise(numel))
    oracle = torch.optim.AdamW([wide], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    master, moments = wide.detach().clone(), [torch.zeros(numel, dtype=torch.bfloat16) for _ in range(2)]
    for step in range(1, 4):
        grad = noise(numel, seed=step)
        wide.grad = grad.clone()
        oracle.step()
        adamw_([master], [grad], *([m] for m in moments), step=step, lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        for key, mine in zip(("exp_avg", "exp_avg_sq"), moments):
            theirs = oracle.state[wide][key]
            rounded = theirs.bfloat16()
            assert (mine == rounded).float().mean() > 0.99 or numel == 1  # the kernels' last bits differ, seldom across a border
            assert torch.allclose(mine.float(), rounded.float(), rtol=2**-7)
            theirs.copy_(mine)
        assert torch.allclose(master, wide.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("beta2, falls", [(0.99, True), (0.999, False)])
def test_why_beta2_is_bounded(beta2, falls):
    """Gradients that stop: a BF16 second moment decays at 0.99, and never at 0.999."""
    master, first, second = noise(1000), torch.zeros(1000, dtype=torch.bfloat16), torch.ones(1000, dtype=torch.bfloat16)
    for step in range(1, 1001):
        adamw_([master], [torch.zeros(1000)], [first], [second], step=step, lr=0.0, betas=(0.9, beta2), eps=1e-8, weight_decay=0.0)
    assert bool((second < 0.01).all()) == falls and bool((second == 1).all()) != falls


# ---------------------------------------------------------------- the average


def test_average_begins_at_the_masters_and_follows():
    masters = {"a": noise(100), "b": noise(7)}
    average, expected = Average(masters, 0.9), {n: m.clone() for n, m in masters.items()}
    assert all(t.isnan().all() for t in average.read().values())
    for step in range(5):
        average.begin()
        for n, m in masters.items():
            m += noise(len(m), seed=step)
            expected[n] = 0.9 * expected[n] + 0.1 * m
        average.update()
    assert all(torch.allclose(t, expected[n], rtol=1e-5, atol=1e-6) for n, t in average.read().items())


def test_average_keeps_what_was_loaded():
    masters = {"a": noise(3), "b": noise(3)}
    average = Average(masters, 0.9)
    average.read()["a"].fill_(5.0)
    average.begin(anew=True)
    assert (average.read()["a"] == 5).all() and torch.equal(average.read()["b"], masters["b"])


def test_an_average_waits_before_masters_change():
    """A thread that has not started reads the masters of its own step."""
    import threading

    masters = {"a": torch.zeros(3)}
    average, gate = Average(masters, 0.5), threading.Event()
    average.begin()
    masters["a"].fill_(4.0)
    average._thread.submit(gate.wait)
    average.update()
    threading.Timer(0.2, gate.set).start()
    average.begin()
    masters["a"].fill_(100.0)
    assert (average.read()["a"] == 2).all()


# ---------------------------------------------------------------- state that is missing


def test_a_missing_second_moment_is_said_and_ends_the_first():
    def body():
        said = []
        handler = logging.Handler()
        handler.emit = lambda record: said.append(record.getMessage())
        logging.getLogger("shoestring.parallel.optimizer.zero").addHandler(handler)
        specs = [Spec(name=n, param=nn.Parameter(torch.ones(8)), group=dist.group.WORLD, numel=8) for n in ("old", "new", "idle")]
        optimizer = make_optimizer(OptimConfig(lr=0.0), specs)
        state = {name: c.data for name, c in optimizer.state().items()}
        for name in ("old.exp_avg", "old.exp_avg_sq", "new.exp_avg"):
            state[name].fill_(1.0)
        optimizer.load_state(10)
        return said, {name: t.sum().item() for name, t in state.items()}

    ((said, sums),) = fork_ranks(1, body)
    assert said == ["no second moment in the checkpoint for 1 weights (new ...): AdamW starts anew there"]
    assert sums["old.exp_avg"] == sums["old.exp_avg_sq"] == 8 and sums["new.exp_avg"] == 0
