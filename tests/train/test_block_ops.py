"""The table of a block's kernels against what a model of one block calls: how often, on tensors of how many bytes, for how many FLOPs."""

from collections import Counter

import pytest
import torch
from shoestring.conf.compose import load
from shoestring.kernels import grouped, rms_norm, swiglu
from shoestring.kernels.row_maps import rows_bound
from shoestring.launch.local import fork_ranks
from shoestring.parallel.phases import MicroBatch
from shoestring.train import cost
from shoestring.train.block_ops import block_calls, end_calls, totals
from shoestring.train.engine import Engine
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

T, S = 64, 32
# Sizes that tell one another apart, and of which some are no multiple of a cast's block.
BASE = [
    "data=synthetic", f"data.seq_len={S}", "model.vocab_size=300", "model.dim=144", "model.num_layers=1", "model.q_lora_rank=80",
    "model.kv_lora_rank=48", "model.dense_hidden_dim=208", "model.expert_hidden_dim=176", "model.num_experts=8", "model.top_k=3",
    "model.num_groups=2", "model.num_limited_groups=1", f"train.global_batch_tokens={T}", f"train.micro_batch_sequences={T // S}",
]  # fmt: skip
BLOCKS = {
    "experts": ["model.num_dense_layers=0", "model.num_shared_experts=2"],
    "experts alone, queries without a latent": ["model.num_dense_layers=0", "model.num_shared_experts=0", "model.q_lora_rank=0"],
    "dense": ["model.num_dense_layers=1"],
}
PER_STEP = {"quantise_blocks"}  # casts of weights


class Counting(TorchDispatchMode):
    """Calls, bytes and FLOPs by kernel: of this package's operators, and of plain arithmetic wrapped in `counted`."""

    def __init__(self):
        super().__init__()
        self.calls, self.bytes, self.flops, self.inside = Counter(), Counter(), Counter(), False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        packet, kwargs = func._overloadpacket, kwargs or {}
        if func.namespace != "shoestring":
            out = func(*args, **kwargs)
            if (
                func in (torch.ops.aten.mm.default, torch.ops.aten._grouped_mm.default)
                and args[0].dtype == torch.bfloat16
                and not self.inside
            ):
                self.flops["bf16"] += 2 * args[0].numel() * args[1].shape[-1]  # the gate's are FP32
            return out
        name = packet.__name__.replace("fp8_", "").removesuffix("_scales")  # of codes and scales: one permutation, in two parts
        out = self.counted(name, func, weigh(packet.__name__))(*args, **kwargs)
        if packet.__name__ == "permute_scales":
            self.calls[name] -= 1
        if packet in flop_registry:
            self.flops[name] += flop_registry[packet](*args, **kwargs, out_val=out)
        return out

    def counted(self, name, function, num_bytes):
        def call(*args, **kwargs):
            outermost, self.inside = not self.inside, True
            out = function(*args, **kwargs)
            if outermost and name not in PER_STEP:
                self.calls[name] += 1
                self.bytes[name] += num_bytes(args, out)
            self.inside = not outermost
            return out

        return call


def size(*tensors):
    return sum(t.nbytes for t in tree_leaves(tensors) if isinstance(t, torch.Tensor))


def weigh(name):
    """Bytes of a call: of all its arguments and results, but where rows are gathered, those that are read."""
    if name == "permute":
        return lambda args, out: 2 * size(out) + size(args[1])
    if name == "permute_scales":  # by the index that the codes were
        return lambda args, out: 2 * size(out)
    if name == "sum_copies":
        return lambda args, out: args[1].numel() * args[0].shape[1] * args[0].element_size() + size(args[1], out)
    if name == "fp8_grouped_matmul":  # without where experts' rows end
        return lambda args, out: size(args[:4], out)
    if "add_" in name:  # likewise; what is added to is read and written
        return lambda args, out: size(args[0], args[:5])
    if name == "swiglu_backward":  # an unweighted row's weight has no gradient
        return lambda args, out: size(args, out[0]) + size(args[-1])
    return size


def measured(words):
    """[forward alone, a whole step]: calls, bytes, FLOPs."""
    engine, modes = Engine(load([*BASE, *words])), (Counting(), Counting())
    rows = torch.randint(300, (T // S, S + 1), generator=torch.Generator().manual_seed(0))
    batches = [MicroBatch(tokens_BS=rows[:, :S], targets_BN=rows[:, 1:])]
    kernels = {
        "rms_norm": (rms_norm, "_forward"),
        "rms_norm_backward": (rms_norm, "_backward"),
        "swiglu": (swiglu, "_forward"),
        "swiglu_backward": (swiglu, "_backward"),
        "add_grouped_outer": (grouped, "add_grouped_weight_grad"),  # on CPU, a loop over experts
    }
    plain = {name: getattr(*place) for name, place in kernels.items()}
    for mode, run in zip(modes, (engine.executor.evaluate, engine.executor.step)):
        for name, (module, attribute) in kernels.items():  # in this forked process only
            setattr(module, attribute, mode.counted(name, plain[name], weigh(name) if "grouped" in name else size))
        with mode:
            run(batches)
    return [(dict(mode.calls), dict(mode.bytes), dict(mode.flops)) for mode in modes]


def table(m, fp8, *parts):
    """Calls, bytes and FLOPs of the parts and, of the one block's model, of the norm and the BF16 product before its loss."""
    calls, num_bytes, flops = Counter(), Counter(), Counter()
    for part, norm in zip(parts, ("rms_norm", "rms_norm_backward")):
        calls.update({name: c.count for name, c in part.items()})
        num_bytes.update({name: c.bytes for name, c in part.items()})
        for name, c in part.items():
            flops[name if fp8 else "bf16"] += c.flops if fp8 or name != "add_grouped_outer" else 0
        calls[norm] += 1
        num_bytes[norm] += T * m.dim * 2 * (2 if norm == "rms_norm" else 3) + T * 4 + m.dim * 2 * (1 if norm == "rms_norm" else 2)
        flops["bf16"] += 2 * T * m.dim * m.vocab_size * (1 if norm == "rms_norm" else 2)
    return calls, num_bytes, +flops


@pytest.mark.parametrize("block", BLOCKS.values(), ids=BLOCKS.keys())
@pytest.mark.parametrize("precision", ["bf16", "fp8"])
def test_a_block_calls_what_the_table_says(precision, block):
    words, fp8 = [f"precision={precision}", *block], precision == "fp8"
    m = load([*BASE, *words]).model
    rows = rows_bound(T * m.top_k, m.num_experts, 128 if fp8 else 32)  # counters do not know which of them are nobody's
    calls = block_calls(m, 0, tokens=T, seq_len=S, fp8=fp8, rows=rows)
    before, after = totals([c for c in calls if c.when == "F"]), totals([c for c in calls if c.when != "F"])
    ((forward, step),) = fork_ranks(1, measured, words)
    not_kept = {"pack_e5m6"}  # where there is no backward
    uncounted = set() if fp8 else {"matmul", "grouped_matmul", "add_outer"}  # torch's own: their FLOPs are counted
    for found, parts, left_out in ((forward, [before], not_kept), (step, [before, after], set())):
        *tallies, flops = table(m, fp8, *parts)
        for got, wanted in zip(found, tallies):
            assert got == {name: number for name, number in wanted.items() if name not in uncounted | left_out}
        assert found[2] == flops


def test_even_routing_is_the_least_that_experts_compute():
    m, usual = load([*BASE, "model.num_dense_layers=0"]).model, dict(tokens=T, seq_len=S, fp8=True)
    even, full = (totals(block_calls(m, 0, **usual, rows=rows)) for rows in (None, rows_bound(T * m.top_k, 8, 128)))
    assert even["grouped_matmul"].flops == 2 * 2 * 8 * 128 * 3 * m.dim * m.expert_hidden_dim  # 24 rows each, padded; both ways
    assert even["grouped_matmul"].flops < full["grouped_matmul"].flops and even["permute"] == full["permute"]


@pytest.mark.parametrize("model", ["deepseek_v3 model.mtp_depth=1", "moonlight", "tiny model.num_dense_layers=4"])
def test_products_are_those_of_the_model(model):
    """Rows that fill tiles exactly: FLOPs by call are FLOPs by formula, three passes of them, and what the core's backward has beside."""
    c = load([f"model={model.split()[0]}", *model.split()[1:], "data.seq_len=4096", "model.max_seq_len=4096"])
    m, tokens = c.model, 4096
    calls = end_calls(m, tokens=tokens, embed=True, head=True)
    for layer in range(m.num_blocks):
        calls += block_calls(m, layer, tokens=tokens, seq_len=4096, fp8=False, ep=m.num_experts // 4, rows=tokens * m.top_k)
    wanted, core = cost.flops_per_token(m, 4096), m.num_blocks * cost.attention_flops(m, 4096)
    of = lambda when: sum(call.flops for call in calls if call.when == when and not call.kernel.startswith("attention"))
    assert of("F") == of("B") == of("W") == pytest.approx(tokens * wanted.matrices)
    assert sum(call.flops for call in calls if call.kernel == "attention") == pytest.approx(tokens * core)


@pytest.mark.parametrize("fp8", [False, True])
def test_recomputed_calls_are_those_of_forward(fp8):
    m, usual = load([*BASE, "model.num_dense_layers=0"]).model, dict(tokens=T, seq_len=S, fp8=fp8)
    plain = block_calls(m, 0, **usual)
    for recompute in (["attention"], ["experts"], ["attention", "experts"], ["norm", "mla_up", "swiglu"]):
        calls = block_calls(m, 0, **usual, recompute=recompute)
        assert sorted(c for c in calls if not c.again) == sorted(plain)
        again, whole = totals([c for c in calls if c.again]), [c for c in plain if c.when == "F" and c.phase in recompute]
        if whole:
            assert again == totals(whole)
        else:
            assert again["matmul"].count == 2 and {"rms_norm"} <= again.keys() <= {
                "rms_norm",
                "rms_norm_quantised",
                "matmul",
                "swiglu",
                "quantise_rows",
            }
