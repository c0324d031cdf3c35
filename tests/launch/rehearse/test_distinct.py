"""Kinds of ranks: all ranks are in one, and what is of one kind sends the same (by `train/traffic.py`, which knows nothing of kinds)."""

import pytest
from shoestring.conf.compose import load
from shoestring.launch.rehearse.distinct import kinds, spans
from shoestring.train.traffic import rank_traffic

LAYOUTS = {  # what differs
    "nothing": (["parallel.pp=2", "parallel.ep=4"], 2),
    "the pipeline's mirror": (["parallel.pp=2", "parallel.ep=2", "parallel.schedule=dualpipe"], 2),
    "an exchange over a node and a half": (["parallel.ep=3", "model.num_experts=6", "model.num_groups=3"], 2),
    "neighbours inside a node or not": (["parallel.pp=3", "parallel.ep=1", "model.num_layers=4"], 3),
    "by nodes": (["parallel.ep=4", "parallel.edp=2", "parallel.dispatcher=hierarchical"], 1),
}


def config_of(words):
    return load(["model=micro", "data=synthetic", "data.seq_len=64", "cluster.gpus_per_node=2", "train.global_batch_tokens=6144", *words])


@pytest.mark.parametrize(("words", "num"), LAYOUTS.values(), ids=LAYOUTS)
def test_one_of_a_kind_stands_for_all(words, num):
    config = config_of(words)
    found, p = kinds(config), config.parallel
    assert len(found) == num and sorted(rank for ranks in found for rank in ranks) == list(range(p.world_size))
    for ranks in found:
        places = [(rank // p.dp, rank // p.ep % p.edp, rank % p.ep) for rank in ranks]
        sent = [rank_traffic(config, pp, edp_rank=edp, ep_rank=ep) for pp, edp, ep in places]
        assert all(of_rank == sent[0] for of_rank in sent)


def test_deepseek_v3():
    found = kinds(load(["experiment=deepseek_v3", "data=synthetic"]))
    assert [ranks[0] for ranks in found] == list(range(0, 2048, 128)) and {len(ranks) for ranks in found} == {128}


@pytest.mark.parametrize(("ranks", "text"), [([3], "3"), ([0, 1, 2, 8], "0-2, 8"), ([5, 1], "1, 5"), (range(0, 20, 2), "0, 2, 4, ... 18")])
def test_spans(ranks, text):
    assert spans(ranks) == text
