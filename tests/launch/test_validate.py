"""Rules of owners are asked before any process starts, and the world must be the one that was started."""

import pytest
from shoestring.conf.compose import load
from shoestring.conf.errors import ConfigError
from shoestring.conf.rules import replaced
from shoestring.launch.validate import check_gpu, validate

OWNERS = [
    # words, field, a piece of the rule
    ("parallel.schedule=1f1", "parallel.schedule", "one of 1f1b"),
    ("parallel.pp=2 parallel.chunks=2", "parallel.chunks", "one stage per rank"),
    ("parallel.pp=2 parallel.schedule=interleaved_1f1b", "parallel.chunks", "at least two stages"),
    ("parallel.dispatcher=nccl", "parallel.dispatcher", "one of auto, local, alltoall"),
    ("parallel.ep=2 parallel.dispatcher=deepep", "parallel.dispatcher", "package deep_ep, which is not installed"),
    ("parallel.ep=4 parallel.dispatcher=hierarchical cluster.gpus_per_node=3", "parallel.dispatcher", "one must divide the other"),
    ("parallel.ep=2 parallel.dispatcher=local", "parallel.dispatcher", "reaches only this rank's experts"),
    ("~data.sources.stdlib", "data.sources", "at least one source"),
    ("data.sources.stdlib.kind=file", "data.sources.stdlib.kind", "one of stdlib, files"),
    ("data=files data.sources.files.paths=[] data.seq_len=256", "data.sources.files.paths", "kind files needs"),
    ("data=hf data.sources.hf.dataset='' data.seq_len=256", "data.sources.hf.dataset", "kind hf needs"),
    ("data=synthetic data.sources.synthetic.num_documents=0", "data.sources.synthetic.num_documents", "positive"),
    ("data.tokenizer.kind=file", "data.tokenizer.path", "tokenizer.json"),
    ("model.vocab_size=100", "model.vocab_size", "every byte"),
    ("data.tokenizer.vocab_size=5000", "data.tokenizer.vocab_size", "512"),
]


@pytest.mark.parametrize(("words", "field", "rule"), OWNERS, ids=[o[0] for o in OWNERS])
def test_an_owners_rule(words, field, rule):
    config = load(words.split())
    with pytest.raises(ConfigError) as caught:
        validate(config)
    assert caught.value.field == field and rule in str(caught.value)
    if caught.value.nearest is not None:
        try:
            validate(replaced(config, field, caught.value.nearest))
        except ConfigError as other:  # a kind of source wants fields of its own
            assert other.field != field


@pytest.mark.parametrize("capability, name", [((8, 0), "A100"), ((8, 9), "L40S: no kernel here is compiled for it"), ((7, 5), "T4")])
def test_no_fp8_on_a_gpu_without(capability, name):
    with pytest.raises(ConfigError, match=rf"{capability[0]}\.{capability[1]}.*9\.0 \(H100\).*precision=bf16") as caught:
        check_gpu(load(["precision=fp8"]), capability)
    check_gpu(replaced(load(["precision=fp8"]), caught.value.field, caught.value.nearest), capability)
    check_gpu(load(["precision=bf16"]), capability)


@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (12, 1)])
def test_fp8_on_a_gpu_that_has_it(capability):
    check_gpu(load(["precision=fp8"]), capability)


WORLDS = [
    # pp edp ep, processes -> the field that can make it fit, and how
    ((2, 1, 2), 8, "parallel.edp", 2),
    ((2, 4, 2), 4, "parallel.edp", 1),
    ((1, 1, 2), 3, "number of processes", 2),  # 3 / 2 is no number of stages, and 16 experts have no third: only other worlds fit
    ((4, 2, 2), 4, "parallel.pp", 1),
    ((3, 1, 2), 4, "parallel.pp", 2),
    ((4, 2, 16), 8, "parallel.ep", 1),
    ((3, 1, 16), 6, "parallel.ep", 2),
]


@pytest.mark.parametrize(("layout", "processes", "field", "fits"), WORLDS)
def test_the_world_must_be_pp_x_edp_x_ep(layout, processes, field, fits):
    config = load()
    for name, value in zip(("pp", "edp", "ep"), layout):
        config = replaced(config, f"parallel.{name}", value)
    validate(config, config.parallel.world_size)
    with pytest.raises(ConfigError) as caught:
        validate(config, processes)
    assert f"{processes} processes were started" in str(caught.value)
    assert (caught.value.field, caught.value.nearest) == (field, fits)
    if field.startswith("parallel."):
        assert replaced(config, field, fits).parallel.world_size == processes


def test_the_published_layout_obeys_every_owner():
    validate(load(["experiment=deepseek_v3", "data.sources.files.paths=[corpus/*.jsonl]"]), 2048)
