"""`shoestring plan`: words in; a table and plan.json out.

request.py    what is asked            layouts.py   what layouts there are
search.py     the best of them         plans.py     one of them, priced; phases.py: phase by phase
conflicts.py  why nothing will do      table.py, page.py, ladder.py   how it is shown
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from ...conf.errors import ConfigError
from ...train import units
from ...train.metrics import replace_file
from .. import exit_codes
from . import table
from .conflicts import LARGEST, none_of_any_size, nothing_fits, out_of_bounds, sizes
from .layouts import Layout
from .page import page
from .plans import Plan, planned, write
from .request import Asked, Request, ask, parse
from .search import MOST, check_all, fullest_rank, must_fit, search

MOST_AUTO = 12  # layouts simulated for each size, where the size is searched


def main(words: Sequence[str], config_dir: str | None) -> int:
    return plan(parse(words, config_dir))


def plan(request: Request, say: Callable[[str], None] = print) -> int:
    """Exit code: that of a wrong configuration where there is no plan, or none that keeps to the deadline and the budget."""
    asked = ask(request)
    outcome = choose(asked)
    notes = [*asked.notes, *outcome.notes]
    for line in notes:
        say(line)
    if not outcome.plans:
        return exit_codes.CONFIG
    say(f"projected, {'the layout asked for' if not request.search else 'cheapest first'}:")
    for line in table.rows(outcome.plans):
        say("  " + line)
    say("")
    for line in table.details(outcome.plans[0]):
        say(line)
    if request.output:
        write(request.output, outcome.plans, _plain(asked), notes)
        say(f"plans    {request.output}\nrun it   shoestring launch plan={request.output}")
    if request.page:
        replace_file(request.page, page(outcome.plans, notes, request.command))
        say(f"page     {request.page}")
    return exit_codes.OK if outcome.met else exit_codes.CONFIG


def _plain(asked: Asked) -> dict:
    request = asked.request
    return {
        "words": list(request.words), "gpus": request.gpus, "tokens": asked.tokens, "budget_usd": request.budget_usd or None,
        "deadline_days": request.deadline_days or None, "search": request.search,
    }  # fmt: skip


# ---------------------------------------------------------------- what can be done


@dataclass(kw_only=True)
class Outcome:
    """`met`: within the deadline and the budget, where there are any, and in memory."""

    plans: list[Plan] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    met: bool = True


def choose(asked: Asked) -> Outcome:
    """Raises ConfigError."""
    if not asked.request.search:
        return _exact(asked)
    return _any_size(asked) if asked.request.gpus is None else _of_size(asked)


def priced_exactly(request: Request) -> Plan:
    """The plan of the layout that the words make, whether it fits or not."""
    return _exact(ask(request)).plans[0]


def _exact(asked: Asked) -> Outcome:
    config, p = asked.config, asked.config.parallel
    team = config.stack.team
    if asked.request.gpus and asked.request.gpus != p.world_size * team:
        rule = f"search=false prices pp x edp x ep = {p.pp} x {p.edp} x {p.ep}" + f" teams of {team}" * (team > 1)
        raise ConfigError("gpus", asked.request.gpus, rule, p.world_size * team)
    check_all(config)
    found = planned(asked, Layout.of(config), config)
    too_large = _too_large(asked)
    missed = out_of_bounds(asked, found)
    return Outcome(plans=[found], notes=[*too_large, *found.notes, *missed], met=not (too_large or missed))


def _too_large(asked: Asked) -> list[str]:
    config, imbalance = asked.config, must_fit(asked.config)
    gb = fullest_rank(config, imbalance).total / 1e9
    return [f"does not fit: {gb:.1f} GB, at imbalance {imbalance:g}, of {config.cluster.memory_gb:g}"] * (gb > config.cluster.memory_gb)


def _of_size(asked: Asked) -> Outcome:
    request = asked.request
    gpus = request.gpus or asked.config.parallel.world_size
    if gpus == 1 and not request.gpus:
        raise ConfigError("gpus", "", "must be given, for example gpus=2048, or gpus=auto with deadline_days= or budget_usd=")
    config = asked.at(gpus)
    if config.stack.team > 1:
        raise ConfigError("stack.tensor", config.stack.tensor, "is priced in a layout that is given, not searched: add search=false")
    found = search(config, gpus, fixed=asked.fixed, keep=request.top, most=MOST)
    if not found.best:
        return Outcome(notes=nothing_fits(asked, gpus, found), met=False)
    plans = sorted((planned(asked, p.layout, p.config) for p in found.best[: request.top]), key=_dollars)
    others = "the others have bounds above the best" if found.exhausted else "those with the lowest bounds"
    told = f"{found.tried:,} layouts of {gpus:,} GPUs: {found.simulated} simulated, {others}"
    too_large = f"; {found.too_large} too large for {config.cluster.memory_gb:g} GB" * bool(found.too_large)
    missed = out_of_bounds(asked, plans[0])
    return Outcome(plans=plans, notes=[told + too_large, *_beaten(asked, plans[0], gpus), *plans[0].notes, *missed], met=not missed)


def _dollars(plan: Plan) -> float:
    return plan.run.dollars.likely


def _days(plan: Plan) -> float:
    return plan.run.days.likely


def _beaten(asked: Asked, best: Plan, gpus: int) -> Iterator[str]:
    """Why the layout of the words, if they have one of this size, is not the best."""
    config, layout = asked.config, Layout.of(asked.config)
    if config.parallel.world_size != gpus or gpus == 1 or layout == best.layout:
        return
    try:
        check_all(config)
    except ConfigError as error:
        yield f"asked for: {layout}: invalid: {error}"
        return
    if too_large := _too_large(asked):
        yield f"asked for: {layout}: {too_large[0]}"
        return
    step = planned(asked, layout, config).step
    slower = step.expected.likely / best.step.expected.likely - 1
    if slower > 0:
        parts = {name: step.breakdown[name] - best.step.breakdown.get(name, 0.0) for name in step.breakdown}
        most = max(parts, key=parts.__getitem__)
        yield f"asked for: {layout}: {units.percent(slower)} slower than the best, most of it {most} ({parts[most]:+.3g} s a step)"


def _any_size(asked: Asked) -> Outcome:
    """The cheapest that keeps to the deadline and the budget; with a budget alone, the fastest that it pays for."""
    request, outcome, plans = asked.request, Outcome(), []
    for gpus in sizes():
        found = search(asked.at(gpus), gpus, fixed=asked.fixed, keep=1, most=MOST_AUTO)
        if not found.best:
            continue
        best = planned(asked, found.best[0].layout, found.best[0].config)
        plans.append(best)
        outcome.notes.append(f"{gpus:>6,} GPUs: {_days(best):8.1f} days, {units.money(_dollars(best))}: {best.layout}")
        if request.deadline_days and _days(best) <= request.deadline_days:
            break
    if not plans:
        return Outcome(notes=[f"nothing fits up to {LARGEST:,} GPUs"], met=False)
    keeping = [plan for plan in plans if not out_of_bounds(asked, plan)]
    if keeping:
        fastest = request.budget_usd and not request.deadline_days
        outcome.plans = sorted(keeping, key=_days if fastest else _dollars)[: request.top]
        outcome.notes += outcome.plans[0].notes
    else:
        outcome.notes += none_of_any_size(asked, plans)
        outcome.met = False
    return outcome
