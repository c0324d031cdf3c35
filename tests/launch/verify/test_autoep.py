"""DeepSpeed's AutoEP beside `transformers`, torch's AdamW and `clip_grad_norm_` in one process; and that its ranks' faults are seen."""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from shoestring.conf.compose import load
from shoestring.conf.schema import ConfigError
from shoestring.launch.verify import autoep
from shoestring.train.interop.hf_format import pieces, to_hf_config, weight_shapes

WORDS = [
    "data=synthetic", "data.seq_len=16", "model.vocab_size=300", "model.dim=48", "model.num_layers=3", "model.dense_hidden_dim=64",
    "model.expert_hidden_dim=24", "train.global_batch_tokens=256", "train.micro_batch_sequences=2", "optim.lr=1e-3", "optim.clip=0.5",
    "optim.weight_decay=0.5", "optim.eps=1e-6",
]  # fmt: skip
EXACT = 1e-5  # relative norm, FP32; measured 1.4e-6


def start(*words, steps=1):
    """Weights that differ everywhere, biases that change who is chosen, norms that are not one."""
    config, random = load([*WORDS, *words]), torch.Generator().manual_seed(0)
    first = {}
    for name, shape in weight_shapes(config.model).items():
        noise = torch.randn(shape, generator=random).flatten()
        if name.endswith("router.bias"):
            first[name] = 0.05 * noise
        else:
            first[f"{name}.master"] = 0.1 * noise if len(shape) > 1 else 1 + 0.1 * noise
    size = (config.sequences_per_step, config.data.seq_len + 1)
    return config, first, [torch.randint(config.model.vocab_size, size, generator=random) for _ in range(steps)]


def in_their_names(m, first):
    named = {}
    for p in pieces(m, stacked=True):
        flat = first[p.weight if p.is_selection_bias else f"{p.weight}.master"][p.offset : p.offset + p.numel]
        named.setdefault(p.name, []).append(flat.view(p.shape))
    return {name: torch.stack(parts) if ".mlp.experts." in name else parts[0] for name, parts in named.items()}


def in_our_names(m, tensor_of, what):
    named = {}
    for p in pieces(m, stacked=True):
        if not p.is_selection_bias:
            part = tensor_of(p.name) if p.index is None else tensor_of(p.name)[p.index]
            named.setdefault(f"{p.weight}.{what}", []).append((p.offset, part.detach().flatten()))
    return {name: torch.cat([part for _, part in sorted(parts, key=lambda item: item[0])]) for name, parts in named.items()}


def one_process(config, first, rows):
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    m, o = config.model, config.optim
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**to_hf_config(m, "fp32"), attn_implementation="eager"))
    model.load_state_dict(in_their_names(m, first), strict=True)
    params = dict(model.named_parameters())
    groups = [[p for p in params.values() if (p.dim() > 1) == decays] for decays in (True, False)]
    optimizer = torch.optim.AdamW(
        [{"params": groups[0], "weight_decay": o.weight_decay}, {"params": groups[1], "weight_decay": 0.0}],
        lr=o.lr, betas=(o.beta1, o.beta2), eps=o.eps,
    )  # fmt: skip
    chosen, steps = [], []
    for layer in model.model.layers[m.num_dense_layers :]:
        layer.mlp.gate.register_forward_hook(lambda module, args, out: chosen.append(out[2].sort(1).values))
    for tokens in rows:
        chosen.clear(), optimizer.zero_grad()
        loss = F.cross_entropy(model(input_ids=tokens[:, :-1], use_cache=False).logits.flatten(0, 1), tokens[:, 1:].flatten())
        loss.backward()
        tensors = in_our_names(m, lambda name: params[name].grad.clone(), "grad")
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip).item()
        optimizer.step()
        tensors |= in_our_names(m, lambda name: params[name].clone(), "master")
        for moment in ("exp_avg", "exp_avg_sq"):
            tensors |= in_our_names(m, lambda name, moment=moment: optimizer.state[params[name]][moment].clone(), moment)
        numbers = {"loss": loss.item(), "grad_norm": norm, "clip_coef": min(1.0, o.clip / norm)}
        choices = [expert_TK.view(len(tokens), config.data.seq_len, m.top_k) for expert_TK in chosen]
        steps.append(SimpleNamespace(numbers=numbers, tensors=tensors, choices=choices))
    return steps


@pytest.fixture(scope="module")
def session():
    config, first, rows = start("parallel.edp=2", "parallel.ep=2", steps=2)
    found = autoep.train(config, first, rows, timeout_s=100)  # before this process computes: it forks
    return config, first, found, one_process(config, first, rows)


def test_it_computes_what_one_process_of_transformers_does(session):
    _, first, found, wanted = session
    assert found.faults == [] and not found.complete and len(found.steps) == len(wanted)
    for step, other in zip(found.steps, wanted):
        assert other.numbers["clip_coef"] < 0.9  # else clipping would not be tried
        for name, value in other.numbers.items():
            assert step.numbers[name] == pytest.approx(value, rel=EXACT), name
        for name, tensor in other.tensors.items():
            away = (step.tensors[name] - tensor).norm() / tensor.norm()
            assert away < EXACT, (name, away)
        biases = {name: t for name, t in first.items() if name.endswith(".bias")}
        assert set(step.tensors) == set(other.tensors) | set(biases)
        assert all(torch.equal(step.tensors[name], bias_E) for name, bias_E in biases.items())


def test_it_routes_as_transformers_does(session):
    config, _, found, wanted = session
    for step, other in zip(found.steps, wanted):
        assert list(step.choices) == [1, 2]
        for chosen, expected, load_E in zip(step.choices.values(), other.choices, step.loads_LE):
            assert torch.equal(chosen, expected)
            assert torch.equal(load_E, torch.bincount(expected.flatten(), minlength=config.model.num_experts))


def test_every_element_has_one_owner(session):
    config, _, found, _ = session
    for name, shape in weight_shapes(config.model).items():
        if not name.endswith("router.bias"):
            for what in ("grad", "master", "exp_avg", "exp_avg_sq"):
                at = 0
                for begin, end, rank in found.owners[f"{name}.{what}"]:
                    assert begin == at and 0 <= rank < 4
                    at = end
                assert at == torch.Size(shape).numel()


def test_somebody_else_may_decide_the_routing():
    config, first, rows = start("parallel.ep=2")

    def choose(step, layer, samples, select, score_TE):  # of the second rank all, or as the router does
        return torch.tensor([8, 9, 12, 13]).expand(len(score_TE), -1) if layer == 1 else select(score_TE)

    (step,) = autoep.train(config, first, rows, choose, timeout_s=100).steps
    assert (step.choices[1] == torch.tensor([8, 9, 12, 13])).all()
    assert step.loads_LE[0].nonzero().flatten().tolist() == [8, 9, 12, 13] and step.loads_LE[1].count_nonzero() > 8


def norm_of_one_rank(monkeypatch, zero):
    whole = zero.scaled_global_norm
    monkeypatch.setattr(zero, "scaled_global_norm", lambda self: whole(self) * (1 + 1e-3 * torch.distributed.get_rank()))


def stale_weights(monkeypatch, zero):
    step = zero.step

    def forgetful(self):
        step(self)
        if torch.distributed.get_rank() == 1:
            self.bit16_groups[0][0].data.add_(1e-4)

    monkeypatch.setattr(zero, "step", forgetful)


@pytest.mark.parametrize(
    "mistake, wanted",
    [
        (norm_of_one_rank, ["grad_norm in step 1", "clip coefficient of parameter groups in step 1"]),
        (stale_weights, ["on rank 1 is up to 1.0e-04 away from the masters of its replicas in step 1"]),
    ],
)
def test_ranks_that_disagree_are_a_fault(monkeypatch, mistake, wanted):
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    mistake(monkeypatch, DeepSpeedZeroOptimizer)
    faults = autoep.train(*start("parallel.edp=2"), timeout_s=100).faults
    assert all(any(fault in said for said in faults) for fault in wanted), faults


@pytest.mark.parametrize(
    "words, field",
    [
        (["parallel.pp=2"], "parallel.pp"),
        (["model.mtp_depth=1"], "model.mtp_depth"),
        (["optim.algorithm=muon"], "optim.algorithm"),
        (["model.num_dense_layers=3"], "model.num_dense_layers"),
    ],
)
def test_what_autoep_does_not_have_is_refused(words, field):
    with pytest.raises(ConfigError, match=field):
        autoep.train(*start(*words))


def test_batches_that_cannot_be_shared_out_are_refused():
    config, first, (rows,) = start("parallel.ep=2")
    with pytest.raises(ConfigError, match=r"multiple of 4 sequences"):
        autoep.train(config, first, [rows[:6]])


def test_a_missing_package_is_one_clear_error(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ConfigError, match=r"transformers.*shoestring\[test\]"):
        autoep.train(*start())
