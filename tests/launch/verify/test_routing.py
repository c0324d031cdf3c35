"""Adversarial routing keeps its promises and changes nothing under any schedule; a recorded one comes back as it was, or is refused."""

import functools
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from shoestring.conf.errors import ConfigError
from shoestring.launch.local import fork_ranks
from shoestring.launch.verify import routing
from shoestring.launch.verify.cases import USUAL, composed
from shoestring.launch.verify.evidence import Evidence, Step
from shoestring.parallel.phases import MicroBatch
from shoestring.parallel.schedule import SCHEDULES
from shoestring.train.engine import Engine

CONFIG = composed((*USUAL, "train.global_batch_tokens=64"))
S, K, E = CONFIG.data.seq_len, CONFIG.model.top_k, CONFIG.model.num_experts
LAYERS = range(CONFIG.model.num_dense_layers, CONFIG.model.num_layers)
SAMPLES = [3, 4, 8]
ADVERSARIAL = routing.ROUTINGS[1:]


def top_k(score_TE):
    return score_TE.topk(K, dim=-1).indices


def scores(seed=0):
    return torch.rand(len(SAMPLES) * S, E, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def chosen(name, score_TE):
    return routing.make(name, CONFIG)(0, 1, SAMPLES, top_k, score_TE)


@given(seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None)
def test_each_keeps_its_promise(seed):
    score_TE = scores(seed)
    assert torch.equal(chosen("one_expert", score_TE), torch.arange(K).repeat(len(score_TE), 1))
    idle = chosen("idle_rank", score_TE)
    assert idle.max() < E // 2 and torch.equal(idle, top_k(score_TE[:, : E // 2]))  # among the others the router still decides
    in_turn = chosen("alternating", score_TE).view(len(SAMPLES), S, K)
    for sample, expert_SK in zip(SAMPLES, in_turn):
        assert (expert_SK >= E // 2).all() if sample % 2 else (expert_SK < E // 2).all()
    seen = []
    routing.make("ties", CONFIG)(0, 1, SAMPLES, lambda score: seen.append(score) or top_k(score), score_TE)
    assert len(seen[0].unique()) <= 17 and (seen[0] - score_TE).abs().max() <= 1 / 32
    for name in ADVERSARIAL:
        expert_TK = chosen(name, score_TE)
        assert expert_TK.shape == (len(score_TE), K) and all(len(set(row)) == K for row in expert_TK.tolist())


def test_natural_decides_nothing_and_unknown_names_are_refused():
    assert routing.make("natural", CONFIG) is None
    with pytest.raises(ConfigError, match=r"routing = idle: must be one of .*trace:FILE.*idle_rank"):
        routing.make("idle", CONFIG)


def steps_of(layouts):
    """Of each layout, for each routing in turn: the numbers of a step, and loads; FP64."""
    found = []
    for layout in layouts:
        config = composed((*USUAL, "model.num_layers=4", "train.global_batch_tokens=128", "cluster.gpus_per_node=1", *layout))
        engine, c = Engine(config), config
        for step, name in enumerate(ADVERSARIAL):
            rows = torch.randint(c.model.vocab_size, (c.sequences_per_step, S + 1), generator=torch.Generator().manual_seed(step))
            batches = []
            for sample in range(engine.mesh.dp_rank, c.sequences_per_step, c.parallel.dp):
                batch = MicroBatch(tokens_BS=rows[sample, None, :-1], targets_BN=rows[sample, None, 1:])
                choose = functools.partial(routing.make(name, c), step)
                batch.choose = lambda layer, *scores, choose=choose, sample=sample: choose(layer, [sample], *scores)
                batches.append(batch)
            r = engine.train_step(batches, 1e-3)
            found.append(([r.loss, r.grad_norm, r.balance_loss, r.z_loss, r.router_entropy], r.loads))
    return found


def test_no_schedule_hangs_or_computes_anything_else():
    """Steps follow each other, so that a norm shows whether the weights before it were right."""
    two = ["parallel.pp=2", "parallel.ep=2"]
    layouts = [
        [
            *two,
            f"parallel.schedule={name}",
            f"parallel.chunks={1 + (name not in ('1f1b', 'dualpipe'))}",
            f"parallel.dispatcher={dispatcher}",
        ]
        for name, dispatcher in zip(SCHEDULES, itertools.cycle(["hierarchical", "alltoall"]))
    ]
    (alone,) = fork_ranks(1, steps_of, [[]])
    assert alone[0][1][:, K:].sum() == 0 and alone[1][1][:, E // 2 :].sum() == 0, "the routing is what it is called"
    for rank in fork_ranks(4, steps_of, layouts):
        for (got, loads), (want, loads_alone) in zip(rank, alone * len(layouts), strict=True):
            assert got == pytest.approx(want, rel=1e-11) and torch.equal(loads, loads_alone)


def a_trace(steps=2, samples=4):
    random = torch.Generator().manual_seed(1)
    pick = lambda: torch.rand(steps, samples, S, E, generator=random).topk(K, dim=-1).indices.sort(-1).values
    return {layer: pick() for layer in LAYERS}


def test_a_trace_comes_back_and_begins_anew(tmp_path):
    trace = a_trace(steps=2, samples=4)
    routing.write(tmp_path / "t.safetensors", trace)
    choose = routing.make(f"trace:{tmp_path / 't.safetensors'}", CONFIG)
    for step, layer in ((0, 1), (1, 7), (5, 3)):
        got = choose(step, layer, [2, 5, 11], None, torch.zeros(3 * S, E))
        assert torch.equal(got, torch.cat([trace[layer][step % 2, sample] for sample in (2, 1, 3)]))


def test_what_a_session_chose_is_a_trace():
    choices = a_trace()
    at = lambda step: {layer: choices[layer][step] for layer in LAYERS}
    steps = [Step(numbers={}, loads_LE=torch.zeros(1, 1), tensors={}, choices=at(step)) for step in (0, 1)]
    found = routing.trace_of(Evidence(first={}, steps=steps))
    assert found.keys() == choices.keys() and all(torch.equal(found[layer], choices[layer]) for layer in LAYERS)
    assert routing.trace_of(Evidence(first={}, steps=[])) == {}


def broken(change):
    tensors = {f"layers.{layer}": chosen for layer, chosen in a_trace().items()}
    change(tensors)
    return tensors


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("layers.7"), "has no layers.7: it is the trace of a model with other layers"),
        (lambda t: t.update({"layers.2": t["layers.2"][0]}), r"layers.2 is \(4, 16, 4\); wanted is \(steps, samples, data.seq_len = 16"),
        (lambda t: t.update({"layers.2": t["layers.2"][:, :, :5].clone()}), r"layers.2 is \(2, 4, 5, 4\)"),
        (lambda t: t.update({"layers.2": t["layers.2"][..., :2].clone()}), r"model.top_k = 4"),
        (lambda t: t.update({"layers.2": t["layers.2"][:0].clone()}), r"layers.2 is \(0, 4, 16, 4\)"),
        (lambda t: t.update({"layers.2": t["layers.2"].float() + 0.5}), r"layers.2 holds torch.float32"),
        (lambda t: t["layers.3"].view(-1)[:1].fill_(E), "layers.3 names experts twice, or others than 0 to 15"),
        (lambda t: t["layers.3"].view(-1)[:1].fill_(-1), "layers.3 names experts twice, or others than 0 to 15"),
        (lambda t: t["layers.3"].view(-1)[:2].fill_(5), "layers.3 names experts twice"),
    ],
    ids=["no layer", "three dimensions", "other length", "other top-k", "no step", "no indices", "too high", "too low", "twice"],
)
def test_another_models_trace_is_refused(change, message, tmp_path):
    save_file(broken(change), tmp_path / "t.safetensors")
    with pytest.raises(ConfigError, match=message):
        routing.make(f"trace:{tmp_path / 't.safetensors'}", CONFIG)


@pytest.mark.parametrize("damage", ["cut", "text", "missing", "folder"])
def test_a_damaged_file_is_refused(damage, tmp_path):
    path = tmp_path / "t.safetensors"
    routing.write(path, a_trace())
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "text":
        path.write_text("layers")
    where = {"missing": tmp_path / "no", "folder": tmp_path}.get(damage, path)
    with pytest.raises(ConfigError, match="cannot be read"):
        routing.make(f"trace:{where}", CONFIG)
