"""The `sample` command as a person sees it: text on stdout, all else on stderr, one line for what is wrong."""

import pytest
import torch
from shoestring.conf.schema import ModelConfig
from shoestring.launch import cli, exit_codes
from shoestring.train.data.tokenizer import ByteTokenizer
from shoestring.train.interop import hf
from shoestring.train.model.decoder import CausalLM, materialise


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    m = ModelConfig(
        name="m", num_layers=2, dim=16, vocab_size=260, max_seq_len=40, num_heads=2, kv_lora_rank=8, qk_nope_head_dim=8, init_std=0.3,
        qk_rope_head_dim=4, v_head_dim=8, dense_hidden_dim=24, num_experts=4, top_k=2, expert_hidden_dim=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = CausalLM(m.freeze())
    materialise(model.stage, seed=0)
    ByteTokenizer().save(folder / "tokenizer.json")
    hf.write(hf.ModelWeights(model), model.m, folder / "hf", dtype="fp32", tokenizer=folder / "tokenizer.json")
    return folder / "hf"


def sample(capsys, *words) -> tuple[int, str, str]:
    code = cli.main(["sample", *map(str, words)])
    return code, *capsys.readouterr()


def test_text_and_what_is_told_of_it(exported, capsys):
    code, out, err = sample(capsys, exported, "grüße", "--max-tokens", 12, "--num", 2, "--seed", 5)
    assert code == exit_codes.OK
    assert out.startswith("grüße") and out.endswith("\n") and "\033" not in out  # no colours where nobody looks
    lines = err.splitlines()
    assert lines[:2] == ["1 of 2", "2 of 2"] and len(lines) == 3
    assert " tokens in " in lines[2] and " tokens/s), from " in lines[2] and lines[2].endswith(str(exported))
    alone = [sample(capsys, exported, "grüße", "--max-tokens", 12, "--seed", seed)[1] for seed in (5, 6)]
    assert alone[0] + alone[1] == out and alone[0] != alone[1]
    greedy = {sample(capsys, exported, "grüße", "--max-tokens", 12, *how)[1] for how in (["--greedy"], ["--temperature", 0, "--seed", 9])}
    assert len(greedy) == 1


def test_what_breaks_off_in_a_character_is_shown(exported, capsys):
    """Texts of one byte each: some are the begin of a character that never comes."""
    texts = sample(capsys, exported, "--num", 12, "--max-tokens", 1, "--temperature", 2)[1]
    assert texts.count("\n") >= 12 and "\ufffd\n" in texts


def test_a_text_as_long_as_the_model_can(exported, capsys):
    code, _, err = sample(capsys, exported, "--temperature", 2, "--top-p", 1)
    assert code == exit_codes.OK and err.startswith("at most 39 tokens: prompt and text must fit model.max_seq_len = 40\n")


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--max-tokens", 0], exit_codes.CONFIG, "--max-tokens = 0: must be at least 1"),
        (["--num", -1], exit_codes.CONFIG, "--num = -1: must be at least 1"),
        (["--top-p", 1.5], exit_codes.CONFIG, "--top-p = 1.5: is a probability above 0; nearest valid value: 1.0"),
        (["x" * 40], exit_codes.CONFIG, "prompt = 41 tokens: must be fewer than model.max_seq_len = 40; shorten it"),
    ],
)
def test_wrong_wishes_are_one_line(exported, capsys, words, code, message):
    assert sample(capsys, exported, *words) == (
        code,
        "",
        f"error: {message}" + ("; nearest valid value: 1\n" if "least" in message else "\n"),
    )


def test_an_exported_model_has_no_average(exported, capsys):
    rule = f"is of a run; {exported} is a Hugging Face folder, with one kind of weights: leave the option out"
    assert sample(capsys, exported, "--weights", "ema") == (exit_codes.CONFIG, "", f"error: --weights = ema: {rule}\n")
    assert sample(capsys, exported, "--weights", "master", "--max-tokens", 2)[0] == exit_codes.OK


def test_no_model_is_one_line(tmp_path, capsys):
    code, out, err = sample(capsys, tmp_path / "none")
    assert (code, out, err.count("\n")) == (exit_codes.STORAGE, "", 1)
    assert "none: holds no complete checkpoint" in err
