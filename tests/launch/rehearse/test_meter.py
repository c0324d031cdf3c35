"""The meter, counted by hand: storage by category and moment; and attention's FLOPs, which torch's counter takes as not causal."""

import pytest
import torch
from shoestring.conf.compose import load
from shoestring.kernels.attention import causal_attention
from shoestring.kernels.recompute import discard
from shoestring.launch.rehearse.collectives import Collectives
from shoestring.launch.rehearse.meter import Memory, Meter
from shoestring.parallel.schedule import Op
from shoestring.train import cost

F0, B0 = Op("F", 0, 0), Op("B", 0, 0)


def meter_of(*weights):
    call = lambda name, function, args, kwargs: function(*args, **kwargs)
    memory = Memory(torch.device("cpu"), lambda: [("weights", weights)])
    return Meter(memory, Collectives(0, 1), call=call, used={}, discards=True)


def test_storage_by_hand():
    weight = torch.ones(7)
    meter, kept = meter_of(weight), []
    with meter:
        with meter.tracer.action((F0,)):
            with meter.tracer.compute(F0, "attention"):
                dropped = torch.ones(1000)
                discard(dropped)  # its tensor lives on
            with meter.tracer.compute(F0, "experts"):
                kept.append(torch.ones(100))
                view, more = kept[0].view(10, 10), torch.ones(10)
                del more
        with meter.tracer.action((B0,)):
            working = torch.ones(950)
            del working, view
            kept.clear()
        meter.memory.begin("end")
    peak = meter.memory.peak
    assert (peak.bytes, peak.at) == (4 * (7 + 100 + 950), "0B0")
    assert peak.by_category == {"weights": 4 * 7, "activations": 4 * 100, "working": 4 * 950}
    assert meter.memory.now == 4 * 7 and len(dropped) == 1000


def test_what_is_freed_inside_a_stretch_counts_at_its_fullest():
    meter = meter_of()
    with meter, meter.tracer.action((F0,)):
        first = torch.ones(30)
        del first
        kept = torch.ones(20)
        last = torch.ones(5)
        del last
    meter.memory.begin("end")
    assert (meter.memory.peak.bytes, meter.memory.peak.by_category) == (4 * 30, {"working": 4 * 30})
    assert len(kept) == 20 and meter.memory.settled["activations"] == 4 * 20


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_attention_is_causal(device):
    m, tokens = (
        load(["model=micro", "data.seq_len=64", "model.qk_nope_head_dim=8", "model.qk_rope_head_dim=8", "model.v_head_dim=16"]).model,
        6,
    )
    q, k, v = (torch.ones(1, m.num_heads, tokens, 16, device=device, requires_grad=True) for _ in range(3))
    meter = meter_of()
    with meter:
        rows, _ = causal_attention(q, k, v, 1.0)
        forward = meter.beside.flops
        rows.backward(torch.ones_like(rows))
    assert forward == tokens * cost.attention_flops(m, tokens)
    assert meter.beside.flops == 3.5 * forward  # backward has five products for forward's two
