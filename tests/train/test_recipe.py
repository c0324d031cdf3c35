"""The recipe in miniature (experiment=tiny_recipe) does at every step what a table written here by hand says; killed in each of its
phases and started again it is bit for bit the run that was not. And what the full recipe (experiment=deepseek_v3) plans."""

import math
import os
from itertools import pairwise

import pytest
import torch
from shoestring.conf.compose import load, load_saved, to_yaml
from shoestring.conf.errors import ConfigError
from shoestring.conf.phases import Level, levels, num_steps, num_tokens, phase_at, phases
from shoestring.conf.schema import RampConfig, TrainConfig
from shoestring.launch.local import RankFailed, fork_ranks
from shoestring.launch.validate import validate
from shoestring.train import resume, trainer
from shoestring.train.checkpoint.checkpointer import read_extra
from shoestring.train.checkpoint.folder import find_latest
from shoestring.train.metrics import read_records

SMALL = [
    "experiment=tiny_recipe", "data=synthetic", "data.seq_len=64", "model.vocab_size=300", "model.num_layers=2", "model.dim=32",
    "model.num_experts=4", "model.top_k=2", "model.num_groups=2", "model.num_limited_groups=1", "model.dense_hidden_dim=48",
    "model.expert_hidden_dim=24", "model.num_heads=2", "model.kv_lora_rank=16", "model.q_lora_rank=16", "train.eval_interval=10",
    "checkpoint.interval=7", "optim.ema_decay=0.9",
    "phases.constant.train.tokens=40960", "phases.cosine.train.tokens=32768",  # a third of their steps: there is nothing new in the others
    "parallel.ep=1", "phases.extend_32x.parallel.pp=1", "phases.extend_32x.parallel.ep=2",  # two processes
    "train.micro_batch_sequences=8",  # as large as each phase allows: a step costs by the micro-batch
    *(f"phases.{name}.train.micro_batch_sequences=32" for name in ("constant", "cosine", "constant_low", "constant_lowest")),
    "phases.extend_8x.train.micro_batch_sequences=4", "train.eval_sequences=4", "data.sources.synthetic.num_documents=300",
]  # fmt: skip

#   phase              batch, tokens   sequence  MTP   bias speed
TABLE = {
    "ramp":            ([1024] * 6 + [1536] * 4 + [2048] * 3 + [2560] * 3 + [3072] * 2 + [3584] * 2 + [4096],
                                       64,       0.3,  0.01),
    "constant":        ([4096] * 10,   64,       0.3,  0.01),
    "cosine":          ([4096] * 8,    64,       0.1,  0.01),
    "constant_low":    ([4096] * 4,    64,       0.1,  0.0),
    "constant_lowest": ([4096] * 4,    64,       0.1,  0.0),
    "extend_8x":       ([4096] * 4,    512,      0.1,  0.0),
    "extend_32x":      ([4096] * 4,    2048,     0.1,  0.0),
}  # fmt: skip
RATES = (
    [3e-3 * i / 8 for i in range(1, 9)] + [3e-3] * 13
    + [3e-3] * 10
    + [3e-4 + 2.7e-3 * (1 + math.cos(math.pi * i / 7)) / 2 for i in range(8)]
    + [3e-4] * 4 + [1e-4] * 12
)  # fmt: skip


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipe")
    return lambda name, *more: [*SMALL, f"data.cache_dir={folder / 'cache'}", f"run_dir={folder / name}", *more]


def session(overrides, die_at=None):
    calls = []

    def stop():
        calls.append(None)
        if die_at is not None and len(calls) == die_at:
            os._exit(9)
        return False

    return trainer.run(load(overrides), torch.device("cpu"), stop=stop, log=lambda line: None)


@pytest.fixture(scope="module")
def whole(words):
    fork_ranks(2, session, words("whole"))
    return read_records(f"{load(words('whole')).run_dir}/metrics.jsonl")


def test_every_step_is_as_the_table_says(whole, words):
    rows = [(name, batch, *rest) for name, (batches, *rest) in TABLE.items() for batch in batches]
    assert len(whole) == len(rows) == len(RATES) == num_steps(load(SMALL)) == num_steps(load(["experiment=tiny_recipe"])) - 20 - 12
    tokens = samples = 0
    for step, (record, row, rate) in enumerate(zip(whole, rows, RATES), 1):
        assert (record.phase, record.batch_tokens, record.seq_len, record.mtp_weight, record.bias_update_speed) == row
        assert record.lr == pytest.approx(rate, rel=1e-12)
        tokens, samples = tokens + row[1], samples + row[1] // row[2]
        assert (record.step, record.tokens, record.samples) == (step, tokens, samples)
        assert len(record.mtp_loss) == 1 and 0 < record.mtp_loss[0] < 10
    moved = [b.bias_norm != a.bias_norm for a, b in pairwise(whole)]
    assert all(moved[:38]) and not any(moved[38:]), "biases move until constant_low begins"
    ends = [sum(len(batches) for batches, *_ in list(TABLE.values())[: i + 1]) for i in range(len(TABLE))]
    assert {r.step for r in whole if r.eval_loss is not None} == {*ends, *range(10, len(rows) + 1, 10)}
    assert whole[-1].loss < whole[0].loss
    last = read_extra(find_latest(trainer.Path(load(words("whole")).run_dir) / "checkpoints"))
    assert last["model"]["yarn"]["factor"] == 40 and last["model"]["max_seq_len"] == 2560 and last["layout"].startswith("pp 1 x")
    assert (last["progress"]["stream"], last["progress"]["sample"]) == (2, 4 * 4096 // 2048), "a new stream begins with its first sample"


def curve(records):
    """What each step computed, exactly."""
    return [
        (r.step, r.tokens, r.phase, r.loss, r.mtp_loss, r.grad_norm, r.lr, r.eval_loss, r.eval_loss_by_source, r.bias_norm, r.expert_load)
        for r in records
    ]


def test_killed_in_every_phase(words, whole):
    """Each session is killed some steps into a phase, between checkpoints; the next one begins at the last checkpoint."""
    run = words("killed")
    for target in (9, 27, 36, 42, 45, 50, 54):
        done = resume.steps_done(load(run))
        with pytest.raises(RankFailed, match="exit code 9"):
            fork_ranks(2, session, run, target - done)
    assert resume.steps_done(load(run)) < 54
    fork_ranks(2, session, run)
    assert curve(read_records(f"{load(run).run_dir}/metrics.jsonl")) == curve(whole)


def test_what_is_past_cannot_be_changed(words, whole):
    run = [*words("whole"), "phases.ramp.train.tokens=81920"]
    with pytest.raises(RankFailed, match="phases that are past cannot be changed"):
        fork_ranks(2, session, run)


def test_another_number_of_processes(words):
    """A session ends where the next phase wants more ranks than it has; another one goes on from there."""
    run = [*words("grows"), "parallel.pp=1", "parallel.ep=2", "train.micro_batch_sequences=4", "phases.constant.parallel.pp=2"]
    (first, *_) = fork_ranks(2, session, [*run, "train.stop_after=23"])
    assert (first.step, first.wants, first.stopped) == (21, 4, False)
    with pytest.raises(RankFailed, match="phase constant is next, of 4 ranks; 2 were started"):
        fork_ranks(2, session, run)
    outcome = fork_ranks(4, session, [*run, "train.stop_after=2"])[0]
    assert (outcome.step, outcome.wants) == (23, 0)


# ---------------------------------------------------------------- plans


def test_the_published_run():
    """FACTS: 14.8 T tokens, the ramp over 469 B, constant to 10 T, and so on; 24 micro-batches per pipeline at first, 120 in the end."""
    config = load(["experiment=deepseek_v3", "data.sources.files.paths=[corpus/*.jsonl]"])
    validate(config)
    made = {phase.name: phase for phase in phases(config)}
    pretraining = [made[name].num_tokens for name in ("ramp", "constant", "cosine", "constant_low", "constant_lowest")]
    assert [round(n / 1e9) for n in pretraining] == [469, 9531, 4300, 333, 167] and round(sum(pretraining) / 1e12, 1) == 14.8
    ramp = made["ramp"]
    batches = [level.batch_tokens // 4096 for level in ramp.levels]
    assert batches == list(range(3072, 15361, 128)) or batches == list(range(3072, 15360, 128))
    assert (
        ramp.micro_batches(ramp.levels[0].batch_tokens) == 24
        and made["constant"].micro_batches(made["constant"].batch_tokens(10**6)) == 120
    )
    for name, seq_len, sequences in (("extend_32k", 32768, 1920), ("extend_128k", 131072, 480)):
        phase = made[name]
        assert phase.config.data.seq_len == seq_len and phase.config.sequences_per_step == sequences and phase.num_steps == 1000
        assert phase.config.model.yarn.factor == 40 and phase.config.optim.lr == 7.3e-6
    assert [made[name].config.optim.bias_update_speed for name in made] == [0.001] * 3 + [0] * 4
    assert [made[name].config.optim.mtp_weight for name in made] == [0.3] * 2 + [0.1] * 5
    assert [made[name].stream for name in made] == [0] * 5 + [1, 2], "one stream of samples until the sequences grow"
    assert num_tokens(config) == sum(phase.num_tokens for phase in made.values())
    assert phase_at(config, ramp.num_steps).name == "constant" and phase_at(config, ramp.num_steps - 1).name == "ramp"


def test_levels():
    train = TrainConfig(tokens=100, global_batch_tokens=16, ramp=RampConfig(tokens=24, start_tokens=4, increment_tokens=4))
    assert list(levels(train)) == [  # each size for a third of 24 tokens; the last step passes the end
        Level(first_step=0, num_steps=2, batch_tokens=4),
        Level(first_step=2, num_steps=1, batch_tokens=8),
        Level(first_step=3, num_steps=1, batch_tokens=12),
        Level(first_step=4, num_steps=5, batch_tokens=16),
    ]
    short = TrainConfig(steps=3, global_batch_tokens=16, ramp=RampConfig(tokens=24, start_tokens=4, increment_tokens=4))
    assert [(level.num_steps, level.batch_tokens) for level in levels(short)] == [(2, 4), (1, 8)]


@pytest.mark.parametrize("experiment", [["experiment=tiny_recipe"], ["experiment=deepseek_v3", "data.sources.files.paths=[a]"]])
def test_saved_and_loaded(experiment, tmp_path):
    config = load(experiment)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_saved(tmp_path / "config.yaml") == config


@pytest.mark.parametrize(
    "change, message",
    [
        (
            ["phases.ramp.train.ramp.increment_tokens=1000"],
            r"phases\.ramp\.train\.ramp\.increment_tokens = 1000: must be a multiple of 512",
        ),
        (["phases.ramp.train.ramp.increment_tokens=2048"], r"divides the batch's growth of 3072 .*nearest valid value: 1536"),
        (["phases.ramp.train.ramp.start_tokens=4096"], r"phases\.ramp\.train\.ramp\.start_tokens = 4096: .* below train\.global_batch"),
        (["phases.cosine.optim.warmup_steps=40"], r"phases\.cosine\.optim\.warmup_steps = 40: .* 20 steps of train\.tokens = 81920"),
        (["phases.cosine.model.dim=64"], r"phases\.cosine\.model\.dim = 64: belongs to the whole run"),
        (["phases.cosine.data.tokenizer.kind=bytes"], r"phases\.cosine\.data\.tokenizer\.kind = bytes: belongs to the whole run"),
        (["phases.cosine.optim.lrr=1"], r"phases\.cosine\.optim\.lrr = 1: no such key"),
        (["phases.cosine=3"], "is a phase"),
        (["phases.extend_8x.data.seq_len=5000"], r"phases\.extend_8x\.data\.seq_len = 5000: must not exceed model\.max_seq_len = 2560"),
    ],
)
def test_what_a_phase_may_not_be(change, message):
    with pytest.raises(ConfigError, match=message):
        load(["experiment=tiny_recipe", *change])


def test_a_schedule_that_a_step_of_the_ramp_does_not_fit_is_refused():
    """Interleaved 1F1B wants micro-batches in equal rounds of its ranks: 5 of them, which the ramp passes through, are none."""
    config = load(["experiment=tiny_recipe", "parallel.schedule=interleaved_1f1b", "parallel.chunks=2", "phases.extend_32x.parallel.pp=2"])
    with pytest.raises(
        ConfigError, match=r"parallel\.schedule = interleaved_1f1b: .*\(train\.ramp\) \(in phase ramp\); nearest valid value: 1f1b"
    ):
        validate(config)
