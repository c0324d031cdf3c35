"""Recorded routing in place of a guessed imbalance: by hand, in a plan, and where it does not fit."""

import json

import pytest
import torch
from safetensors.torch import save_file
from shoestring.conf.compose import load
from shoestring.conf.errors import ConfigError
from shoestring.conf.rules import replaced
from shoestring.launch.plan.command import main
from shoestring.launch.simulate import project_step
from shoestring.launch.simulate.recorded import read
from shoestring.launch.simulate.step import Conditions, Job, _simulate

# Two MoE layers of 8 experts, two for each token.
WORDS = "model=tiny model.num_layers=3 model.num_dense_layers=1 model.num_experts=8 model.top_k=2 model.num_groups=1"
WORDS += (
    " model.num_limited_groups=1 cluster=h100 data=synthetic data.seq_len=64 train.global_batch_tokens=2048 parallel.ep=4 precision=bf16"
)


def trace(*shares):
    """(steps, 4 samples, 64, 2): in each step this share of tokens chooses experts 0 and 1, which one of four ranks has; the others go
    round."""
    around = torch.tensor([[2, 4], [3, 6], [5, 7], [2, 5]]).repeat(16, 1)
    first = lambda share: torch.arange(64)[:, None] < share * 64
    return torch.stack([torch.where(first(share), torch.tensor([0, 1]), around).expand(4, -1, -1) for share in shares])


@pytest.fixture
def recorded(tmp_path):
    path = tmp_path / "routing.safetensors"
    save_file({"layers.1": trace(0.5, 0.75), "layers.2": trace(0.25, 0.75)}, path)
    return path


def test_rows_of_the_busiest_rank(recorded):
    """Half of all copies on one of four ranks are twice the mean."""
    c = load(WORDS.split())
    low, likely, high = read(recorded, c.model).spread(c)
    assert low[0] == 2.0 and likely[0] == 2.5 and high == (3.0, 3.0)
    assert low[1] == pytest.approx(torch.bincount(trace(0.25)[0, 0].flatten(), minlength=8).view(4, 2).sum(1).max() / 32)


def test_layers_are_simulated_with_their_own(recorded):
    c = load(WORDS.split())
    found = read(recorded, c.model)
    step, job = project_step(c, recorded=found), Job.of(c)
    ideal = _simulate(job, Conditions())[0]
    at = lambda rows: _simulate(job, Conditions(imbalance=rows))[0] - ideal
    ends = [at(rows) for rows in found.spread(c)]
    assert step.terms["imbalance"].likely == ends[1] and step.terms["imbalance"].high == max(ends)
    first, second = at((3.0, 1.0)), at((1.0, 3.0))
    assert first == pytest.approx(second) and 0 < first < at((3.0, 3.0)) == pytest.approx(first + second)
    assert "imbalance" not in project_step(replaced(c, "stack.terms", {}), recorded=found).terms


def test_a_run_s_own_records(tmp_path):
    """`expert_load` of metrics.jsonl: two steps."""
    path, c = tmp_path / "metrics.jsonl", load(WORDS.split())
    loads = [[[8, 8, 4, 4, 2, 2, 2, 2], [4] * 8], [[4] * 8, [4] * 8]]
    path.write_text("".join(json.dumps({"expert_load": load}) + "\n" for load in loads))
    assert read(path, c.model).spread(c) == ((1.0, 1.0), (1.5, 1.0), (2.0, 1.0))


def test_a_plan_with_it(recorded, capsys):
    for words, more in (([], "docs/balance.md"), ([f"routing={recorded}"], f"recorded in {recorded}, layer by layer")):
        main([*WORDS.split(), "search=false", "tokens=1e9", *words], None)
        line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("  imbalance"))
        assert more in line


@pytest.mark.parametrize("tensors, wrong", [
    ({"layers.1": trace(0.5)}, "holds 1 layers (layers.1 ...), and tiny has 2 (layers.1, layers.2 ...)"),
    ({"layers.1": trace(0.5), "layers.2": trace(0.5)[..., :1]}, "model.top_k = 2"),
    ({"layers.1": trace(0.5), "layers.2": trace(0.5) + 1}, "names others than the 8 experts of tiny"),
])  # fmt: skip
def test_what_does_not_fit(tensors, wrong, tmp_path):
    path = tmp_path / "routing.safetensors"
    save_file({name: chosen.contiguous() for name, chosen in tensors.items()}, path)
    with pytest.raises(ConfigError) as found:
        main([*WORDS.split(), "search=false", f"routing={path}"], None)
    assert wrong in str(found.value) and str(path) in str(found.value)


def test_what_is_no_trace(tmp_path):
    c = load(WORDS.split())
    (tmp_path / "metrics.jsonl").write_text('{"loss": 1}\n')
    (tmp_path / "other.jsonl").write_text(json.dumps({"expert_load": [[1, 2]] * 2}) + "\n")
    wrong = {"metrics.jsonl": "no expert_load", "none.safetensors": "cannot be read", "other.jsonl": "2 MoE layers of 2 experts"}
    for name, rule in wrong.items():
        with pytest.raises(ConfigError, match=rule):
            read(tmp_path / name, c.model)
