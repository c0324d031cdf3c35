"""What is asked for is what one gets; what cannot be is one sentence with field, value, rule and nearest valid value."""

import dataclasses
import pickle

import pytest
from omegaconf import OmegaConf
from shoestring.conf.compose import load, load_saved, to_yaml
from shoestring.conf.errors import ConfigError, UnknownKey
from shoestring.conf.schema import Config

CASES = [
    # a key that is not there: on the command line in every form, at every depth
    ("optim.lrr=3", "optim.lrr = 3: no such key; nearest known key: optim.lr"),
    ("+x=3", "x = 3: no such key; nearest known key: "),
    ("++model.nlayers=3", "model.nlayers = 3: no such key; nearest known key: model.num_layers"),
    ("model.yarn.factr=3", "model.yarn.factr = 3: no such key; nearest known key: model.yarn.factor"),
    ("seq_len=64", "seq_len = 64: no such key; nearest known key: data.seq_len"),
    ("data.sources.code.weihgt=2", "data.sources.code.weihgt = 2: no such key; nearest known key: data.sources.code.weight"),
    ("++data.sources.code={kind:files,bad:2}", "data.sources.code.bad = 2: no such key; nearest known key: data.sources.code."),
    ("model._target_=os.system", "model._target_ = os.system: no such key"),
    ("hydra.run.dir=x", "hydra.run.dir = x: Hydra's own settings have no effect here"),
    # choices of a group
    ("model=tny", "model = tny: no such choice; there are deepseek_v3, ladder_300m, ladder_3b, llama3_405b, micro, moonlight, small, "),
    (
        "cluster=h10",
        "cluster = h10: no such choice; there are a100, b200, cpu, gb200, gb300, h100, h20, h200, h800, mi300x, rtx4090; "
        "nearest valid value: h100",
    ),
    ("optim=3", "optim = 3: no such choice; there are "),
    # values of the wrong type
    ("optim.lr=abc", "optim.lr = abc: must be a number"),
    ("optim.lr=", "optim.lr = '': must be a number"),
    ("train.steps=1e3", "train.steps = 1000.0: must be a whole number; nearest valid value: 1000"),
    ("train.steps=true", "train.steps = True: must be a whole number"),
    ("launch.threads=null", "launch.threads = null: must be a whole number"),
    ("model.norm_topk=7", "model.norm_topk = 7: must be true or false"),
    ("model.yarn=3", "model.yarn = 3: is a section: set its fields (model.yarn.factor, "),
    ("data.sources.stdlib.paths=a", "data.sources.stdlib.paths = a: must be a list; nearest valid value: [a]"),
    ("cluster.peak_tflops.fp32=abc", "cluster.peak_tflops.fp32 = abc: must be a number"),
    ("cluster.peak_tflops=3", "cluster.peak_tflops = 3: is a dictionary: give its entries, cluster.peak_tflops.NAME=VALUE"),
    # values never given come before every rule (a sequence of 4096 does not fit `tiny` either)
    ("data=files", "data.sources.files.paths = ???: must be given, for example data.sources.files.paths=[A,B]"),
    ("data=hf", "data.sources.hf.dataset = ???: must be given, for example data.sources.hf.dataset=VALUE"),
    ("data.sources.new.weight=2", "data.sources.new.kind = ???: must be given"),
    ("~model", "model.name = ???: must be given"),
    # words that are no settings
    ("foo", "command line = foo: is not KEY=VALUE"),
    ("a b=3", "command line = a b=3: is not KEY=VALUE"),
    ("=3", "command line = =3: is not KEY=VALUE"),
    ("optim.lr=1,2", "optim.lr = 1,2: is several values; a list is written [a,b]"),
    ("name=${nope}", "name = ${nope}: Interpolation key 'nope' not found"),
    ("~data.sources.nope", "data.sources.nope = (deleted): "),
]


@pytest.mark.parametrize(("word", "says"), CASES, ids=[word for word, _ in CASES])
def test_refuses(word, says):
    with pytest.raises(ConfigError) as caught:
        load([word])
    assert str(caught.value).startswith(says)
    assert "\n" not in str(caught.value)


FILES = [
    ("optim: {lr: abc}", "optim.lr = abc: must be a number"),
    ("modle: {dim: 3}", "modle = {'dim': 3}: no such key; nearest known key: model"),
    ("defaults: [override /model: tny]", "model = tny: no such choice"),
    ("data: {sources: {code: {kind: hf, weigth: 3}}}", "data.sources.code.weigth = 3: no such key; nearest known key: data.sources.code.w"),
    ("optim: 3", "optim = 3: is a section"),
    ("optim: [", "config = "),
    ("cluster: {peak_tflops: {fp8: many}}", "cluster.peak_tflops.fp8 = many: must be a number"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "says"), FILES, ids=[text for text, _ in FILES])
def test_refuses_in_a_file_of_ones_own(tmp_path, text, says):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}\n")
    with pytest.raises(ConfigError) as caught:
        load(["experiment=mine"], tmp_path)
    assert str(caught.value).startswith(says)
    assert "\n" not in str(caught.value)


def test_a_file_without_its_header_is_told_so(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("optim: {lr: 3}\n")
    with pytest.raises(ConfigError, match="must begin with the line '# @package _global_'"):
        load(["experiment=mine"], tmp_path)


def test_groups_of_ones_own(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "wide.yaml").write_text("defaults: [tiny, _self_]\nname: wide\ndim: 256\n")
    config = load(["model=wide"], tmp_path)
    assert (config.model.dim, config.model.num_layers) == (256, load().model.num_layers)
    with pytest.raises(ConfigError, match=r"--config-dir = .*nowhere: no such folder"):
        load([], tmp_path / "nowhere")


@pytest.mark.parametrize("plus", ["", "+", "++"])
def test_open_dictionaries_take_new_names_with_and_without_a_plus(plus):
    words = ["data.sources.code.kind=files", "data.sources.code.paths=[a.txt,b.txt]", "cluster.peak_tflops.fp8=2"]
    config = load([plus + word for word in words])
    assert set(config.data.sources) == {"stdlib", "code"}
    assert config.data.sources["code"].paths == ("a.txt", "b.txt")
    assert config.cluster.peak_tflops["fp8"] == 2.0


def test_a_source_can_be_taken_out():
    config = load(["~data.sources.stdlib", "data.sources.made.kind=synthetic", "data.sources.made.num_documents=3"])
    assert set(config.data.sources) == {"made"}


@pytest.mark.parametrize("word", ["experiment=tiny", "+experiment=tiny", "++experiment=tiny"])
def test_an_experiment_by_any_spelling(word):
    config = load([word])
    assert (config.name, config.run_dir, config.parallel.world_size) == ("tiny", "runs/tiny", 4)


def test_an_experiment_has_the_last_word_but_for_the_command_line():
    assert (load().train.steps, load(["experiment=smoke"]).train.steps) == (100, 8)
    assert load(["train.steps=3", "experiment=smoke", "optim.warmup_steps=1"]).train.steps == 3


def test_values_keep_their_types():
    config = load(["optim.lr=1", "name=12", "train.seed=7"])
    assert isinstance(config.optim.lr, float) and config.name == "12" and config.run_dir == "runs/12" and config.train.seed == 7


PRESETS = ["tiny", "small", "v2_lite", "moonlight", "deepseek_v3", "ladder_300m", "ladder_3b", "llama3_405b"]


@pytest.mark.parametrize("model", PRESETS)
def test_every_model_preset_is_valid(model):
    softmax = ["optim.bias_update_speed=0"] if model == "v2_lite" else []
    assert load([f"model={model}", *softmax]).model.name == model


def test_the_published_run_is_valid():
    config = load(["experiment=deepseek_v3", "data.sources.files.paths=[corpus/*.jsonl]"])
    assert config.parallel.world_size == 2048
    assert config.sequences_per_step == 15360 and config.num_micro_batches == 120
    assert config.train.global_batch_tokens == 62_914_560


@pytest.mark.parametrize("words", [["experiment=tiny"], ["data.sources.code.kind=files", "data.sources.code.paths=[a,b]"]])
def test_a_saved_configuration_is_read_back_equal(tmp_path, words):
    config = load(words)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_saved(tmp_path / "config.yaml") == config


def test_a_saved_configuration_with_a_key_of_another_version_is_refused(tmp_path):
    (tmp_path / "config.yaml").write_text(to_yaml(load()) + "retired: 1\n")
    with pytest.raises(UnknownKey, match="retired = 1"):
        load_saved(tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read"):
        load_saved(tmp_path / "none.yaml")


def test_a_resolved_configuration_is_constant_and_travels():
    config = load(["data.sources.code.kind=files", "data.sources.code.paths=[a]"])
    for change in (
        lambda: setattr(config, "name", "x"),
        lambda: setattr(config.model.yarn, "factor", 2.0),
        lambda: setattr(config.data.sources["code"], "weight", 2.0),
        lambda: config.data.sources.pop("code"),
        lambda: config.cluster.peak_tflops.update(fp8=1.0),
    ):
        with pytest.raises(dataclasses.FrozenInstanceError):
            change()
    assert isinstance(config.data.sources["code"].paths, tuple)
    assert pickle.loads(pickle.dumps(config)) == config
    assert dataclasses.replace(config, name="other").name == "other"


def test_errors_travel_between_processes():
    error = pickle.loads(pickle.dumps(ConfigError("a.b", 3, "must be four", 4)))
    assert str(error) == "a.b = 3: must be four; nearest valid value: 4" and isinstance(error, ConfigError)


def test_the_schema_knows_its_own_defaults():
    """Every field that has a default has one of its own type, so that an empty section is as good as none."""
    assert dataclasses.is_dataclass(Config) and load(["launch=local"]).launch.threads == 1


def test_a_saved_configuration_is_taken_as_it_stands(tmp_path, monkeypatch):
    """Whoever wrote a run directory may not read this machine's environment by it."""
    monkeypatch.setenv("CANARY", "the secret")
    text = to_yaml(load(["experiment=tiny"])).replace("name: tiny\n", "name: '${oc.env:CANARY}'\n", 1)
    (tmp_path / "config.yaml").write_text(text)
    assert load_saved(tmp_path / "config.yaml").name == "${oc.env:CANARY}"


@pytest.mark.parametrize(
    "word", ["name=${oc.env:CANARY}", "model=${oc.env:CANARY}", "data.cache_dir=/x/${oc.env:CANARY,y}", "+x=${oc.env:CANARY}"]
)
def test_environment_variables_are_not_read(monkeypatch, word):
    """What one holds would be kept with the run, or shown; other programs in this process still have OmegaConf's resolver."""
    monkeypatch.setenv("CANARY", "the secret")
    with pytest.raises(ConfigError) as caught:
        load(["experiment=tiny", word])
    assert "the secret" not in str(caught.value) and "oc.env" in str(caught.value)
    assert OmegaConf.create({"a": "${oc.env:CANARY}"}).a == "the secret"


def test_other_settings_may_be_referred_to():
    assert load(["experiment=tiny", "name=steps_${train.steps}"]).name == "steps_150"
