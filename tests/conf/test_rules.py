"""One case per rule, and the promise behind "nearest valid value": whoever takes it is rid of the error."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st
from shoestring.conf.compose import load
from shoestring.conf.errors import ConfigError
from shoestring.conf.rules import check, get, replaced

# words -> field, a piece of the rule, nearest valid value
RULES = [
    # ranges
    ("train.steps=0", "train.steps", "positive", 20),  # 1 is positive as well, but the warm-up takes 20
    ("parallel.ep=-2", "parallel.ep", "positive", 1),
    ("optim.lr=nan", "optim.lr", "finite", 1e-3),
    ("optim.lr=inf", "optim.lr", "finite", 1e-3),
    ("optim.clip=0", "optim.clip", "positive", 1.0),
    ("optim.weight_decay=-0.1", "optim.weight_decay", "not negative", 0.0),
    ("checkpoint.interval=-1", "checkpoint.interval", "not negative", 0),
    ("optim.beta2=1", "optim.beta2", "below 1", 0.999),
    ("data.eval_fraction=1.5", "data.eval_fraction", "below 1", 0.999),
    ("precision.compute=fp61", "precision.compute", "one of fp32, bf16, fp64", "fp64"),
    ("optim.engine=hole", "optim.engine", "one of whole, deepspeed", "whole"),
    ("launch.device=gpu", "launch.device", "one of auto, cpu, cuda", "cpu"),
    ("data.sources.stdlib.weight=0", "data.sources.stdlib.weight", "positive", 1.0),
    ("cluster.peak_tflops.fp32=0", "cluster.peak_tflops.fp32", "positive", 1.0),
    ("name=", "name", "not be empty", None),
    # model
    ("model.yarn.factor=0.5", "model.yarn.factor", "at least 1", 1.0),
    ("model.yarn.beta_fast=1", "model.yarn.beta_fast", "must exceed model.yarn.beta_slow", None),
    ("model.qk_rope_head_dim=5", "model.qk_rope_head_dim", "even", 4),
    ("model.num_dense_layers=9", "model.num_dense_layers", "not exceed model.num_layers = 4", 4),
    ("model.num_groups=3", "model.num_groups", "must divide model.num_experts = 16", 2),
    ("model.num_groups=16", "model.num_groups", "needs two", 8),
    ("model.num_limited_groups=5", "model.num_limited_groups", "not exceed model.num_groups = 4", 4),
    ("model.top_k=9", "model.top_k", "the 8 experts of 2 group", 8),
    ("model.dim=130", "model.dim", "multiple of 4: expert weights in fp32", 128),
    ("model.expert_hidden_dim=36 precision=bf16", "model.expert_hidden_dim", "multiple of 8: expert weights in bf16", 32),
    # layout: the nearest divisor of 16 is 2 or 4, and with 2 everything else fits as well
    ("parallel.ep=3", "parallel.ep", "must divide model.num_experts = 16", 2),
    ("parallel.pp=9", "parallel.pp", "9 stages, too many for model.num_layers = 4", 4),
    ("parallel.pp=2 parallel.chunks=3", "parallel.chunks", "6 stages", 2),
    ("parallel.pp=9 parallel.chunks=2", "parallel.pp", "18 stages", 2),
    ("parallel.comm_sms=200", "parallel.comm_sms", "not exceed 64", 64),
    ("precision=fp64 ~cluster.peak_tflops.fp64", "cluster.peak_tflops", "no peak for precision fp64", None),
    # batch
    ("data.seq_len=1000", "data.seq_len", "not exceed model.max_seq_len = 512", 512),
    ("train.global_batch_tokens=1000", "train.global_batch_tokens", "256 x 1 x 1 = 256", 1024),
    ("train.global_batch_tokens=1", "train.global_batch_tokens", "= 256", 256),
    # phases
    ("phases.a.data.sources.more.kind=synthetic", "phases.a.data.sources", "learns its ids from them", "stdlib"),
    # optimizer
    ("optim.final_lr=1", "optim.final_lr", "not exceed optim.lr", 0.002),
    ("optim.warmup_steps=1000", "optim.warmup_steps", "fit in train.steps = 100", 100),
    ("optim.constant_steps=90", "optim.constant_steps", "fit in train.steps = 100", 80),
]


@pytest.mark.parametrize(("words", "field", "rule", "nearest"), RULES, ids=[r[0] for r in RULES])
def test_rule(words, field, rule, nearest):
    with pytest.raises(ConfigError) as caught:
        load(words.split())
    assert (caught.value.field, caught.value.nearest) == (field, nearest)
    assert rule in caught.value.rule


def test_a_model_without_experts_knows_no_expert_rules():
    load(["model.num_dense_layers=4", "parallel.ep=3", "train.global_batch_tokens=7680", "train.eval_sequences=66"])
    with pytest.raises(ConfigError, match=r"model\.dim"):
        load(["model.dim=130"])
    load(["model.dim=130", "model.num_dense_layers=4"])


BASE = load(["experiment=tiny"])
SMALL = st.integers(-1, 24)
FIELDS = {
    "model.num_layers": SMALL, "model.num_dense_layers": SMALL, "model.num_experts": st.integers(1, 64), "model.num_groups": SMALL,
    "model.num_limited_groups": SMALL, "model.top_k": SMALL, "model.qk_rope_head_dim": SMALL, "model.dim": st.integers(1, 300),
    "model.max_seq_len": st.integers(1, 600), "model.vocab_size": st.integers(1, 3000), "model.expert_hidden_dim": st.integers(1, 200),
    "parallel.pp": SMALL, "parallel.edp": SMALL, "parallel.ep": SMALL, "parallel.chunks": SMALL, "data.seq_len": st.integers(1, 600),
    "train.global_batch_tokens": st.integers(0, 9000), "train.micro_batch_sequences": SMALL, "train.eval_sequences": st.integers(0, 99),
    "train.steps": SMALL, "optim.warmup_steps": SMALL, "optim.constant_steps": SMALL, "optim.lr": st.floats(),
    "optim.final_lr": st.floats(), "optim.beta2": st.floats(),
    "precision.compute": st.sampled_from(["fp32", "bf16", "fp8"]),
}  # fmt: skip
# One of them alone can always be mended, whatever the other fields say; the others may depend on a neighbour that is wrong too.
ALWAYS = {
    "parallel.ep", "parallel.edp", "model.num_groups", "model.num_limited_groups", "model.top_k", "model.qk_rope_head_dim", "model.dim",
    "model.expert_hidden_dim", "train.global_batch_tokens", "train.eval_sequences", "train.steps", "precision.compute",
}  # fmt: skip
CHANGES = st.sets(st.sampled_from(sorted(FIELDS)), min_size=1, max_size=6).flatmap(
    lambda names: st.fixed_dictionaries({n: FIELDS[n] for n in names})
)


@given(CHANGES)
def test_the_nearest_valid_value_mends_its_field(changes):
    config = BASE
    for field, value in changes.items():
        config = replaced(config, field, value)
    try:
        check(config)
    except ConfigError as error:
        if error.nearest is None:
            assert error.field not in ALWAYS
            return
        assert error.nearest != error.value
        mended = replaced(config, error.field, error.nearest)
        try:
            check(mended)
        except ConfigError as other:
            assert other.field != error.field


@given(st.sampled_from(sorted(FIELDS)).flatmap(lambda f: st.tuples(st.just(f), FIELDS[f])))
def test_one_wrong_field_in_a_valid_run_is_mended_by_its_nearest_value(change):
    """With a single change, taking the nearest value gives a run that is valid altogether, where the change itself is to blame."""
    config = replaced(BASE, *change)
    try:
        check(config)
    except ConfigError as error:
        if error.field == change[0] and error.nearest is not None:
            check(replaced(config, error.field, error.nearest))


def test_phases_may_read_other_sources_where_ids_stay_the_same():
    load(["data.tokenizer.kind=bytes", "phases.a.data.sources.more.kind=synthetic"])
    load(["phases.a.data.sources.stdlib.weight=2"])


def test_replaced_leaves_the_original_alone():
    source = dataclasses.replace(BASE.data.sources["stdlib"])
    changed = replaced(BASE, "data.sources.stdlib.weight", 3.0)
    assert get(changed, "data.sources.stdlib.weight") == 3.0 and BASE.data.sources["stdlib"] == source
