"""Which environment variables a cluster file may give to ranks, and that nothing of a secret is shown."""

import pytest
from shoestring.conf.compose import load
from shoestring.conf.errors import ConfigError
from shoestring.conf.rules import check, replaced

GOOD = ["NCCL_DEBUG", "NCCL_IB_HCA", "NCCL_IB_PKEY", "TORCH_NCCL_ASYNC_ERROR_HANDLING", "UCX_TLS", "_x1", "TOKENIZERS_PARALLELISM", "RANKS"]
BAD = {
    "RANK": "whoever starts", "WORLD_SIZE": "whoever starts", "LOCAL_RANK": "whoever starts", "LOCAL_WORLD_SIZE": "whoever starts",
    "MASTER_ADDR": "whoever starts", "MASTER_PORT": "whoever starts", "TORCHELASTIC_RUN_ID": "whoever starts",
    "CUDA_VISIBLE_DEVICES": "local rank", "OMP_NUM_THREADS": "is cluster.threads",
    "LD_PRELOAD": "before a rank", "PYTHONPATH": "before a rank",
    "HF_TOKEN": "secret", "WANDB_API_KEY": "secret", "AWS_ACCESS_KEY_ID": "secret", "aws_secret": "secret", "DB_PASSWORD": "secret",
    "GIT_CREDENTIALS": "secret", "9A": "no name", "A-B": "no name",
}  # fmt: skip


@pytest.mark.parametrize("name", GOOD)
def test_taken(name):
    assert load([f"cluster.env.{name}=1"]).cluster.env == {name: "1"}


@pytest.mark.parametrize(("name", "rule"), BAD.items())
def test_refused(name, rule):
    with pytest.raises(ConfigError, match=rule) as caught:
        check(replaced(load([]), "cluster.env", {"A": "fine", name: "hunter2"}))
    assert caught.value.field == "cluster.env" and caught.value.nearest == ["A"] and "hunter2" not in str(caught.value)


def test_a_value_is_one_line():
    with pytest.raises(ConfigError, match="A must be one line of text"):
        check(replaced(load([]), "cluster.env", {"A": "b\nc"}))


def test_a_phase_has_none_of_its_own():
    with pytest.raises(ConfigError, match="belongs to the whole run") as caught:
        load(["phases.a.train.steps=30", "phases.a.cluster.env.HF_TOKEN=hunter2"])
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(("word", "nearest"), [("cluster.pin=core", "cores"), ("cluster.threads=-1", 0)])
def test_nearest(word, nearest):
    with pytest.raises(ConfigError) as caught:
        load([word])
    assert caught.value.nearest == nearest
