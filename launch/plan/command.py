"""`shoestring plan`: words in; a table and plan.json out. Where nothing will do: what conflicts, and the nearest request that will do."""

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING

from ...conf.compose import load
from ...conf.errors import ConfigError, closest
from ...conf.rules import replaced
from ...conf.schema import Config
from ...train import units
from ...train.metrics import replace_file
from .. import exit_codes
from . import table
from .layouts import Layout
from .page import page
from .plans import Plan, planned, write
from .search import MOST, Priced, Search, check_all, fullest_rank, search

OWN = ("gpus", "tokens", "budget_usd", "deadline_days", "search", "output", "page", "top")
IMBALANCES = (1.0, 1.5, 2.0)
TOKENS_PER_GPU = 30_720  # of a step, where nobody says: DeepSeek-V3's 15,360 sequences on 2,048 GPUs
ANY_BATCH = 105 << 40  # tokens that any layout shares out, until there is a batch
MOST_AUTO = 12  # layouts simulated for each size, where the size is searched
LARGEST = 16_384


@dataclass(frozen=True, kw_only=True)
class Request:
    """`words`: settings of the configuration. `gpus`: None where any number will do; 0 where nobody said."""

    words: tuple[str, ...]
    config_dir: str | None = None
    gpus: int | None = 0
    tokens: float = 0.0
    budget_usd: float = 0.0
    deadline_days: float = 0.0
    search: bool = True
    output: Path | None = None
    page: Path | None = None
    top: int = 5

    @property
    def command(self) -> str:
        own = {"gpus": "auto" if self.gpus is None else self.gpus, "tokens": self.tokens, "budget_usd": self.budget_usd,
               "deadline_days": self.deadline_days, "search": "" if self.search else "false"}  # fmt: skip
        return shlex.join(["shoestring", "plan", *self.words, *(f"{key}={value}" for key, value in own.items() if value)])

    @property
    def fixed(self) -> frozenset[str]:
        """Keys that the user has set, which a search leaves alone; a preset of the group `parallel` is one layout among others."""
        return frozenset(word.partition("=")[0].lstrip("+~") for word in self.words)


def parse(words: Sequence[str], config_dir: str | None = None) -> Request:
    """Raises ConfigError for a word of ours that is no number where it must be one."""
    own: dict = {}
    settings = []
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or key not in OWN:
            settings.append(word)
        elif key == "gpus":
            own[key] = None if value == "auto" else _whole(key, value)
        elif key == "top":
            own[key] = _whole(key, value)
        elif key in ("output", "page"):
            own[key] = Path(value)
        elif key == "search":
            if value not in ("true", "false"):
                raise ConfigError(key, value, "must be true or false: false prices the layout that is given", "false")
            own[key] = value == "true"
        else:
            own[key] = _positive(key, value)
    return Request(words=tuple(settings), config_dir=config_dir, **own)


def _whole(key: str, value: str) -> int:
    number = _positive(key, value)
    if number != int(number):
        raise ConfigError(key, value, "must be a whole number", max(1, round(number)))
    return int(number)


def _positive(key: str, value: str) -> float:
    try:
        number = float(value.replace("_", ""))
    except ValueError:
        raise ConfigError(key, value, "must be a number" + (" or auto" if key == "gpus" else "")) from None
    if not 0 < number < float("inf"):
        raise ConfigError(key, value, "must be positive")
    return number


def main(words: Sequence[str], config_dir: str | None) -> int:
    return plan(parse(words, config_dir))


def plan(request: Request, say=print) -> int:
    """Exit code: that of a wrong configuration where there is no plan, or none that keeps to the deadline and the budget."""
    config, notes = compose(request)
    tokens = request.tokens or _tokens(config)
    config = replaced(config, "phases", type(config.phases)())
    outcome = _choose(request, config, tokens)
    for line in [*notes, *outcome.notes]:
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
        write(request.output, outcome.plans, _plain(request, tokens), [*notes, *outcome.notes])
        say(f"plans    {request.output}\nrun it   shoestring launch plan={request.output}")
    if request.page:
        replace_file(request.page, page(outcome.plans, [*notes, *outcome.notes], request.command))
        say(f"page     {request.page}")
    return exit_codes.OK if outcome.met else exit_codes.CONFIG


def _plain(request: Request, tokens: float) -> dict:
    return {
        "words": list(request.words), "gpus": request.gpus, "tokens": tokens, "budget_usd": request.budget_usd or None,
        "deadline_days": request.deadline_days or None, "search": request.search,
    }  # fmt: skip


# ---------------------------------------------------------------- what is asked


def compose(request: Request) -> tuple[Config, list[str]]:
    """The configuration of one process, with a batch, a sequence length and a number of tokens for what nobody set; and what was made up.
    Raises ConfigError."""
    words, notes, chosen = list(request.words), [], request.fixed
    if "experiment" in chosen:
        return _load(words, request.config_dir), notes
    batch = "train.global_batch_tokens"
    config = _load([*words, *[f"{batch}={ANY_BATCH}"] * (batch not in chosen)], request.config_dir)
    seq_len = config.data.seq_len
    if "data.seq_len" not in chosen:
        seq_len = min(4096, config.model.max_seq_len)
        words.append(f"data.seq_len={seq_len}")
        notes.append(f"data.seq_len is not given: sequences of {seq_len:,} tokens")
    if batch not in chosen:
        gpus = request.gpus or max(64, config.parallel.world_size)
        unit = config.parallel.dp * config.train.micro_batch_sequences
        sequences = _round(max(1, gpus * TOKENS_PER_GPU // seq_len))
        sequences = max(1, sequences // unit) * unit
        words.append(f"{batch}={sequences * seq_len}")
        notes.append(f"{batch} is not given: {sequences:,} sequences a step, for {gpus:,} GPUs")
    if not chosen & {"train.tokens", "train.steps"} and not request.tokens:
        words.append("train.tokens=1_000_000_000_000")
        notes.append("tokens is not given: a trillion")
    return _load(words, request.config_dir), notes


def _load(words: list[str], config_dir: str | None) -> Config:
    """A plan does not look at data: where its sources lack something, it has any. `words` grows by that."""
    for _ in range(len(words) + 8):
        try:
            return load(words, config_dir)
        except ConfigError as error:
            if not error.field.startswith("data.sources.") or error.value != MISSING:
                raise
            words.append(f"{error.field}=[any]")
    return load(words, config_dir)


def _round(sequences: int) -> int:
    """Down to a number with many divisors, for ranks and micro-batches to share out."""
    unit = 1 << max(0, sequences.bit_length() - 5)
    return max(1, sequences // unit * unit)


def _tokens(config: Config) -> float:
    """Of the whole run, all phases."""
    if config.phases:
        return float(sum(p.train.tokens or p.train.steps * p.train.global_batch_tokens for p in config.phases.values()))
    return float(config.train.tokens or config.train.steps * config.train.global_batch_tokens)


# ---------------------------------------------------------------- what can be done


@dataclass(kw_only=True)
class Outcome:
    """`met`: within the deadline and the budget, where there are any."""

    plans: list[Plan] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    met: bool = True


def _choose(request: Request, config: Config, tokens: float) -> Outcome:
    if not request.search:
        return _exact(request, config, tokens)
    if request.gpus is None:
        return _any_size(request, config, tokens)
    gpus = request.gpus or config.parallel.world_size
    if gpus == 1 and not request.gpus:
        raise ConfigError("gpus", "", "must be given, for example gpus=2048, or gpus=auto with deadline_days= or budget_usd=")
    found = _search(request, config, gpus, MOST)
    if not found.best:
        return Outcome(notes=_nothing_fits(request, config, gpus, found), met=False)
    outcome = Outcome(plans=sorted((_plan(request, p, tokens) for p in found.best[: request.top]), key=_price))
    told = f"{found.tried:,} layouts of {gpus:,} GPUs: {found.simulated} simulated, the others have bounds above the best"
    outcome.notes.append(told + f"; {found.too_large} too large for {config.cluster.memory_gb:g} GB" * bool(found.too_large))
    outcome.notes += _asked(request, config, gpus, outcome.plans[0], tokens)
    _keep_to(request, config, outcome, tokens)
    return outcome


def _search(request: Request, config: Config, gpus: int, most: int) -> Search:
    return search(config, gpus, fixed=request.fixed, keep=request.top, most=most, imbalance=_imbalance(config))


def _imbalance(config: Config) -> float:
    """That must fit: the worst that the term allows."""
    term = config.stack.terms.get("imbalance")
    return max(1.0, term.high) if term else 1.0


def _plan(request: Request, priced: Priced, tokens: float) -> Plan:
    layout = {word.partition("=")[0] for word in priced.layout.words}
    batch = f"train.global_batch_tokens={priced.config.train.global_batch_tokens}", f"data.seq_len={priced.config.data.seq_len}"
    own = [word for word in request.words if word.partition("=")[0].lstrip("+") not in layout]
    given = {word.partition("=")[0] for word in own}
    words = [*own, *(word for word in batch if word.partition("=")[0] not in given and "experiment" not in given), *priced.layout.words]
    by_imbalance = {i: fullest_rank(priced.config, i) for i in IMBALANCES}
    gb = {imbalance: found.total / 1e9 for imbalance, found in by_imbalance.items()}
    return planned(priced, tokens, words, gb, by_imbalance[1.0].peak_at)


def _price(plan: Plan) -> float:
    return plan.run.dollars.likely


def priced_exactly(request: Request) -> Plan:
    """The plan of the layout that the words make, whether it fits or not."""
    config, _ = compose(request)
    tokens = request.tokens or _tokens(config)
    return _exact(request, replaced(config, "phases", type(config.phases)()), tokens).plans[0]


def _exact(request: Request, config: Config, tokens: float) -> Outcome:
    world = config.parallel.world_size
    if request.gpus and request.gpus != world:
        p = config.parallel
        raise ConfigError("gpus", request.gpus, f"search=false prices pp x edp x ep = {p.pp} x {p.edp} x {p.ep}", world)
    check_all(config)
    layout = Layout.of(config)
    priced = Priced(layout=layout, config=config, step=None, memory=fullest_rank(config, 1.0))
    outcome = Outcome(plans=[_plan(request, priced, tokens)])
    fullest = fullest_rank(config, _imbalance(config)).total / 1e9
    if fullest > config.cluster.memory_gb:
        outcome.notes.append(f"does not fit: {fullest:.1f} GB, at imbalance {_imbalance(config):g}, of {config.cluster.memory_gb:g}")
        outcome.met = False
    _keep_to(request, config, outcome, tokens)
    return outcome


def _asked(request: Request, config: Config, gpus: int, best: Plan, tokens: float) -> Iterator[str]:
    """Why the layout of the words, if they have one of this size, is not the best."""
    layout = Layout.of(config)
    if config.parallel.world_size != gpus or gpus == 1 or layout == best.layout:
        return
    try:
        check_all(config)
    except ConfigError as error:
        yield f"asked for: {layout}: invalid: {error}"
        return
    fullest = fullest_rank(config, _imbalance(config)).total / 1e9
    if fullest > config.cluster.memory_gb:
        yield f"asked for: {layout}: does not fit: {fullest:.1f} of {config.cluster.memory_gb:g} GB at imbalance {_imbalance(config):g}"
        return
    asked = _plan(request, Priced(layout=layout, config=config, step=None, memory=fullest_rank(config, 1.0)), tokens)
    slower = asked.step.expected.likely / best.step.expected.likely - 1
    if slower > 0:
        parts = {name: asked.step.breakdown[name] - best.step.breakdown.get(name, 0.0) for name in asked.step.breakdown}
        most = max(parts, key=parts.__getitem__)
        yield f"asked for: {layout}: {units.percent(slower)} slower than the best, most of it {most} ({parts[most]:+.3g} s a step)"


# ---------------------------------------------------------------- what cannot


def _keep_to(request: Request, config: Config, outcome: Outcome, tokens: float) -> None:
    """Whether the best keeps to the deadline and the budget; if not, what would."""
    best = outcome.plans[0].run
    if request.deadline_days and best.days.likely > request.deadline_days:
        outcome.met = False
        affordable = units.count(tokens * request.deadline_days / best.days.likely)
        outcome.notes.append(
            f"deadline_days = {request.deadline_days:g} is beyond reach of {best.gpus:,} GPUs, which take {best.days.likely:.1f} days: "
            f"gpus=auto finds how many it takes, or tokens={affordable.replace(' ', '')} are done by then"
        )
    if request.budget_usd and best.dollars.likely > request.budget_usd:
        outcome.met = False
        outcome.notes.append(
            f"budget_usd = {request.budget_usd:,.0f} does not pay for {units.count(tokens)} tokens, which cost "
            f"{units.money(best.dollars.likely)}: it pays for {units.count(tokens * request.budget_usd / best.dollars.likely)}"
        )


def _nothing_fits(request: Request, config: Config, gpus: int, found: Search) -> list[str]:
    if not found.tried:
        wanted = sorted(request.fixed & Layout.of(config).settings.keys())
        with_them = f" with {', '.join(wanted)} as given" * bool(wanted)
        lots = config.sequences_per_step
        return [
            f"no layout of {gpus:,} GPUs{with_them} shares out {lots:,} sequences a step of {config.model.num_layers} layers and "
            f"{config.model.num_experts} experts; nearest: gpus={_nearest_size(request, config, gpus)}"
        ]
    lines = []
    if found.smallest:
        layout, num_bytes = found.smallest
        lines.append(
            f"nothing fits: of {found.too_large} layouts of {gpus:,} GPUs the smallest takes {num_bytes / 1e9:.1f} GB, and a "
            f"{config.cluster.device} has {config.cluster.memory_gb:g}: {layout}"
        )
        larger = next((size for size in _sizes(gpus + 1) if _search(request, config, size, 1).best), None)
        lines.append(f"nearest that fits: gpus={larger}" if larger else f"nothing fits up to {LARGEST:,} GPUs either")
        if not config.optim.offload and _search(request, replaced(config, "optim.offload", True), gpus, 1).best:
            lines.append(f"or, on {gpus:,}: optim.offload=true, masters and moments on the hosts")
    if found.first_error:
        lines.append(f"{found.invalid} layouts are invalid; the first: {found.first_error}")
    return lines


def _sizes(first: int) -> Iterator[int]:
    """Powers of two, whole nodes."""
    size = 8
    while size <= LARGEST:
        if size >= first:
            yield size
        size *= 2


def _nearest_size(request: Request, config: Config, gpus: int) -> int | None:
    sizes = [size for size in _sizes(8) if _search(request, config, size, 1).tried]
    return closest(gpus, sizes) if sizes else None


def _any_size(request: Request, config: Config, tokens: float) -> Outcome:
    """The smallest size that keeps to the deadline; with a budget, the fastest that it pays for; else the cheapest."""
    outcome, plans = Outcome(), []
    for gpus in _sizes(8):
        found = _search(request, config, gpus, MOST_AUTO)
        if not found.best:
            continue
        best = _plan(request, found.best[0], tokens)
        plans.append(best)
        outcome.notes.append(f"{gpus:>6,} GPUs: {best.run.days.likely:8.1f} days, {units.money(best.run.dollars.likely)}: {best.layout}")
        if request.deadline_days and best.run.days.likely <= request.deadline_days:
            break
    paid = [p for p in plans if not request.budget_usd or p.run.dollars.likely <= request.budget_usd]
    in_time = [p for p in paid if not request.deadline_days or p.run.days.likely <= request.deadline_days]
    outcome.met = bool(in_time)
    if in_time:
        by_days = request.budget_usd and not request.deadline_days
        outcome.plans = sorted(in_time, key=lambda p: p.run.days.likely if by_days else p.run.dollars.likely)[: request.top]
    elif plans:
        outcome.plans = [min(plans, key=lambda p: p.run.days.likely if request.deadline_days else p.run.dollars.likely)]
        _keep_to(request, config, outcome, tokens)
    else:
        outcome.notes.append(f"nothing fits up to {LARGEST:,} GPUs")
    return outcome
