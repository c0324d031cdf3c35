"""The smallest case that still fails: fewer ranks, options, layers, experts, micro-batches and steps, as long as it does.

Greedy, and only as good as that: each accepted change is smaller by itself, and at the end no single change is left that fails.
"""

import time
from collections.abc import Callable, Iterator

from ...conf.errors import ConfigError
from .cases import Case, layout_words

PATIENCE_S = 180.0


def shrink(case: Case, fails: Callable[[Case], bool], patience_s: float = PATIENCE_S) -> Case:
    """`fails(case)`, of a valid case. Ends after `patience_s` with what it has by then."""
    deadline, refuted = time.monotonic() + patience_s, set()
    while True:
        for smaller in _smaller(case):
            if time.monotonic() > deadline:
                return case
            if smaller not in refuted and _valid(smaller) and fails(smaller):
                case = smaller
                break
            refuted.add(smaller)
        else:
            return case


def _valid(case: Case) -> bool:
    try:
        case.config()
        return True
    except ConfigError:
        return False


def _smaller(case: Case) -> Iterator[Case]:
    """What saves most comes first."""
    config = case.config()
    m, p, t = config.model, config.parallel, config.train
    for layout in _smaller_layouts(case.layout):
        yield _with(case, layout=layout)
    if case.routing != "natural":
        yield _with(case, routing="natural")
    for option in case.options:
        key = option.partition("=")[0]
        if not key.startswith(("model.num_", "model.top_k", "train.steps", "train.global_batch")):
            yield _with(case, options=tuple(o for o in case.options if o != option))
    for layers in sorted({max(p.num_stages, 1), m.num_layers // 2, m.num_layers - 1}):
        if 0 < layers < m.num_layers:
            yield _set(case, f"model.num_layers={layers}", f"model.num_dense_layers={min(m.num_dense_layers, layers - 1)}")
    if t.steps > 1:
        yield _set(case, f"train.steps={t.steps - 1}")
    sequences = config.sequences_per_step
    for fewer in sorted({p.dp * t.micro_batch_sequences, sequences // 2}):
        if 0 < fewer < sequences:
            yield _set(case, f"train.global_batch_tokens={fewer * config.data.seq_len}")
    if m.num_experts > 1:
        experts = m.num_experts // 2
        yield _set(case, f"model.num_experts={experts}")
        without_groups = ("model.num_groups=1", "model.num_limited_groups=1", f"model.top_k={min(m.top_k, experts)}")
        yield _set(case, f"model.num_experts={experts}", *without_groups)
    if m.top_k > 1:
        yield _set(case, f"model.top_k={m.top_k // 2}")


def _smaller_layouts(layout: str) -> Iterator[str]:
    mesh, *parts = layout.split("/")
    sizes = dict(zip(("pp", "edp", "ep"), (int(word.partition("=")[2]) for word in layout_words(mesh))))
    for axis, size in sizes.items():
        for fewer in sorted({1, size // 2} - {0, size}):
            if fewer < size:
                smaller = sizes | {axis: fewer}
                yield "/".join(["".join(f"{a}{n}" for a, n in smaller.items() if n > 1) or "pp1", *parts])
    for part in parts:
        yield "/".join([mesh, *(other for other in parts if other != part)])


def _set(case: Case, *words: str) -> Case:
    keys = {word.partition("=")[0] for word in words}
    return _with(case, options=(*(o for o in case.options if o.partition("=")[0] not in keys), *words))


def _with(case: Case, **changes) -> Case:
    kept = {"layout": case.layout, "options": case.options, "routing": case.routing, "base": case.base}
    return Case(**(kept | changes))
