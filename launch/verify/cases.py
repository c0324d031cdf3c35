"""What is to be proved: layouts, and settings that must not change what a layout computes, as words of the command line.

A layout is written pp2edp2ep4, with a schedule or a dispatcher behind it where they are not the usual ones: pp2ep4/interleaved_1f1b.
"""

import functools
import itertools
import random
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import yaml

from ...conf.compose import load
from ...conf.errors import ConfigError, most_like
from ...conf.rules import check, get, replaced
from ...conf.schema import Config
from ...parallel.dispatch import DISPATCHERS
from ...parallel.schedule import SCHEDULES
from ..validate import validate
from . import routing
from .certificate import Invalid

# What is proved unless it is asked otherwise: small, well-conditioned, and with everything that may go wrong switched on.
USUAL = (
    "model=micro", "precision=fp64", "data=synthetic", "data.sources.synthetic.num_documents=200", "data.seq_len=8",
    "train.micro_batch_sequences=1", "data.eval_fraction=0", "optim.warmup_steps=1", "optim.lr=5e-4", "optim.clip=0.5",
    "optim.eps=1e-6", "optim.z_loss_coef=1e-3", "optim.sequence_balance_coef=1e-2", "optim.bias_update_speed=1e-2",
    "checkpoint.keep_last=1000", "checkpoint.async_save=false",
)  # fmt: skip
CONFIG_DIR = "--config-dir="  # a word like the others, so that a case's words are its whole configuration

# Each value of each of these meets each value of every other, and each of a few layouts, in some case, as far as they can go together.
OPTIONS: dict[str, tuple[str, ...]] = {
    "precision": ("fp64", "fp32", "bf16", "fp8"),
    "optim.engine": ("whole", "deepspeed"),
    "optim.algorithm": ("adamw", "muon"),
    "optim.moments": ("auto", "fp32", "bf16"),
    "optim.offload": ("false", "true"),
    "optim.ema_decay": ("0", "0.9"),
    "train.recompute": ("[]", "[norm,mla_up,swiglu]", "[attention,experts]"),
    "train.micro_batch_sequences": ("1", "2"),
    "model.mtp_depth": ("0", "1", "2"),
    "model.tie_embeddings": ("false", "true"),
    "parallel.placement_interval": ("0", "1"),
    "routing": ("natural", "one_expert", "idle_rank", "alternating", "ties"),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """`base` makes a configuration of one process; `options` and the layout change it."""

    layout: str
    options: tuple[str, ...] = ()  # what is not as in the other cases
    routing: str = "natural"
    base: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return " ".join([self.layout, *self.options, *([f"routing={self.routing}"] if self.routing != "natural" else [])])

    @property
    def command(self) -> str:
        """What proves this case alone."""
        chosen = [f"routing={self.routing}"] * (self.routing != "natural")
        changed = {word.partition("=")[0] for word in self.options}
        usual = [word for word in USUAL if not word.startswith(own_of(self.base))]
        base = [word for word in self.base if word not in usual and word.partition("=")[0] not in changed]
        return shlex.join(["shoestring", "verify", f"layouts={self.layout}", *chosen, *base, *self.options])

    def config(self, *more: str) -> Config:
        """Checked by every owner's rules. Raises ConfigError."""
        return changed(composed(self.base), [*self.options, *layout_words(self.layout), *more])


def own_of(words: Sequence[str]) -> tuple[str, ...]:
    """How usual words begin that give way to the user's experiment, which has its own."""
    return ("model=", "optim.") if any(word.partition("=")[0].lstrip("+~") == "experiment" for word in words) else ()


@functools.cache
def composed(words: tuple[str, ...]) -> Config:
    folders = [word.removeprefix(CONFIG_DIR) for word in words if word.startswith(CONFIG_DIR)]
    return load([word for word in words if not word.startswith(CONFIG_DIR)], *folders)


def changed(config: Config, words: Sequence[str]) -> Config:
    """With other values of single settings, or another precision; checked. A tenth of what composing anew takes."""
    for word in words:
        key, _, value = word.partition("=")
        if key == "precision":
            config = replaced(config, key, composed((word,)).precision)
        else:
            config = replaced(config, key, type(get(config, key))(yaml.safe_load(value)))
    check(config)
    validate(config)
    return config


# ---------------------------------------------------------------- layouts


def layout_words(layout: str) -> list[str]:
    """Raises ConfigError for what is no layout."""
    mesh, *parts = layout.split("/")
    sizes = re.fullmatch(r"(?:pp(\d+))?(?:edp(\d+))?(?:ep(\d+))?", mesh)
    if not mesh or sizes is None:
        raise ConfigError("layouts", layout, "is no layout: write all, smoke, exhaustive, or such as pp2ep2 or pp2edp2ep2/interleaved_1f1b")
    words = [f"parallel.{axis}={size or 1}" for axis, size in zip(("pp", "edp", "ep"), sizes.groups())]
    for part in parts:
        if part in DISPATCHERS:
            words.append(f"parallel.dispatcher={part}")
        elif part in SCHEDULES:
            words += [f"parallel.schedule={part}", f"parallel.chunks={_chunks(part, int(sizes[1] or 1))}"]
        else:
            known = [*SCHEDULES, *DISPATCHERS]
            raise ConfigError("layouts", layout, f"{part} is no schedule and no dispatcher: {', '.join(known)}", most_like(part, known))
    return words


def _chunks(schedule: str, pp: int) -> int:
    """As few as the schedule allows."""
    broken = SCHEDULES[schedule].rule(pp, 1, 8 * pp)
    return broken[2] if broken and broken[0] == "parallel.chunks" else 1


def layouts(world: int) -> Iterator[str]:
    """Every mesh of that many ranks with every schedule and every dispatcher, valid or not; the usual ones go without saying."""
    for pp, edp in itertools.product(range(1, world + 1), repeat=2):
        if world % (pp * edp):
            continue
        ep = world // (pp * edp)
        sizes = {"pp": pp, "edp": edp, "ep": ep}
        mesh = "".join(f"{axis}{size}" for axis, size in sizes.items() if size > 1) or "pp1"
        for schedule, dispatcher in itertools.product(SCHEDULES, DISPATCHERS):
            usual = "local" if ep == 1 else "alltoall"
            yield "/".join([mesh, *[schedule] * (schedule != "1f1b"), *[dispatcher] * (dispatcher != usual)])


def checked(cases: Sequence[Case]) -> tuple[list[Case], list[Invalid]]:
    """Those that can run, and why the others cannot."""
    valid, invalid = [], []
    for case in cases:
        try:
            routing.make(case.routing, case.config())
            valid.append(case)
        except ConfigError as error:
            if error.field == "layouts":  # no layout at all
                raise
            invalid.append(Invalid(name=case.name, why=str(error)))
    return valid, invalid


# ---------------------------------------------------------------- which options meet


def option_cases(base: Sequence[str], layouts_: Sequence[str]) -> list[Case]:
    """Cases in which every pair of values of `OPTIONS`, and some of the layouts, meets, as far as the configuration allows it. What the
    user has set is left alone: what is in `base` and not in `USUAL`."""
    usual = composed(tuple(base))
    given = {word.partition("=")[0].lstrip("+~") for word in base if word not in USUAL}
    options = {"layout": _few(layouts_)} | {name: values for name, values in OPTIONS.items() if name not in given}

    def case(row: Mapping[str, str]) -> Case:
        words = tuple(f"{name}={value}" for name, value in row.items() if name not in ("layout", "routing") and not _is(usual, name, value))
        return Case(layout=row["layout"], options=words, routing=row.get("routing", "natural"), base=tuple(base))

    def possible(row: Mapping[str, str]) -> bool:
        try:
            case(row).config()
        except ConfigError:
            return False
        return True

    return [case(row) for row in covering(options, possible)]


def _few(layouts_: Sequence[str]) -> list[str]:
    """Four meshes and one of another schedule, as different as they come."""
    meshes, others = [name for name in layouts_ if "/" not in name], [name for name in layouts_ if "/" in name]
    return [*dict.fromkeys(meshes[i * len(meshes) // 4] for i in range(4) if meshes), *others[len(others) // 2 :][:1]]


def _is(config: Config, name: str, value: str) -> bool:
    if name == "precision":
        return config.precision.name == value
    return get(config, name) == type(get(config, name))(yaml.safe_load(value))


def covering(options: Mapping[str, Sequence[str]], possible: Callable[[Mapping[str, str]], bool], seed: int = 0) -> list[dict[str, str]]:
    """Few rows in which each pair of values of different options occurs, if a possible row has it, with at most two further values that are
    not the first of theirs. `possible(row)`: of a whole row.

    Greedy: a row begins with a pair that is still missing, and takes for every other option, in random order, the value that meets the
    most missing pairs among those with which some row is still found.
    """
    names, random_ = list(options), random.Random(seed)
    pairs = lambda row: set(itertools.combinations([(name, row[name]) for name in names if name in row], 2))
    tried = functools.cache(lambda row: possible(dict(row)))

    def completed(row: Mapping[str, str]) -> dict[str, str] | None:
        """A possible row with these values: the first value of every other option, or with up to two of those changed."""
        usual = {name: values[0] for name, values in options.items()} | dict(row)
        changes = [(name, value) for name in names if name not in row for value in options[name][1:]]
        for change in [(), *itertools.combinations(changes, 1), *itertools.combinations(changes, 2)]:
            if tried(tuple((usual | dict(change)).items())):
                return usual | dict(change)
        return None

    every = [{a: x, b: y} for a, b in itertools.combinations(names, 2) for x, y in itertools.product(options[a], options[b])]
    missing = {next(iter(pairs(pair))) for pair in every if completed(pair)}
    rows = []
    while missing:
        row = dict(min(missing, key=lambda pair: [(names.index(name), list(options[name]).index(value)) for name, value in pair]))
        for name in random_.sample(names, len(names)):
            if name not in row:
                best = sorted(options[name], key=lambda value: -len(pairs(row | {name: value}) & missing))
                row[name] = next(value for value in best if completed(row | {name: value}))
        missing -= pairs(row)
        rows.append({name: row[name] for name in names})
    return rows
