"""The smallest case that still fails: of predicates whose smallest case is known, and of three mistakes (faults.py), proved for real."""

import re
import shlex

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from shoestring.conf.errors import ConfigError
from shoestring.launch.verify import shrink as shrinking
from shoestring.launch.verify.cases import Case
from shoestring.launch.verify.command import base_words, choose_cases, parse
from shoestring.launch.verify.prove import prove
from shoestring.launch.verify.shrink import shrink

from .faults import BASE, MISTAKES

LARGE = Case(
    layout="pp2edp2ep2/interleaved_1f1b",
    options=("model.mtp_depth=2", "model.num_layers=8", "train.steps=3", "train.global_batch_tokens=256", "optim.algorithm=muon"),
    routing="alternating",
    base=BASE,
)


def of(case: Case) -> dict[str, int]:
    """What should get smaller."""
    c = case.config()
    m, p, t = c.model, c.parallel, c.train
    sizes = {"pp": p.pp, "edp": p.edp, "ep": p.ep, "chunks": p.chunks, "layers": m.num_layers, "mtp": m.mtp_depth, "steps": t.steps}
    return sizes | {"sequences": c.sequences_per_step, "experts": m.num_experts, "top_k": m.top_k}


def again(case: Case) -> Case:
    """The case that its printed command stands for."""
    request = parse(shlex.split(case.command)[2:])
    (found,) = choose_cases(request, base_words(request))
    return found


# ---------------------------------------------------------------- predicates


def test_what_always_fails_ends_as_one_rank_one_layer_one_of_each():
    smallest = shrink(LARGE, lambda case: True)
    assert set(of(smallest).values()) == {0, 1}
    assert smallest.layout == "pp1" and smallest.routing == "natural"
    assert "optim.algorithm=muon" not in smallest.options


def test_what_never_fails_again_stays():
    assert shrink(LARGE, lambda case: False) == LARGE


@settings(max_examples=10)
@given(
    st.fixed_dictionaries(
        {
            "pp": st.sampled_from([1, 2]), "edp": st.sampled_from([1, 2]), "ep": st.sampled_from([1, 2]), "layers": st.integers(1, 8),
            "mtp": st.integers(0, 2), "steps": st.integers(1, 3), "experts": st.sampled_from([1, 4, 16]),
        }
    )
)  # fmt: skip
def test_keeps_what_the_failure_needs_and_nothing_else(needed):
    """Failures that need at least so much of each: what is left has just that, as far as a valid case can."""
    tried = []

    def fails(case: Case) -> bool:
        tried.append(case)
        return all(of(case)[name] >= least for name, least in needed.items())

    smallest = shrink(LARGE, fails)
    assert len(tried) == len(set(tried)) < 80
    assert fails(smallest)
    assert not any(fails(case) for way in shrinking.WAYS for case in way(smallest) if is_valid(case))
    sizes = of(smallest)
    for name in ("pp", "edp", "ep", "mtp", "steps"):
        assert sizes[name] == needed[name], name
    assert sizes["layers"] == max(needed["layers"], needed["pp"])
    assert sizes["experts"] == max(needed["experts"], needed["ep"])
    assert again(smallest).config() == smallest.config()


def is_valid(case: Case) -> bool:
    try:
        case.config()
        return True
    except ConfigError:
        return False


def test_what_did_not_help_at_first_is_tried_again():
    """Fewer steps come before fewer ranks, and help only after them."""
    smallest = shrink(LARGE, lambda case: of(case)["steps"] == 3 or of(case)["pp"] == 1)
    assert of(smallest)["steps"] == of(smallest)["pp"] == 1


def test_only_valid_cases_are_tried():
    shrink(LARGE, lambda case: case.config() is not None and of(case)["top_k"] >= 3)


def test_a_case_that_cannot_be_tried_is_none_that_fails():
    def fails(case: Case) -> bool:
        if case.layout != LARGE.layout:
            raise ConfigError("checkpoint.resume", case.layout, "this case cannot go on there")
        return True

    smallest = shrink(LARGE, fails)
    assert smallest.layout == LARGE.layout
    assert of(smallest)["steps"] == 1


def test_ends_when_patience_does():
    assert shrink(LARGE, lambda case: True, patience_s=-1) == LARGE


# ---------------------------------------------------------------- mistakes


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("shrink")


@pytest.mark.parametrize(
    "name, layout, options, keeps",
    [
        ("expert_gradients_times_ep", "pp2ep2", ("model.num_layers=3",), {"ep": 2, "experts": 2}),
        ("prediction_labels_one_place_early", "edp2", ("model.mtp_depth=2",), {"mtp": 1}),
        ("chunks_of_an_interleaved_schedule_swapped", "pp2edp2/interleaved_1f1b", ("model.num_layers=5",), {"chunks": 2, "layers": 4}),
    ],
)
def test_mistake_is_shown_in_a_smaller_case(folder, name, layout, options, keeps):
    make = MISTAKES[name].make
    failing = Case(layout=layout, options=(*options, "train.global_batch_tokens=64"), base=BASE)
    verdict = prove(failing, "", folder / "case", make)
    assert verdict.broken
    smallest = shrink(failing, lambda case: prove(case, "", folder / "case", make).fails_like(verdict))
    assert any(re.match(MISTAKES[name].caught_by, str(d)) for d in prove(smallest, "", folder / "case", make).broken)
    before, after = of(failing), of(smallest)
    assert all(after[size] <= before[size] for size in before)
    assert smallest.config().parallel.world_size < failing.config().parallel.world_size or layout == "edp2"
    assert after["steps"] == 1 and after["sequences"] < before["sequences"]
    assert after["layers"] < before["layers"] and after["experts"] < before["experts"]
    assert {size: after[size] for size in keeps} == keeps
    assert again(smallest).config() == smallest.config()
    assert prove(smallest, "", folder / "case").passed
