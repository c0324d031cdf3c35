"""A layout for whatever number of ranks is left, and which ends torchrun's restarts are kept from."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shoestring.conf import rules
from shoestring.conf.compose import load
from shoestring.conf.errors import ConfigError
from shoestring.launch import elastic, exit_codes
from shoestring.launch.environment import Place
from shoestring.launch.local import fork_ranks
from shoestring.launch.validate import validate
from shoestring.train import trainer
from shoestring.train.metrics import read_records

SMALL = [
    "data=synthetic", "data.seq_len=16", "model.vocab_size=300", "model.dim=32", "model.num_layers=2", "model.dense_hidden_dim=48",
    "model.expert_hidden_dim=24", "optim.warmup_steps=2", "train.eval_sequences=8",
]  # fmt: skip
CONFIG = load(
    [*SMALL, "train.global_batch_tokens=768", "train.micro_batch_sequences=4", "parallel.pp=2", "parallel.ep=2", "parallel.edp=3"]
)


@settings(max_examples=60)
@given(
    world=st.integers(1, 70), pp=st.sampled_from([1, 2]), ep=st.sampled_from([1, 2, 4]), edp=st.sampled_from([1, 2, 3, 8]),
    sequences=st.sampled_from([48, 60, 64]), micro=st.sampled_from([1, 2, 4, 6]),
)  # fmt: skip
def test_it_fits_or_it_cannot(world, pp, ep, edp, sequences, micro):
    config = CONFIG
    for name, value in (
        ("parallel.pp", pp), ("parallel.ep", ep), ("parallel.edp", edp), ("train.micro_batch_sequences", micro),
        ("train.global_batch_tokens", 16 * sequences),
    ):  # fmt: skip
        config = rules.replaced(config, name, value)
    # By hand: whole pipelines and expert groups, and as many sequences for each replica, cut into micro-batches of a divisor of `micro`.
    possible = world % (pp * ep) == 0 and sequences % (world // pp) == 0
    try:
        found = elastic.fitting(config, world)
    except ConfigError as error:
        assert not possible and error.field == "number of processes" and (error.nearest is None or error.nearest % (pp * ep) == 0)
        return
    p = found.parallel
    assert (p.pp, p.ep, p.world_size) == (pp, ep, world)
    assert found.train.global_batch_tokens == config.train.global_batch_tokens
    if world == pp * ep * edp:
        assert found is config
    else:
        assert possible
        validate(found, world)
        fits = [n for n in range(1, micro + 1) if micro % n == 0 and (sequences // (world // pp)) % n == 0]
        assert found.train.micro_batch_sequences == max(fits)


def test_phases_are_fitted_one_by_one():
    config = load([*SMALL, "train.global_batch_tokens=256", "parallel.edp=4", "phases.a.train.steps=2", "phases.b.train.steps=2",
                   "phases.b.train.global_batch_tokens=512"])  # fmt: skip
    found = elastic.fitting(config, 2)
    assert [(phase.parallel.edp, phase.num_micro_batches) for phase in found.phases.values()] == [(2, 8), (2, 16)]
    rules.check(found)


def test_only_where_it_is_wished(capsys):
    place = Place(rank=0, world_size=4)
    assert elastic.fitted(CONFIG, place) is CONFIG and capsys.readouterr().out == ""
    found = elastic.fitted(rules.replaced(CONFIG, "launch.elastic", True), place)
    assert found.parallel.edp == 1
    assert "4 processes for a layout of 12: parallel.edp=1 instead of 3" in capsys.readouterr().out


def _train(config):
    trainer.run(config, torch.device("cpu"), log=lambda line: None)


def test_the_run_goes_on_with_fewer_as_it_would_have(tmp_path):
    words = [*SMALL, "parallel.edp=2", "parallel.ep=2", "train.steps=4", "checkpoint.interval=2", "train.global_batch_tokens=256",
             f"data.cache_dir={tmp_path / 'cache'}", "train.micro_batch_sequences=2"]  # fmt: skip
    fork_ranks(4, _train, load([*words, f"run_dir={tmp_path / 'whole'}"]))
    lost = load([*words, f"run_dir={tmp_path / 'lost'}", "train.stop_after=2"])
    fork_ranks(4, _train, lost)
    fork_ranks(2, _train, elastic.fitting(lost, 2))
    whole, got = (read_records(tmp_path / name / "metrics.jsonl") for name in ("whole", "lost"))
    assert [r.step for r in got] == [1, 2, 3, 4] and [r.tokens for r in got] == [r.tokens for r in whole]
    for one, other in zip(got, whole):
        assert one.loss == pytest.approx(other.loss, rel=1e-6)


@pytest.fixture
def restarts(tmp_path, monkeypatch):
    """Restart `number` of a rank of an agent whose notes are in `tmp_path`: what it ends with, and whether it has run at all."""
    monkeypatch.setattr(elastic.tempfile, "gettempdir", lambda: str(tmp_path))

    def one(number, code, rank=1):
        ran = []
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", str(number))
        config = rules.replaced(CONFIG, "run_dir", str(tmp_path / "run"))
        return elastic.run_rank(config, Place(rank=rank, world_size=2), lambda *_: ran.append(1) or code, []), bool(ran)

    return one


@pytest.mark.parametrize("code", [exit_codes.PREEMPTED, exit_codes.DATA, exit_codes.DIVERGED, exit_codes.STORAGE, exit_codes.BUDGET])
def test_an_end_that_no_restart_betters_stays(restarts, code):
    assert restarts(0, code) == (code, True)
    assert restarts(1, exit_codes.OK, rank=0) == (code, False)


def test_a_loss_is_restarted(restarts):
    assert restarts(0, exit_codes.LOST, rank=0) == (exit_codes.LOST, True)
    assert restarts(1, exit_codes.OK, rank=0) == (exit_codes.OK, True)
