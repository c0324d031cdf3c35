"""`shoestring plan` as a user runs it: the published run, what cannot be, better hardware, and running what was planned."""

import dataclasses
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from shoestring.conf.compose import load
from shoestring.conf.errors import ConfigError
from shoestring.conf.rules import get, replaced
from shoestring.launch import exit_codes
from shoestring.launch.plan.command import main
from shoestring.launch.plan.layouts import Layout, candidates
from shoestring.launch.plan.plans import launch_words
from shoestring.launch.plan.request import ask, parse
from shoestring.launch.plan.search import search
from shoestring.launch.validate import validate
from shoestring.train.metrics import StepRecord

KEYS = (
    "layout", "step_seconds", "tokens_per_second_per_gpu", "gpu_hours_per_trillion_tokens", "dollars_total", "days", "mfu_causal",
    "mfu_non_causal", "bubble_seconds", "exposed_communication_seconds", "optimizer_seconds", "memory_gb_peak", "breakdown",
)  # fmt: skip
PUBLISHED = "experiment=deepseek_v3 precision=fp8 parallel.schedule=dualpipe parallel.dispatcher=deepep stack=deepseek_v3"
SMALL = "model=moonlight model.num_layers=8 cluster=h100 precision=bf16 data.seq_len=4096 train.global_batch_tokens=1048576"


def planned(capsys, words, *more):
    code = main([*words.split(), *more], None)
    return code, capsys.readouterr().out


def test_the_published_run(capsys, tmp_path):
    """2,048 H800: 180 K GPU-hours and 3.7 days per trillion tokens, 1,540 tokens/s/GPU, $5.328 M for 14.8 T (arXiv 2412.19437, §1)."""
    code, text = planned(capsys, PUBLISHED, "tokens=14.8e12", "search=false", f"output={tmp_path / 'plan.json'}")
    assert code == exit_codes.OK and "projected" in text
    (plan,) = json.loads((tmp_path / "plan.json").read_text())["plans"]
    assert set(KEYS) <= plan.keys()
    low, high = plan["gpu_hours_per_trillion_tokens_interval"]
    assert low <= 180e3 <= high and (high - low) / 2 <= 0.1 * plan["gpu_hours_per_trillion_tokens"]
    assert plan["gpu_hours_per_trillion_tokens_ideal"] == pytest.approx(180e3, rel=0.15)
    assert plan["dollars_total_interval"][0] <= 5.328e6 * 1.02
    assert sum(plan["breakdown"].values()) == pytest.approx(plan["step_seconds"])
    assert plan["memory_gb_peak"] < 80  # it ran
    record = plan["record"]  # as a run's metrics
    assert record.keys() >= {field.name for field in dataclasses.fields(StepRecord) if field.default is dataclasses.MISSING}
    assert record["loss"] is None and record["step_seconds"] == plan["step_seconds"] and 0 < record["bubble"] < 1


def test_a_layout_without_a_batch(capsys):
    """As one would write it first: the model, the cluster and a preset's layout."""
    words = (
        "model=deepseek_v3 cluster=h800 gpus=2048 tokens=14.8e12 precision=fp8 parallel=deepseek_v3 train.recompute=[norm,mla_up,swiglu]"
    )
    code, text = planned(capsys, words, "search=false")
    assert code == exit_codes.OK and "15,360 sequences a step" in text and "pp 16 x edp 2 x ep 64, dualpipe, deepep" in text


def test_the_best_of_two_thousand(capsys):
    """Near the layout that was published: experts over several nodes, weight gradients and exchanges hidden in pairs."""
    code, text = planned(capsys, "experiment=deepseek_v3 precision=fp8 gpus=2048 top=3")
    assert code == exit_codes.OK
    best = next(line for line in text.splitlines() if "pp " in line and "$" in line)
    assert "dualpipe" in best and "hierarchical" in best
    asked = next(line for line in text.splitlines() if line.startswith("asked for"))
    assert "pp 16 x edp 2 x ep 64, 1f1b" in asked and re.search(r"\d % slower than the best, most of it exposed communication", asked)


IMPOSSIBLE = [
    ("model=deepseek_v3 cluster=h800 precision=fp8 gpus=64", "nothing fits", r"nearest that fits: gpus=\d+"),
    (f"{SMALL} gpus=8 deadline_days=1 tokens=1e12", "beyond reach", "tokens=.* are done by then"),
    (f"{SMALL} gpus=8 budget_usd=1000 tokens=1e12", "does not pay for", "it pays for"),
    (f"{SMALL} gpus=11", "no layout of 11 GPUs", "nearest: gpus=8"),
]


@pytest.mark.parametrize("words, what, nearest", IMPOSSIBLE, ids=[what for _, what, _ in IMPOSSIBLE])
def test_what_cannot_be(capsys, words, what, nearest):
    """One screen: what conflicts, and the nearest request that does not."""
    code, text = planned(capsys, words, "top=1")
    assert code == exit_codes.CONFIG and len(text.splitlines()) < 40
    assert what in text and re.search(nearest, text)


@pytest.mark.parametrize("words, wrong", [
    ("model=deepseek_v3 gpus=2048 parallel.ep=48", "must divide model.num_experts = 256; nearest valid value: 32"),
    ("model=tiny gpus=many", "must be a number or auto"),
    ("model=tiny gpus=2.5", "must be a whole number"),
    ("model=tiny gpus=2 search=maybe", "must be true or false"),
    ("model=tiny tokens=-1", "must be positive"),
    ("model=tiny", "must be given, for example gpus=2048"),
    ("model=tiny parallel.pp=2 gpus=4 search=false", "prices pp x edp x ep = 2 x 1 x 1; nearest valid value: 2"),
])  # fmt: skip
def test_wrong_words(words, wrong):
    with pytest.raises(ConfigError, match=re.escape(wrong)):
        main(words.split(), None)


def test_any_size(capsys):
    words = f"{SMALL} tokens=1e11 gpus=auto top=1"
    days = lambda text: [float(d) for d in re.findall(r"GPUs: +([\d.]+) days", text)]
    code, text = planned(capsys, words, "deadline_days=1.5")
    assert code == exit_codes.OK and days(text)[-1] <= 1.5 and min([*days(text)[:-1], 9]) > 1.5
    code, text = planned(capsys, words, "budget_usd=1")
    assert code == exit_codes.CONFIG and "does not pay for" in text


def test_every_candidate_is_a_layout_of_that_size():
    config = ask(parse(f"{SMALL} gpus=32".split())).config
    made = list(candidates(config, 32, frozenset()))
    assert len(set(made)) == len(made) > 50
    for layout in made[:: max(1, len(made) // 60)]:
        applied = layout.apply(config)
        assert applied.parallel.world_size == 32 and Layout.of(applied) == layout
        validate(applied)
    fixed = list(candidates(replaced(config, "parallel.pp", 2), 32, frozenset({"parallel.pp"})))
    assert {layout.pp for layout in fixed} == {2} < {layout.pp for layout in made}


@settings(max_examples=3, deadline=None)
@given(name=st.sampled_from(["memory_gb", "memory_tb_s", "intra_node_gb_s", "inter_node_gb_s", "peak_tflops"]), factor=st.floats(1.0, 4.0))
def test_a_better_cluster_is_never_slower(name, factor):
    config = ask(parse(f"{SMALL} model.num_layers=4 cluster.memory_gb=20 gpus=8".split())).config
    value = get(config, f"cluster.{name}")
    better = {k: v * factor for k, v in value.items()} if isinstance(value, dict) else value * factor
    best = lambda c: search(c, 8, keep=1, most=10_000).best[0].step.ideal
    assert best(replaced(config, f"cluster.{name}", better)) <= best(config) * (1 + 1e-12)


def test_the_search_finds_what_trying_all_finds():
    config = ask(parse(f"{SMALL} model.num_layers=4 gpus=8 train.recompute=[norm]".split())).config
    fixed = frozenset({"train.recompute"})
    found, every = search(config, 8, fixed=fixed, keep=1), search(config, 8, fixed=fixed, keep=10_000, most=10_000)
    assert found.simulated < every.simulated and found.best[0].step.ideal == every.best[0].step.ideal


def test_what_was_planned_runs(capsys, tmp_path):
    out = tmp_path / "plan.json"
    words = "model=tiny cluster=cpu gpus=4 data=synthetic data.seq_len=64 train.global_batch_tokens=4096 train.tokens=409600"
    code, _ = planned(capsys, words, "top=2", f"output={out}")
    assert code == exit_codes.OK
    for number, plan in enumerate(json.loads(out.read_text())["plans"], 1):
        config = load(launch_words([f"plan={out}", f"number={number}", "run_dir=elsewhere"]))
        assert str(Layout.of(config)) == plan["layout"] and config.parallel.world_size == 4 and config.run_dir == "elsewhere"
        assert config.train.global_batch_tokens == 4096 and config.model.name == "tiny"
    for wrong in ([f"plan={out}", "number=9"], ["plan=nowhere.json"], ["run_dir=x", "number=1"], [f"plan={__file__}"]):
        with pytest.raises(ConfigError):
            launch_words(wrong)
    assert launch_words(["run_dir=x"]) == ["run_dir=x"]  # a run need not be planned
