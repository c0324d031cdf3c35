"""Stopped or killed at any step and started again, a run is bit for bit the run that was not; on another layout it agrees to 1e-6.

Also: no sample is lost or repeated, a run directory is refused to another model or stream, and what a run leaves behind.
"""

import functools
import json
import math
import os

import pytest
import torch
from shoestring.conf.compose import load, load_saved
from shoestring.conf.schema import ConfigError
from shoestring.launch.local import RankFailed, fork_ranks
from shoestring.train import trainer
from shoestring.train.data.corpus import open_corpus
from shoestring.train.metrics import read_records
from shoestring.train.sample import load as load_run

STEPS = 6
BASE = [
    "data=synthetic", "data.seq_len=16", "model.vocab_size=300", "model.dim=32", "model.num_layers=3", "model.dense_hidden_dim=48",
    "model.expert_hidden_dim=24", "train.global_batch_tokens=256", "train.micro_batch_sequences=4", f"train.steps={STEPS}",
    "train.eval_interval=3", "train.eval_sequences=10", "optim.warmup_steps=2", "checkpoint.interval=2",
    "data.sources.synthetic.num_documents=300",
]  # fmt: skip


@pytest.fixture
def words(tmp_path, tmp_path_factory):
    cache = tmp_path_factory.getbasetemp() / "cache"
    return lambda name, *more: [*BASE, f"data.cache_dir={cache}", f"run_dir={tmp_path / name}", *more]


class RecordingCorpus:
    """A corpus that notes which training samples were read."""

    def __init__(self, corpus, read):
        self._corpus, self._read = corpus, read

    def __getattr__(self, name):
        return getattr(self._corpus, name)

    def train(self, indices, phase=0):
        self._read.append([int(i) for i in indices])
        return self._corpus.train(indices, phase)


def job(overrides, die_at=None):
    """One session; (outcome, samples read in each step by this rank, its place). `die_at`: end without a word before that step."""
    config, calls, read = load(overrides), [], []

    def stop():
        calls.append(None)
        if die_at is not None and len(calls) == die_at:
            os._exit(9)
        return False

    open_corpus = trainer.open_corpus
    trainer.open_corpus = lambda *args, **kwargs: RecordingCorpus(open_corpus(*args, **kwargs), read)
    outcome = trainer.run(config, torch.device("cpu"), stop=stop, log=lambda line: None)
    return outcome, read


def session(overrides, **kwargs):
    world = load(overrides).parallel.world_size
    return fork_ranks(world, job, overrides, *kwargs.values())


def curve(overrides):
    """What each step computed, exactly."""
    records = read_records(os.path.join(load(overrides).run_dir, "metrics.jsonl"))
    return [(r.step, r.tokens, r.loss, r.grad_norm, r.lr, r.eval_loss, r.balance_loss, r.bias_norm, r.expert_load) for r in records]


LAYOUTS = [[], ["parallel.pp=2", "parallel.ep=2"]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The curve of a run that nothing happens to, by layout; trained when it is first asked for."""

    @functools.cache
    def of(*layout):
        run = [*BASE, f"data.cache_dir={tmp_path_factory.getbasetemp() / 'cache'}", f"run_dir={tmp_path_factory.mktemp('whole')}", *layout]
        session(run)
        return curve(run)

    return of


@pytest.mark.parametrize("layout", LAYOUTS, ids=["one process", "pp 2 x ep 2"])
def test_stopped_after_any_step(words, whole, layout):
    expected = whole(*layout)
    assert [row[0] for row in expected] == list(range(1, STEPS + 1)) and expected[-1][2] < expected[0][2]
    for step in range(1, STEPS) if not layout else (1, 4):
        run = words(f"stopped{step}", *layout)
        first = session([*run, f"train.stop_after={step}"])[0][0]
        assert first.step == step and not first.stopped
        session(run)
        assert curve(run) == expected


@pytest.mark.parametrize("layout, deaths", [(LAYOUTS[0], (2, 4, 6)), (LAYOUTS[1], (4,))], ids=["one process", "pp 2 x ep 2"])
def test_killed(words, whole, layout, deaths):
    """Without a word, after steps that no checkpoint holds: they are done again, and what was lost is kept apart."""
    for death in deaths:
        run = words(f"killed{death}", *layout)
        with pytest.raises(RankFailed, match="exit code 9"):
            session(run, die_at=death)
        session(run)
        assert curve(run) == whole(*layout)


CHAIN = ["parallel.pp=2 parallel.ep=2", "parallel.edp=2", "parallel.ep=4", "parallel.pp=3 optim.engine=deepspeed", "parallel.pp=1"]


def test_another_layout_each_session(words, whole):
    """Losses agree to 1e-6 with one process, and the stream of samples goes on without a gap or a repeat."""
    run, seen, losses = words("moved"), [], []
    for layout in CHAIN:
        ranks = session([*run, *layout.split(), "train.stop_after=1"])
        pp = load([*run, *layout.split()]).parallel.pp
        per_stage = len(ranks) // pp
        for step in range(len(ranks[0][1])):
            stages = [sorted(i for rank in ranks[s * per_stage : (s + 1) * per_stage] for i in rank[1][step]) for s in range(pp)]
            assert all(stage == stages[0] for stage in stages), "stages read different samples"
            seen += stages[0]
    losses = [row[2] for row in curve(run)]
    assert seen == list(range(16 * len(CHAIN)))
    for got, row in zip(losses, whole()):
        assert abs(got / row[2] - 1) < 1e-6


def test_sigterm_is_agreed_on(words, whole):
    """One rank is asked to stop: all end the same step, with a checkpoint."""
    run = words("asked", "parallel.edp=2")
    ranks = fork_ranks(2, asked, run)
    assert [(o.step, o.stopped) for o in ranks] == [(3, True)] * 2
    session(run)
    assert curve(run) == whole("parallel.edp=2")


def asked(overrides):
    rank, calls = torch.distributed.get_rank(), []

    def stop():
        calls.append(None)
        return rank == 1 and len(calls) == 3

    return trainer.run(load(overrides), torch.device("cpu"), stop=stop, log=lambda line: None)


def test_what_a_run_leaves(words):
    run = words("left")
    outcome = session(run)[0][0]
    config = load(run)
    files = {p.name for p in os.scandir(config.run_dir)}
    assert files >= {"config.yaml", "metrics.jsonl", "summary.json", "tokenizer.json", "checkpoints"}
    assert load_saved(f"{config.run_dir}/config.yaml") == config
    with open(f"{config.run_dir}/summary.json") as file:
        summary = json.load(file)
    records = read_records(f"{config.run_dir}/metrics.jsonl")
    assert summary["steps"] == STEPS == outcome.step and summary["tokens"] == STEPS * 256 == records[-1].tokens
    assert summary["loss_first"] == records[0].loss and summary["loss_last"] == records[-1].loss
    assert summary["eval_loss"] == records[-1].eval_loss and summary["world_size"] == 1
    assert all(sum(map(sum, r.expert_load)) == 256 * config.model.top_k * config.model.num_moe_layers for r in records)
    assert session(run)[0][0].step == STEPS, "a finished run, started again, does nothing"
    assert read_records(f"{config.run_dir}/metrics.jsonl") == records


@pytest.mark.parametrize(
    "change, message",
    [("model.route_scale=1.0", "model.route_scale"), ("train.seed=1", "train.seed"), ("checkpoint.resume=never", "checkpoint.resume")],
)
def test_another_run_in_the_directory_is_refused(words, change, message):
    run = words("taken", "train.stop_after=1")
    session(run)
    with pytest.raises(RankFailed, match=f"ConfigError: {message}"):
        session([*run, change])
    session(words("taken", "train.stop_after=1"))  # and nothing is lost


def test_resume_path_that_is_not_there(words):
    with pytest.raises(RankFailed, match="must be auto, never, or an existing checkpoint or run directory"):
        session(words("new", "checkpoint.resume=/no/such/folder"))
    assert issubclass(ConfigError, ValueError)


def test_other_ids_are_refused(words):
    """A tokenizer that gives other ids to the same text would go on with a model that knows another language."""
    run = words("ids", "optim.warmup_steps=1", "phases.a.train.steps=1", "phases.b.train.steps=5", "phases.b.data.seq_len=8")
    session([*run, "train.stop_after=1"])
    with pytest.raises(RankFailed, match=r"data\.tokenizer\.kind = bpe: its ids are not those that "):
        session([*run, "data.tokenizer.kind=bpe"])  # in phase b, which reads another stream of samples
    session(run)


def test_what_may_change_is_told(words):
    run = words("longer", "train.stop_after=1")
    session(run)
    lines = fork_ranks(1, told, [*run, "model.yarn.factor=4", "model.max_seq_len=1024"])[0]
    assert [line for line in lines if "from here on" in line] == [
        "model.max_seq_len is 1024 from here on; step_00000001 was trained with 512",
        "model.yarn.factor is 4 from here on; step_00000001 was trained with 1",
    ]


@pytest.mark.parametrize("value_dim, padded", [(32, ", values padded by 16 columns: 20% more work"), (48, "")])
def test_the_attention_kernel_is_told(words, value_dim, padded):
    """Keys of 48 columns: 48 + 48 instead of 48 + 32."""
    heads = ["model.qk_nope_head_dim=32", "model.qk_rope_head_dim=16", f"model.v_head_dim={value_dim}"]
    assert f"attention by flash{padded}" in fork_ranks(1, told, words(f"heads{value_dim}", "train.stop_after=1", *heads))[0]


def told(overrides):
    lines = []
    trainer.run(load(overrides), torch.device("cpu"), log=lines.append)
    return lines


MIXED = [
    "data.sources.synthetic.weight=3", "data.sources.more.kind=synthetic", "data.sources.more.num_documents=900", "train.eval_interval=0",
    "train.steps=2", "train.eval_sequences=13",
]  # fmt: skip


def scored(overrides):
    """(the record's evaluation, the same by one model over one sample at a time: loss by source, bits per byte)."""
    config = load(overrides)
    trainer.run(config, torch.device("cpu"), log=lambda line: None)
    last = read_records(os.path.join(config.run_dir, "metrics.jsonl"))[-1]
    model = load_run(config.run_dir).model
    corpus = open_corpus(config.data, vocab_size=config.model.vocab_size, seed=config.train.seed, log=lambda line: None)
    losses, num_bytes = {}, 0
    for name, samples in corpus.eval_plan(config.train.eval_sequences).items():
        rows = corpus.eval(list(samples))
        losses[name] = [torch.nn.functional.cross_entropy(model(r[None, :-1])[0].double(), r[1:], reduction="sum").item() for r in rows]
        num_bytes += sum(id != corpus.tokenizer.eod_id for id in rows[:, 1:].flatten().tolist())  # of the tokenizer `bytes`
    total = sum(map(sum, losses.values()))
    expected = {name: sum(each) / len(each) / config.data.seq_len for name, each in losses.items()}
    return last, expected, total / math.log(2) / num_bytes


@pytest.mark.parametrize("layout", LAYOUTS, ids=["one process", "pp 2 x ep 2"])
def test_evaluation_by_source(words, layout):
    run = words("mixed", *MIXED, *layout)
    record, expected, bits = fork_ranks(load(run).parallel.world_size, scored, run)[0]
    assert set(record.eval_loss_by_source) == {"synthetic", "more"} == set(expected)
    assert record.eval_loss_by_source == pytest.approx(expected, rel=1e-5)
    assert record.eval_bits_per_byte == pytest.approx(bits, rel=1e-5)
    a, b = expected.values()
    assert record.eval_loss == pytest.approx((6 * a + 7 * b) / 13, rel=1e-5) or record.eval_loss == pytest.approx(
        (7 * a + 6 * b) / 13, rel=1e-5
    )
