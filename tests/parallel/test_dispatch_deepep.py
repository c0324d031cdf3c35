"""The adapter to DeepEP, against a fake of `Buffer` that keeps to what is documented, over gloo. DeepEP itself wants GPUs.

The fake is strict: types, shapes and arguments are those of its documentation, and nothing that it returns has values before its event
was waited for.
"""

import importlib.machinery
import sys
import types

import pytest
import torch
import torch.distributed as dist
from shoestring.conf.compose import load
from shoestring.conf.errors import ConfigError
from shoestring.launch.local import fork_ranks
from shoestring.parallel.dispatch import AllToAllDispatcher, Routing, check, make_dispatcher

E, K, T, D = 9, 3, 20, 256


class Config:
    def get_nvl_buffer_size_hint(self, hidden_bytes, num_ranks):
        return 10 * hidden_bytes

    def get_rdma_buffer_size_hint(self, hidden_bytes, num_ranks):
        return hidden_bytes * num_ranks


class Late:
    """An event, and tensors that hold their values only after it."""

    def __init__(self, *values):
        self.values = values
        self.given = tuple(
            None if v is None else torch.full_like(v.float(), torch.nan if v.is_floating_point() else 99).to(v.dtype) for v in values
        )

    def current_stream_wait(self):
        for given, value in zip(self.given, self.values):
            if value is not None:
                given.copy_(value)


def gathered(value):
    everybody = [None] * dist.get_world_size()
    dist.all_gather_object(everybody, value)
    return everybody


class Buffer:
    get_dispatch_config = get_combine_config = staticmethod(lambda num_ranks: Config())

    def __init__(self, group, num_nvl_bytes=0, num_rdma_bytes=0):
        self.rank, self.ranks = group.rank(), group.size()
        assert (num_nvl_bytes, num_rdma_bytes) == (10 * 2 * D, self.ranks * 2 * D)

    def get_dispatch_layout(self, topk_idx, num_experts, previous_event=None, async_finish=False, allocate_on_comm_stream=False):
        assert topk_idx.dtype == torch.int64 and topk_idx.is_contiguous()
        self.own = num_experts // self.ranks
        in_rank = torch.stack([(topk_idx // self.own == rank).any(1) for rank in range(self.ranks)], 1)
        per_expert = torch.bincount(topk_idx.flatten(), minlength=num_experts).int()
        self.layout = in_rank.sum(0).int(), None, per_expert, in_rank
        return *self.layout, None

    def dispatch(
        self, x, handle=None, num_tokens_per_rank=None, num_tokens_per_rdma_rank=None, is_token_in_rank=None, num_tokens_per_expert=None,
        topk_idx=None, topk_weights=None, expert_alignment=1, num_worst_tokens=0, config=None, previous_event=None, async_finish=False,
        allocate_on_comm_stream=False,
    ):  # fmt: skip
        parts = x if isinstance(x, tuple) else (x,)
        assert all(part.is_contiguous() for part in parts) and async_finish
        assert [part.dtype for part in parts] in ([torch.bfloat16], [torch.float8_e4m3fn, torch.float32])
        assert all(part.shape == (len(x[0]) if isinstance(x, tuple) else len(x), width) for part, width in zip(parts, (D, D // 128)))
        if handle is None:
            assert (num_tokens_per_rank, num_tokens_per_rdma_rank, num_tokens_per_expert, is_token_in_rank) == self.layout
            assert topk_weights.dtype == torch.float32 and topk_weights.shape == topk_idx.shape
            handle = (gathered(is_token_in_rank),)
        else:
            assert topk_idx is None and topk_weights is None and num_tokens_per_rank is None
        mine = [in_rank[:, self.rank] for in_rank in handle[0]]
        take = lambda everybody: torch.cat([tensor[here] for tensor, here in zip(everybody, mine)])
        received = [take([b.view(part.dtype) for b in gathered(part.view(torch.uint8))]) for part in parts]
        if topk_idx is None:
            event = Late(*received)
            return event.given if isinstance(x, tuple) else event.given[0], None, None, None, None, event
        experts = take(gathered(topk_idx)) - self.rank * self.own
        here = (experts >= 0) & (experts < self.own)
        sizes = torch.bincount(experts[here], minlength=self.own)
        sizes = (-(-sizes // expert_alignment) * expert_alignment).tolist()
        event = Late(*received, experts.masked_fill(~here, -1), take(gathered(topk_weights)) * here)
        *came, came_idx, came_weights = event.given
        return tuple(came) if isinstance(x, tuple) else came[0], came_idx, came_weights, sizes, handle, event

    def combine(
        self, x, handle, topk_weights=None, bias=None, config=None, previous_event=None, async_finish=False, allocate_on_comm_stream=False
    ):
        assert x.dtype == torch.bfloat16 and x.is_contiguous() and x.shape[1] == D and async_finish
        assert topk_weights is None or (topk_weights.dtype == torch.float32 and topk_weights.shape == (len(x), K))
        sums = []
        for tensor in (x, topk_weights):
            if tensor is None:
                sums.append(None)
                continue
            parts = []
            for rank, sent in enumerate(gathered(tensor)):
                before = sum(int(in_rank[:, rank].sum()) for in_rank in handle[0][: self.rank])
                here = handle[0][self.rank][:, rank]
                parts.append(tensor.new_zeros(len(here), tensor.shape[1]))
                parts[-1][here] = sent[before : before + int(here.sum())]
            sums.append(torch.stack(parts).float().sum(0).to(tensor.dtype))
        event = Late(*sums)
        return *event.given, event


@pytest.fixture
def deep_ep(monkeypatch):
    module = types.ModuleType("deep_ep")
    module.Buffer, module.__spec__ = Buffer, importlib.machinery.ModuleSpec("deep_ep", None)
    monkeypatch.setitem(sys.modules, "deep_ep", module)


def both_ways(fp8):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    groups = {d: dist.new_group(list(range(ranks))) for d in "FB"}
    ours = make_dispatcher("deepep", num_experts=E, align=16, groups=groups, fp8=fp8)
    theirs = AllToAllDispatcher(num_experts=E, align=16, groups=groups, fp8=fp8)
    g = torch.Generator().manual_seed(rank)
    slot_of_E = torch.randperm(E, generator=torch.Generator().manual_seed(1))
    for reach, slot_of in ((E, None), (E, slot_of_E), (K, None)):  # the last: all to one rank
        expert_TK = torch.rand(T + rank, reach, generator=g).topk(K).indices
        slot_TK = expert_TK if slot_of is None else slot_of[expert_TK]
        a, b = Routing(expert_TK=expert_TK), Routing(expert_TK=expert_TK)
        for dispatcher, r in ((ours, a), (theirs, b)):
            dispatcher.start(r, slot_of)
            dispatcher.wait_counts(r)
        assert torch.equal(a.load_E, b.load_E)
        weight_TK = torch.rand(expert_TK.shape, generator=g)
        for direction in "FB":
            x_TD, weight = torch.randn(len(expert_TK), D, generator=g).bfloat16(), weight_TK if direction == "F" else None
            rows, weight_R = ours.to_experts(x_TD, weight, a, direction).wait()
            wanted, wanted_R = theirs.to_experts(x_TD, weight, b, direction).wait()
            assert torch.equal(rows.wide(), wanted.wide()) if fp8 else torch.equal(rows, wanted)
            assert weight_R is None if weight is None else torch.equal(weight_R, wanted_R)
            assert torch.equal(a.groups.ends_e, b.groups.ends_e)

            if fp8:
                continue  # what experts make is BF16 in any case
            slot_R = torch.arange(E // ranks).repeat_interleave(torch.tensor(a.groups.sizes)) + rank * (E // ranks)
            made_RD, made_R = rows * (1 + slot_R[:, None]), None if weight is None else weight_R * (1 + slot_R)
            made_RD[a.copy_of_R < 0] = torch.nan  # nobody's
            y_TD, back_TK = ours.to_tokens(made_RD, made_R, a, direction).wait()
            copies_TKD, rank_TK = x_TD[:, None] * (1 + slot_TK[..., None]), slot_TK // (E // ranks)
            partial = [(copies_TKD.float() * (rank_TK == peer)[..., None]).sum(1).bfloat16() for peer in range(ranks)]
            assert torch.equal(y_TD, torch.stack(partial).float().sum(0).bfloat16())
            assert back_TK is None if weight is None else torch.equal(back_TK, weight_TK * (1 + slot_TK))
    return True


@pytest.mark.parametrize("fp8", [False, True])
def test_what_deepep_brings_is_what_alltoall_brings(deep_ep, fp8):
    assert all(fork_ranks(3, both_ways, fp8))


WORDS = ["parallel.dispatcher=deepep", "parallel.ep=2", "precision=bf16"]


def test_it_is_asked_for_and_there(deep_ep):
    check(load(WORDS))


@pytest.mark.parametrize(
    "words, rule",
    [
        (["parallel.ep=1"], "exchanges nothing"),
        (["precision=fp32"], "kernels for BF16 and FP8"),
        (["precision=fp8", "model.dim=192"], "whole blocks of 128"),
    ],
)
def test_what_it_cannot(deep_ep, words, rule):
    with pytest.raises(ConfigError, match=rule):
        check(load([*WORDS, *words]))


def test_without_the_package_nothing_else_takes_its_place():
    with pytest.raises(ConfigError, match="wants the package deep_ep, which is not installed"):
        check(load(WORDS))
    with pytest.raises(ImportError):
        make_dispatcher("deepep", num_experts=E, align=16, groups={"F": types.SimpleNamespace(size=lambda: 2)}).make_buffer(512)
