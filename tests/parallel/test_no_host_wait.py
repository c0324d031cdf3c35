"""One rank with all experts: from the routing to the combine and back, the host never waits for the device.

Tensors on the meta device have no values, so whatever asks for one raises, and so does whatever has a result whose size depends on
values; `NoCopies` refuses what they let pass. The operators of this package are not seen from inside: `tests/kernels/test_row_maps.py`.
"""

import contextlib
from unittest.mock import patch

import pytest
import torch
from shoestring.conf.schema import ModelConfig
from shoestring.kernels.fp8_layers import Fp8Linears
from shoestring.kernels.fp8_weights import WeightCache
from shoestring.kernels.grouped import row_alignment
from shoestring.kernels.ops import Ops
from shoestring.kernels.weight_grad import WeightGradStore
from shoestring.parallel.dispatch import LocalDispatcher, make_dispatcher
from shoestring.parallel.phases import MicroBatch
from shoestring.train.model.decoder import Stage, materialise
from shoestring.train.model.moe import Balance
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T, D = 64, 64
MODEL = ModelConfig(
    name="m", num_layers=2, dim=D, vocab_size=41, max_seq_len=64, num_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8,
    qk_rope_head_dim=8, v_head_dim=8, num_dense_layers=1, dense_hidden_dim=32, num_experts=8, num_shared_experts=1, top_k=2,
    expert_hidden_dim=32, num_groups=4, num_limited_groups=2, route_scale=2.5, init_std=0.1,
)  # fmt: skip

gpu = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="asks a GPU's driver"))


class NoCopies(TorchDispatchMode):
    """RuntimeError for a tensor of the host's that comes to the device: the host waits until it is there. Scalars do not."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        devices = {t.device.type for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor) and t.dim()}
        if len(devices) > 1:
            raise RuntimeError(f"{func} between {sorted(devices)}")
        return out


@contextlib.contextmanager
def no_waiting(device):
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        with NoCopies(), patch.object(torch, "tensor", side_effect=RuntimeError("torch.tensor copies")):  # which that does not see
            yield
    finally:
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def moe_block(device, precision, slot_of):
    """The phases of a stage that is one MoE block, and the store of its weight gradients."""
    fp8, store = precision == "fp8", WeightGradStore()
    align = row_alignment(torch.bfloat16, fp8=fp8)
    with torch.device("meta"):
        stage = Stage(
            MODEL,
            layers=range(1, 2),
            is_first=False,
            is_last=False,
            ep=1,
            balance=Balance(sequence_coef=1e-2, z_coef=1e-3, token_weight=1.0),
            dtype=torch.bfloat16,
            dispatcher=make_dispatcher("local", num_experts=MODEL.num_experts, align=align, groups=None, fp8=fp8),
            ops=Ops(store=store, fp8=Fp8Linears(casts=WeightCache(), store=store) if fp8 else None),
            slot_of=slot_of,
        )
    if device != "meta":
        materialise(stage, seed=0, device=device)
    for weight in stage.parameters():
        weight.main_grad = torch.zeros(weight.shape, device=device)
    stage.prepare()
    return stage.phases, store


def there_and_back(device, precision, slot_of=None, *, waiting=no_waiting):
    (attention, dispatch, experts, combine), store = moe_block(device, precision, slot_of or {})
    tokens, saved = torch.zeros(2, T // 2, dtype=torch.int64, device=device), []
    batch, x_TD = MicroBatch(tokens_BS=tokens, targets_BN=tokens), torch.randn(T, D, dtype=torch.bfloat16, device=device)
    with torch.no_grad():
        attention.forward(None, batch, x_TD)  # what is made once, and kept, may come from the host
        with waiting(device):
            routed = attention.forward(saved, batch, x_TD)
            dispatch.settle(*routed)
            rows = dispatch.forward(saved, batch, *routed).wait()
            (y_TD,) = combine.forward(saved, batch, *experts.forward(saved, batch, *rows)).wait()
            grads = experts.backward(saved, *combine.backward(saved, torch.randn_like(y_TD)).wait())
            closures = store.take()
            (grad_TD,) = attention.backward(saved, *dispatch.backward(saved, *grads).wait())
            for closure in closures + store.take():
                closure()
    assert len(closures) == 4 and not saved and y_TD.shape == grad_TD.shape == x_TD.shape  # two products of experts, two shared


@pytest.mark.parametrize("moved", [False, True], ids=["experts in order", "experts moved"])
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
@pytest.mark.parametrize("device", ["meta", gpu])
def test_nothing_between_routing_and_combine_waits(device, precision, moved):
    there_and_back(device, precision, {1: torch.arange(8, device=device).flip(0)} if moved else None)


READS = {  # each was in the code once, or would come to mind
    "counts to lists": lambda r: r.groups.sizes,
    "bincount": lambda r: torch.bincount(r.expert_TK.flatten(), minlength=8),
    "rows that are not padding": lambda r: r.copy_of_R[r.copy_of_R >= 0],
    "repeat by counts": lambda r: torch.arange(8, device="meta").repeat_interleave(r.load_E),
    "ends from a list": lambda r: torch.tensor([1, 2], device="meta"),
    "added to a tensor of the host": lambda r: torch.zeros(8, dtype=torch.int64).add_(r.load_E),
    "to the host": lambda r: r.load_E.cpu(),
    "a truth": lambda r: bool((r.load_E > 0).all()),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_that_test_sees_a_read(monkeypatch, precision, read):
    monkeypatch.setattr(LocalDispatcher, "wait_counts", lambda self, r: read(r))
    with pytest.raises((RuntimeError, NotImplementedError)):
        there_and_back("meta", precision)
