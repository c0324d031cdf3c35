"""`shoestring verify` as a user runs it: the smoke certificate, one's own model, what is refused."""

import json
import subprocess
import sys

import pytest
from shoestring.conf.errors import ConfigError
from shoestring.launch import exit_codes
from shoestring.launch.verify import command
from shoestring.launch.verify.cases import USUAL, Case, checked, composed
from shoestring.launch.verify.prove import prove


def shoestring(*words, timeout=280):
    code = "import sys; from shoestring.launch.cli import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, timeout=timeout)


def test_the_smoke_certificate(tmp_path):
    done = shoestring("verify", "model.num_layers=4", f"out={tmp_path}")  # half of what is usual: the others are of the same kind
    assert done.returncode == exit_codes.OK, done.stdout + done.stderr
    made = json.loads((tmp_path / "certificate.json").read_text())
    assert made["passed"] and len(made["cases"]) == len(command.SMOKE) and not made["invalid"]
    assert {"torch", "shoestring", "python"} <= made["versions"].keys()
    for case in made["cases"]:
        assert case["passed"] and not case["broken"] and case["resumed_on"] and case["worst"]["value"] <= case["worst"]["limit"]
        assert case["worst"]["value"] > 0, "two sums in different orders, and not one bit apart?"


MODEL = """
name: mine
num_layers: 3
dim: 40
vocab_size: 300
max_seq_len: 64
num_heads: 2
kv_lora_rank: 16
qk_nope_head_dim: 16
qk_rope_head_dim: 8
v_head_dim: 16
num_dense_layers: 1
dense_hidden_dim: 48
num_experts: 6
num_shared_experts: 1
top_k: 2
expert_hidden_dim: 24
num_groups: 1
num_limited_groups: 1
"""


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine.yaml").write_text(MODEL)
    return tmp_path


def test_a_model_of_ones_own(folder):
    """What is invalid is told, and why, before the rest runs."""
    words = ["model=mine", "layouts=pp3,ep4,pp2ep2/interleaved_1f1b", "steps=2", f"out={folder / 'out'}"]
    done = shoestring("verify", "--config-dir", folder, *words)
    assert done.returncode == exit_codes.OK, done.stdout + done.stderr
    before, _, after = done.stdout.partition("pass")
    assert "ep4" in before and "must divide model.num_experts = 6" in before
    assert "pp2ep2/interleaved_1f1b" in before and "too many for model.num_layers = 3" in before
    assert "1 of 1" in after


def test_every_layout_is_valid_or_says_why(folder):
    request = command.parse(["model=mine", "layouts=all", "world=6"], str(folder))
    valid, invalid = checked(list(command.choose_cases(request, command.base_words(request))))
    meshes = {case.layout.partition("/")[0] for case in valid}
    assert meshes == {"ep6", "edp2ep3", "edp3ep2", "edp6", "pp2ep3", "pp2edp3", "pp3ep2", "pp3edp2"}
    assert {case.name for case in invalid} >= {"pp6", "ep6/local"} and all(case.why for case in invalid)


def test_what_is_usual_gives_way_to_the_user(folder):
    """A setting of ours that does not go with the user's is mended; the user's own is refused."""
    softmax = ["model=v2_lite", "model.num_layers=2", "model.num_experts=8", "model.vocab_size=300", "model.dim=64", "model.top_k=2"]
    config = composed(command.base_words(command.parse(softmax)))
    assert config.model.score_func == "softmax" and config.optim.bias_update_speed == 0
    with pytest.raises(ConfigError, match="bias_update_speed"):
        command.base_words(command.parse([*softmax, "optim.bias_update_speed=0.1"]))
    longer = composed(command.base_words(command.parse(["data.seq_len=16", "world=4", "layouts=all"])))
    assert longer.sequences_per_step == 8


@pytest.mark.parametrize(
    "words, message",
    [
        ("layouts=pp2xx", r"layouts = pp2xx: is no layout"),
        ("world=0", r"world = 0: must be a whole number from 1 on"),
        ("target=megatron", r"target = megatron: must be shoestring or deepspeed"),
        ("model=deepseek_v3", r"model = deepseek_v3: has 6\d\d B parameters: 4 processes want"),
        ("routing=odd", r"routing = odd: must be one of natural"),
        ("experiment=tiny_recipe", r"a run of several phases is not proved as a whole"),
        ("layouts=ep3", r"layouts = ep3: none of them is valid for this model"),
    ],
)
def test_refused(words, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        command.verify(command.parse([*words.split(), f"out={tmp_path}"]), say=lambda line: None)


def test_autoep_gets_the_same_certificate(tmp_path):
    request = command.parse(["target=deepspeed", "steps=1", "model.num_layers=2", "world=4", f"out={tmp_path}"])
    lines = []
    assert command.verify(request, say=lines.append) == exit_codes.OK, "\n".join(lines)
    made = json.loads((tmp_path / "certificate.json").read_text())
    assert [case["layout"] for case in made["cases"]] == ["edp2ep2"] and "deepspeed" in made["versions"]


def test_rounding_by_nodes(tmp_path):
    """Where each node's sum is rounded on its way back, the reference rounds there too. In FP8 the norm would be 0.9 % off without that."""
    words = ("precision=fp8", "train.steps=1", "train.global_batch_tokens=64")
    case = Case(layout="ep4/hierarchical", options=words, base=USUAL)
    verdict = prove(case, "", tmp_path / "case")
    assert verdict.passed, verdict.error or "\n".join(str(d) for d in verdict.broken)
