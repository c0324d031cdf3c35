"""Made-up counts of rows: they add up, are as even or uneven as asked, and both ends of an exchange agree."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shoestring.conf.compose import load
from shoestring.conf.errors import ConfigError
from shoestring.launch.rehearse.routing import Routing

BASE = load(
    [
        "model=micro", "data=synthetic", "data.seq_len=24", "train.global_batch_tokens=96", "parallel.ep=4", "model.num_experts=8",
        "model.num_groups=4", "model.num_limited_groups=2", "cluster.gpus_per_node=2",
    ]
)  # fmt: skip


def config_of(seq_len=24, top_k=2):
    return replace(BASE, data=replace(BASE.data, seq_len=seq_len), model=replace(BASE.model, top_k=top_k))


@given(seq_len=st.integers(1, 100), top_k=st.integers(1, 4))
def test_even(seq_len, top_k):
    routings = [Routing(config_of(seq_len, top_k), rank) for rank in range(4)]
    sent = torch.stack([routing.to_ranks()[0] for routing in routings])  # sender, receiver, expert
    received = torch.stack([routing.to_ranks()[1] for routing in routings])
    assert torch.equal(sent, received.transpose(0, 1))
    assert (sent.sum((1, 2)) == seq_len * top_k).all()
    for counts in (sent.flatten(1), sent.sum(0).flatten()):  # of each sender, and of all: no expert has more than one over another
        assert counts.amax(-1).max() - counts.amin(-1).min() <= 1


@given(seq_len=st.integers(1, 100), ep_rank=st.integers(0, 3))
def test_by_nodes_both_ends_agree(seq_len, ep_rank):
    config = config_of(seq_len)
    sent = torch.stack([Routing(config, rank).to_nodes(2)[0] for rank in range(4)])
    received = Routing(config, ep_rank).to_nodes(2)[1]
    assert torch.equal(sent[:, ep_rank], received)
    tokens, copies = received[:, 2], received[:, 3:].sum(1)  # two experts a rank
    assert (tokens <= seq_len).all() and (tokens <= copies).all() and (copies <= 2 * tokens).all()


@pytest.mark.parametrize("imbalance", [1.25, 2.0, 4.0])
def test_the_busiest_has_what_was_asked_for(imbalance):
    routing = Routing(config_of(24), 1, imbalance)
    sent, received = routing.to_ranks()
    assert received.sum() == imbalance * 24 * 2 and sent.sum() == 24 * 2
    assert received.amax() - received.amin() <= 1


@pytest.mark.parametrize(("imbalance", "top_k", "most"), [(0.5, 2, 1), (4.5, 2, 4), (3.0, 4, 2)])
def test_no_routing_has_that_imbalance(imbalance, top_k, most):
    with pytest.raises(ConfigError, match=rf"nearest valid value: {most}"):
        Routing(config_of(24, top_k), 0, imbalance)
