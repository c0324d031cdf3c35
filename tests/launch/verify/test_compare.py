"""What a comparison says of two sessions that were made up: mistakes in one tensor, noise, near ties, who owns what."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from shoestring.launch.verify.compare import LIMITS, Deviation, compare, near_ties, resumed, worst
from shoestring.launch.verify.evidence import Evidence, Step

EXPERTS = 4
SIZES = {"embed": 60, "layers.0.attn_norm": 8, "layers.1.router.weight": 32, "layers.1.experts.down": 24 * EXPERTS, "head": 60}
NOISE = {"fp64": 1e-14, "fp32": 1e-6}  # relative, of every element: what rounding may do in sums


def session(num_steps: int = 2, seed: int = 0, scales=(1e-3, 1.0, 1e-2, 1e-1, 1.0)) -> Evidence:
    """Made up: each weight moves by its gradient; scores have margins of 1e-3."""
    rng = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=rng, dtype=torch.float64)
    weights = {name: draw(size) for name, size in SIZES.items()}
    first, steps = (
        {f"{name}.master": w for name, w in weights.items()} | {"layers.1.router.bias": torch.zeros(EXPERTS, dtype=torch.float64)},
        [],
    )
    for number in range(num_steps):
        tensors = {}
        for (name, size), scale in zip(SIZES.items(), scales):
            grad = scale * draw(size)
            weights[name] = weights[name] - 1e-3 * grad / scale
            tensors |= {f"{name}.grad": grad, f"{name}.master": weights[name], f"{name}.exp_avg": 0.1 * grad, f"{name}.exp_avg_sq": grad**2}
        tensors["layers.1.router.bias"] = torch.full((EXPERTS,), 0.01 * (number + 1), dtype=torch.float64)
        steps.append(
            Step(
                numbers={"loss": 5.0 - number, "grad_norm": 1.0},
                loads_LE=torch.full((1, EXPERTS), 6),
                tensors=tensors,
                choices={1: torch.tensor([0, 1]).expand(3, 4, 2).clone(), 2: torch.tensor([2, 3]).expand(3, 4, 2).clone()},
                margins={1: torch.full((3, 4), 1e-3), 2: torch.full((3, 4), 1e-3)},
            )
        )
    return Evidence(first=first, steps=steps)


def changed(evidence: Evidence, step: int, name: str, change) -> Evidence:
    """`change(copy)` of one tensor of step `step` (1 is the first), in place."""
    steps = list(evidence.steps)
    tensors = {n: t.clone() if n == name else t for n, t in steps[step - 1].tensors.items()}
    change(tensors[name])
    steps[step - 1] = replace(steps[step - 1], tensors=tensors)
    return replace(evidence, steps=steps)


def noisy(evidence: Evidence, by: float) -> Evidence:
    """Of weights, the way that they have gone since the first step is shaken."""
    rng = torch.Generator().manual_seed(1)
    shake = lambda t: t * (1 + by * torch.randn(t.shape, generator=rng, dtype=torch.float64))
    begun = lambda name: evidence.first.get(name, 0.0)
    steps = [replace(s, tensors={n: begun(n) + shake(t - begun(n)) for n, t in s.tensors.items()}) for s in evidence.steps]
    return replace(evidence, steps=steps)


def broken(got: Evidence, want: Evidence, precision: str = "fp64") -> list[Deviation]:
    return [d for d in compare(got, want, LIMITS[precision], EXPERTS) if not d.passed]


# ---------------------------------------------------------------- sensitivity


@pytest.mark.parametrize("precision", ["fp64", "fp32"])
def test_rounding_passes(precision):
    want = session()
    got = noisy(want, NOISE[precision])
    assert not broken(got, want, precision)
    assert worst(list(compare(got, want, LIMITS[precision], EXPERTS))).value > 0


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("precision", ["fp64", "fp32"])
@pytest.mark.parametrize("name", SIZES)
def test_one_part_in_ten_thousand_of_a_gradient_is_caught(name, precision, step):
    """Of any tensor, and of any single expert's slab, under the rounding of the others."""
    want = session()
    units = EXPERTS if ".experts." in name else 1
    for unit in range(units):
        got = changed(noisy(want, NOISE[precision]), step, f"{name}.grad", lambda t: t.view(units, -1)[unit].mul_(1 + 1e-4))  # noqa: B023
        (found,) = broken(got, want, precision)
        of_expert = f" of expert {unit}" if units > 1 else ""
        assert (found.quantity, found.where) == ("gradient", f"{name}{of_expert}, step {step}")
        assert found.value == pytest.approx(1e-4, rel=0.1)


@given(st.lists(st.floats(-4, 0), min_size=5, max_size=5), st.sampled_from(list(SIZES)), st.sampled_from(["fp64", "fp32"]))
def test_one_part_in_ten_thousand_is_caught_in_small_gradients_too(exponents, name, precision):
    """Gradients of weights that are thousands of times smaller than others'."""
    want = session(num_steps=1, scales=[10**e for e in exponents])
    (found,) = broken(changed(want, 1, f"{name}.grad", lambda t: t.mul_(1 + 1e-4)), want, precision)
    assert found.where.startswith(name)


def test_noise_about_zero_is_no_mistake():
    """Where the reference is zero but for rounding, there is nothing to measure by."""
    want = session(scales=(1.0, 1e-17, 1.0, 1.0, 1.0))
    assert not broken(changed(want, 1, "layers.0.attn_norm.grad", lambda t: t.mul_(-3)), want)
    for kind in ("grad", "exp_avg", "exp_avg_sq"):
        idle = changed(want, 1, f"layers.1.experts.down.{kind}", lambda t: t[:24].mul_(1e-17))
        assert not broken(changed(idle, 1, f"layers.1.experts.down.{kind}", lambda t: t[:24].mul_(-3)), idle)


@pytest.mark.parametrize(
    "name, quantity",
    [("head.master", "weight"), ("head.exp_avg", "first moment"), ("head.exp_avg_sq", "second moment")],
)
@pytest.mark.parametrize("precision, off", [("fp64", 1e-6), ("fp32", 1e-2)])
def test_state_is_measured_by_what_it_is(name, quantity, precision, off):
    """A weight by the way that it has gone: a hundredth of a step is a hundred-thousandth of the weight here."""
    want = session()
    way = lambda t: want.first[name] if name in want.first else torch.zeros_like(t)
    (found,) = broken(changed(want, 2, name, lambda t: t.add_(off * (t - way(t)))), want, precision)
    assert (found.quantity, found.where) == (quantity, "head, step 2")
    assert found.value == pytest.approx(off, rel=1e-3)


def test_bias_loads_numbers_and_first_weights():
    want = session()
    (bias,) = broken(changed(want, 2, "layers.1.router.bias", lambda t: t[2].neg_()), want)
    assert (bias.quantity, bias.where) == ("selection bias", "layers.1.router, step 2")
    steps = [
        replace(want.steps[0], loads_LE=torch.tensor([[6, 7, 5, 6]])),
        replace(want.steps[1], numbers={"loss": 4.0 + 1e-9, "grad_norm": 1}),
    ]
    load, loss = broken(replace(want, steps=steps), want)
    assert str(load) == "expert load of MoE layer 0, step 1: 2 (must be equal)"
    assert (loss.quantity, loss.where) == ("loss", "step 2")
    (first,) = broken(replace(want, first=want.first | {"head.master": want.first["head.master"] + torch.eye(60)[3] * 1e-15}), want)[:1]
    assert first.quantity == "first weight" and "head.master" in first.where and "1 elements" in first.where


# ---------------------------------------------------------------- what is missing, and what is no number


def without(evidence: Evidence, name: str) -> Evidence:
    steps = [replace(s, tensors={n: t for n, t in s.tensors.items() if n != name}) for s in evidence.steps]
    return replace(evidence, steps=steps)


def test_a_tensor_that_nobody_has():
    want = session()
    found = broken(without(want, "head.grad"), want)
    assert [(d.quantity, d.where) for d in found] == [("gradient", f"head.grad, step {n}: nobody has it") for n in (1, 2)]
    assert not broken(replace(without(want, "head.grad"), complete=False), want)  # another system may not tell everything


@pytest.mark.parametrize("at", [0, 59])
def test_what_is_no_number_fails(at):
    want = session()
    got = changed(want, 1, "embed.grad", lambda t: t[at].fill_(math.nan))
    for mine, theirs in ((got, want), (got, got)):
        (found,) = broken(mine, theirs)
        assert found.where == "embed, step 1" and found.share == math.inf
    steps = [replace(want.steps[0], numbers={"loss": math.nan, "grad_norm": 1.0}), want.steps[1]]
    (found,) = broken(replace(want, steps=steps), want)
    assert found.quantity == "loss" and worst([*compare(want, want, LIMITS["fp64"], EXPERTS), found]) is found


def test_faults_come_as_they_are():
    want = session()
    (found,) = broken(replace(want, faults=["rank 1 says otherwise"]), want)
    assert str(found) == "fault of rank 1 says otherwise: inf (must be equal)"


def test_a_step_that_was_never_taken_is_told():
    """What is not there cannot deviate."""
    broken = [d for d in compare(session(num_steps=1), session(num_steps=2), LIMITS["fp64"], EXPERTS) if not d.passed]
    assert [d.where for d in broken] == ["1 steps were taken, not 2"]


def test_state_after_a_resume_is_equal_bit_for_bit():
    want = session()
    state = {n: t.clone() for n, t in want.steps[0].tensors.items() if not n.endswith(".grad")}
    begun = lambda tensors: list(resumed(Evidence(first=tensors, steps=[]), want.steps[0], "after step 1"))
    assert not [d for d in begun(state) if not d.passed]
    state["head.exp_avg"][7] *= 1 + 1e-15
    (found,) = begun(state)
    assert found.quantity == "resumed state" and found.where == "head.exp_avg after step 1 (1 elements)" and not found.passed
    del state["head.exp_avg"]
    (found,) = begun(state)
    assert found.where == "head.exp_avg after step 1: nobody has it"


# ---------------------------------------------------------------- where


def test_the_rank_that_owns_the_element_that_is_furthest_off():
    cuts = [(0, 30, 3), (30, 60, 0), (60, 96, 2)]  # across experts: slabs of 24
    want = session()
    got = replace(want, owners={"layers.1.experts.down.grad": cuts})
    for at, (expert, rank) in {0: (0, 3), 24: (1, 3), 29: (1, 3), 30: (1, 0), 59: (2, 0), 60: (2, 2), 95: (3, 2)}.items():
        (found,) = broken(changed(got, 1, "layers.1.experts.down.grad", lambda t: t[at].add_(0.1)), want)  # noqa: B023
        assert found.where == f"layers.1.experts.down of expert {expert}, step 1, rank {rank}"


def chosen(evidence: Evidence, step: int, layer: int, sample: int, token: int, margin: float | None = None) -> tuple[Evidence, Evidence]:
    """With another choice there; and the reference, with that margin there."""
    s = evidence.steps[step - 1]
    choices, margins = {n: t.clone() for n, t in s.choices.items()}, {n: t.clone() for n, t in s.margins.items()}
    choices[layer][sample, token] = torch.tensor([0, 3])
    if margin is not None:
        margins[layer][sample, token] = margin
    other = lambda **changes: replace(evidence, steps=[*evidence.steps[: step - 1], replace(s, **changes), *evidence.steps[step:]])
    return other(choices=choices), other(margins=margins)


def test_other_choices_are_told_and_later_steps_not():
    got, want = chosen(session(), 1, 2, sample=1, token=3)
    got = changed(changed(got, 1, "embed.grad", lambda t: t.mul_(2)), 2, "head.grad", lambda t: t.mul_(2))
    choice, gradient = broken(got, want)
    assert str(choice) == "choice of experts of layer 2, step 1: 1 (must be equal)"
    assert gradient.where == "embed, step 1"


@pytest.mark.parametrize("precision", ["fp64", "fp32", "bf16"])
def test_a_near_tie_is_one_only_where_rounding_may_swap(precision):
    tie = LIMITS[precision].tie
    got, want = chosen(session(), 2, 1, sample=1, token=3, margin=tie / 2)
    assert near_ties(got, want, LIMITS[precision]) == [f"step 2, layer 1, sample 1, token 3: {tie / 2:.0e} apart"]
    got, want = chosen(session(), 2, 1, sample=1, token=3, margin=tie * 2)
    assert near_ties(got, want, LIMITS[precision]) is None
    assert near_ties(want, want, LIMITS[precision]) is None


def test_one_wide_margin_among_near_ties_is_a_mistake():
    got, want = chosen(session(), 1, 1, sample=0, token=0, margin=1e-13)
    got.steps[0].choices[1][2, 2] = torch.tensor([0, 3])
    assert near_ties(got, want, LIMITS["fp64"]) is None


def test_what_follows_a_near_tie_is_not_asked_for_its_margin():
    """Layer 2 sees other activations after a tie in layer 1."""
    got, want = chosen(session(), 1, 1, sample=0, token=0, margin=1e-13)
    got.steps[0].choices[2][0, 0] = torch.tensor([0, 3])
    assert len(near_ties(got, want, LIMITS["fp64"])) == 1


def test_without_margins_nothing_is_a_near_tie():
    got, want = chosen(session(), 1, 1, sample=0, token=0)
    assert near_ties(got, replace(want, steps=[replace(s, margins={}) for s in want.steps]), LIMITS["fp64"]) is None
