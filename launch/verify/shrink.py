"""The smallest case that still fails: fewer steps, ranks, options, layers, experts and micro-batches, as long as it does.

Greedy, and only as good as that: each accepted change is smaller by itself, and at the end no single change is left that fails.
"""

import time
from collections.abc import Callable, Iterator

from ...conf.errors import ConfigError
from .cases import Case, layout_words

PATIENCE_S = 180.0


def shrink(case: Case, fails: Callable[[Case], bool], patience_s: float = PATIENCE_S) -> Case:
    """`fails(case)`, of a valid case; it may raise ConfigError for what it cannot try. Ends after `patience_s` with what it has by then.

    One way of being smaller is followed to its end before the next is tried, and all are tried again until none of them helps.
    """
    deadline, refuted = time.monotonic() + patience_s, set()

    def follow(case: Case, way: Callable[[Case], Iterator[Case]]) -> Case:
        for smaller in way(case):
            if time.monotonic() > deadline:
                break
            if smaller not in refuted and _still(fails, smaller):
                return follow(smaller, way)
            refuted.add(smaller)
        return case

    before = None
    while case != before:
        before = case
        for way in WAYS:
            case = follow(case, way)
    return case


def _still(fails: Callable[[Case], bool], case: Case) -> bool:
    try:
        case.config()
        return fails(case)
    except ConfigError:
        return False


# ---------------------------------------------------------------- ways of being smaller, the largest change first


def _fewer_steps(case: Case) -> Iterator[Case]:
    steps = case.config().train.steps
    for fewer in sorted({1, steps - 1} - {0, steps}):
        yield _set(case, f"train.steps={fewer}")


def _fewer_ranks(case: Case) -> Iterator[Case]:
    mesh, *parts = case.layout.split("/")
    sizes = dict(zip(("pp", "edp", "ep"), (int(word.partition("=")[2]) for word in layout_words(mesh))))
    for axis, size in sizes.items():
        for fewer in sorted({1, size // 2} - {0, size}):
            fewer_sizes = sizes | {axis: fewer}
            layout = "".join(f"{a}{n}" for a, n in fewer_sizes.items() if n > 1) or "pp1"
            yield _with(case, layout="/".join([layout, *parts]))


def _usual_schedule(case: Case) -> Iterator[Case]:
    mesh, *parts = case.layout.split("/")
    for part in parts:
        yield _with(case, layout="/".join([mesh, *(other for other in parts if other != part)]))


def _natural_routing(case: Case) -> Iterator[Case]:
    if case.routing != "natural":
        yield _with(case, routing="natural")


def _fewer_options(case: Case) -> Iterator[Case]:
    for option in case.options:
        if not option.startswith(SIZES):
            yield _with(case, options=tuple(o for o in case.options if o != option))


def _fewer_layers(case: Case) -> Iterator[Case]:
    m, stages = case.config().model, case.config().parallel.num_stages
    for fewer in sorted({stages, m.num_layers // 2, m.num_layers - 1}):
        if 0 < fewer < m.num_layers:
            yield _set(case, f"model.num_layers={fewer}", f"model.num_dense_layers={min(m.num_dense_layers, fewer - 1)}")
    for fewer in sorted({0, m.mtp_depth - 1} - {-1, m.mtp_depth}):
        yield _set(case, f"model.mtp_depth={fewer}")


def _fewer_sequences(case: Case) -> Iterator[Case]:
    c = case.config()
    for fewer in sorted({c.parallel.dp * c.train.micro_batch_sequences, c.sequences_per_step // 2}):
        if 0 < fewer < c.sequences_per_step:
            yield _set(case, f"train.global_batch_tokens={fewer * c.data.seq_len}")


def _fewer_experts(case: Case) -> Iterator[Case]:
    c = case.config()
    m, experts = c.model, c.model.num_experts
    for fewer in sorted({c.parallel.ep, experts // 2}):
        if 0 < fewer < experts:
            yield _set(case, f"model.num_experts={fewer}", f"model.top_k={min(m.top_k, fewer)}", *_UNGROUPED)
    if m.num_groups > 1:
        yield _set(case, *_UNGROUPED)
    for fewer in sorted({1, m.top_k // 2}):
        if 0 < fewer < m.top_k:
            yield _set(case, f"model.top_k={fewer}")


WAYS = (_fewer_steps, _fewer_ranks, _usual_schedule, _natural_routing, _fewer_options, _fewer_layers, _fewer_sequences, _fewer_experts)
SIZES = ("model.num_", "model.top_k", "model.mtp_depth", "train.steps", "train.global_batch")  # options that other ways make smaller
_UNGROUPED = ("model.num_groups=1", "model.num_limited_groups=1")


def _set(case: Case, *words: str) -> Case:
    keys = {word.partition("=")[0] for word in words}
    return _with(case, options=(*(o for o in case.options if o.partition("=")[0] not in keys), *words))


def _with(case: Case, **changes) -> Case:
    kept = {"layout": case.layout, "options": case.options, "routing": case.routing, "base": case.base}
    return Case(**(kept | changes))
