"""What cannot be: which wishes conflict, and the nearest request that will do."""

from collections.abc import Iterator

from ...conf.errors import closest
from ...conf.rules import get, replaced
from ...conf.schema import Config
from ...train import units
from .layouts import Layout, candidates
from .plans import Plan
from .request import Asked
from .search import Search, search

LARGEST = 16_384
MOST_NEAR = 8  # sizes that are tried for whether they have a layout at all


def sizes(first: int = 8) -> Iterator[int]:
    """Numbers of GPUs that are tried: powers of two, whole nodes."""
    size = 8
    while size <= LARGEST:
        if size >= first:
            yield size
        size *= 2


def out_of_bounds(asked: Asked, plan: Plan) -> list[str]:
    """How a plan misses the deadline or the budget, and what would keep to it; empty if it keeps to both."""
    request, run, lines = asked.request, plan.run, []
    if request.deadline_days and run.days.likely > request.deadline_days:
        done = units.count(asked.tokens * request.deadline_days / run.days.likely).replace(" ", "")
        more = "gpus=auto finds how many it takes, or " * (request.gpus is not None)
        lines.append(
            f"deadline_days = {request.deadline_days:g} is beyond reach of {run.gpus:,} GPUs, which take {run.days.likely:.1f} days: "
            f"{more}tokens={done} are done by then"
        )
    if request.budget_usd and run.dollars.likely > request.budget_usd:
        lines.append(
            f"budget_usd = {request.budget_usd:,.0f} does not pay for {units.count(asked.tokens)} tokens, which cost "
            f"{units.money(run.dollars.likely)}: it pays for {units.count(asked.tokens * request.budget_usd / run.dollars.likely)}"
        )
    return lines


def none_of_any_size(asked: Asked, plans: list[Plan]) -> list[str]:
    """Of plans of several sizes none keeps to what is wished: the nearest of each kind."""
    request = asked.request
    days, dollars = (lambda p: p.run.days.likely), (lambda p: p.run.dollars.likely)
    if not (request.deadline_days and request.budget_usd):
        return out_of_bounds(asked, min(plans, key=days if request.deadline_days else dollars))
    lines = [f"deadline_days = {request.deadline_days:g} and budget_usd = {request.budget_usd:,.0f} cannot both be kept to:"]
    for name, kept, least in (("deadline_days", days, dollars), ("budget_usd", dollars, days)):
        limit = getattr(request, name)
        if keep := [p for p in plans if kept(p) <= limit]:
            best = min(keep, key=least)
            lines.append(f"  {name} alone: gpus={best.run.gpus} takes {days(best):.1f} days and {units.money(dollars(best))}")
        else:
            best = min(plans, key=kept)
            lines.append(f"  {name} is beyond reach: gpus={best.run.gpus} takes {days(best):.1f} days and {units.money(dollars(best))}")
    return lines


def nothing_fits(asked: Asked, gpus: int, found: Search) -> list[str]:
    """Of so many GPUs there is no layout, or none that fits."""
    config = asked.at(gpus)
    if not found.tried:
        return [_no_layout(asked, config, gpus)]
    lines = []
    if found.smallest:
        layout, num_bytes = found.smallest
        lines.append(
            f"nothing fits: of {found.too_large} layouts of {gpus:,} GPUs the smallest takes {num_bytes / 1e9:.1f} GB, and one "
            f"{config.cluster.device} has {config.cluster.memory_gb:g}: {layout}"
        )
        fits = lambda config, size: bool(search(config, size, fixed=asked.fixed, keep=1, most=1).best)
        larger = next((size for size in sizes(gpus + 1) if fits(asked.at(size), size)), None)
        lines.append(f"nearest that fits: gpus={larger}" if larger else f"nothing fits up to {LARGEST:,} GPUs either")
        if not config.optim.offload and fits(replaced(config, "optim.offload", True), gpus):
            lines.append(f"or, on {gpus:,}: optim.offload=true, masters and moments on the hosts")
    if found.first_error:
        lines.append(f"{found.invalid} layouts are invalid; the first: {found.first_error}")
    return lines


def _no_layout(asked: Asked, config: Config, gpus: int) -> str:
    """Which of the settings that are given leaves nothing, and what to ask instead."""
    m, p, fixed = config.model, config.parallel, asked.fixed
    if "parallel.ep" in fixed and p.ep > 1 and not m.num_moe_layers:
        return f"parallel.ep = {p.ep}: {m.name} has no experts to share out; nearest: parallel.ep=1"
    given = {key: get(config, key) for key in ("parallel.pp", "parallel.edp", "parallel.ep") if key in fixed}
    product = 1
    for value in given.values():
        product *= value
    shown = " x ".join(f"{key} = {value}" for key, value in given.items())
    if gpus % product:
        near = sorted((product * n for n in range(1, 2 + 2 * gpus // product)), key=lambda size: (abs(size - gpus), size))[:MOST_NEAR]
        requests = [f"gpus={size}" for size in near if _has_layout(asked, size)][:1]
        return f"{shown} does not divide gpus = {gpus:,}" + f"; nearest: {', or '.join(requests)}" * bool(requests)
    wanted = sorted(fixed & Layout.of(config).settings.keys())
    with_them = f" with {', '.join(f'{key}={get(config, key)}' for key in wanted)}" * bool(wanted)
    found = [size for size in sizes() if _has_layout(asked, size)]
    nearest = f"; nearest: gpus={closest(gpus, found)}" if found else ": whatever the number of GPUs"
    return (
        f"no layout of {gpus:,} GPUs{with_them} shares out {config.sequences_per_step:,} sequences a step of {m.num_layers} layers"
        f"{f' and {m.num_experts} experts' * bool(m.num_moe_layers)}{nearest}"
    )


def _has_layout(asked: Asked, gpus: int) -> bool:
    return any(True for _ in candidates(asked.at(gpus), gpus, asked.fixed))
