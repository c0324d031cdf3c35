"""What is to be proved: layouts, and settings that must not change what a layout computes, as words of the command line.

A layout is written pp2edp2ep4, with a schedule or a dispatcher behind it where they are not the usual ones: pp2ep4/interleaved_1f1b.
"""

import functools
import itertools
import random
import re
import shlex
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from ...conf.compose import load
from ...conf.errors import ConfigError, most_like
from ...conf.rules import check, get, replaced
from ...conf.schema import Config
from ...parallel.dispatch import DISPATCHERS, OPTIONAL
from ...parallel.schedule import SCHEDULES
from ..validate import validate
from . import routing
from .certificate import Invalid

# What is proved unless it is asked otherwise: small, well-conditioned, and with everything that may go wrong switched on.
USUAL = (
    "model=micro", "precision=fp64", "data=synthetic", "data.sources.synthetic.num_documents=200", "data.seq_len=16",
    "train.micro_batch_sequences=1", "data.eval_fraction=0", "optim.warmup_steps=1", "optim.lr=5e-4", "optim.clip=0.5",
    "optim.eps=1e-6", "optim.z_loss_coef=1e-3", "optim.sequence_balance_coef=1e-2", "optim.bias_update_speed=1e-2",
    "checkpoint.keep_last=1000", "checkpoint.async_save=false",
)  # fmt: skip
CONFIG_DIR = "--config-dir="  # a word like the others, so that a case's words are its whole configuration

# Each value of each of these meets each value of every other, each schedule, each dispatcher and each of a few meshes, in some case, as
# far as they can go together.
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
            config = replaced(config, key, _typed(config, key, value))
    check(config)
    validate(config)
    return config


def _typed(config: Config, name: str, value: str) -> Any:
    return type(get(config, name))(_loaded(value))


_loaded = functools.cache(yaml.safe_load)  # half of the time that a search for cases takes, otherwise


# ---------------------------------------------------------------- layouts


def layout_words(layout: str) -> list[str]:
    """Raises ConfigError for what is no layout."""
    mesh, *parts = layout.split("/")
    sizes = re.fullmatch(r"(?:pp(\d+))?(?:edp(\d+))?(?:ep(\d+))?", mesh)
    if not mesh or sizes is None:
        raise ConfigError("layouts", layout, "is no layout: write all, smoke, exhaustive, or such as pp2ep2 or pp2edp2ep2/interleaved_1f1b")
    words = [f"parallel.{axis}={size or 1}" for axis, size in zip(("pp", "edp", "ep"), sizes.groups())]
    for part in parts:
        if part in (*DISPATCHERS, *OPTIONAL):
            words.append(f"parallel.dispatcher={part}")
        elif part in SCHEDULES:
            words += [f"parallel.schedule={part}", f"parallel.chunks={_chunks(part, int(sizes[1] or 1))}"]
        else:
            known = [*SCHEDULES, *DISPATCHERS, *OPTIONAL]
            raise ConfigError("layouts", layout, f"{part} is no schedule and no dispatcher: {', '.join(known)}", most_like(part, known))
    return words


def _chunks(schedule: str, pp: int) -> int:
    """As few as the schedule allows."""
    broken = SCHEDULES[schedule].rule(pp, 1, 8 * pp)
    return broken[2] if broken and broken[0] == "parallel.chunks" else 1


Mesh = tuple[int, int, int]  # pp, edp, ep
Parts = tuple[Mesh, str, str]  # with a schedule and a dispatcher


def layouts(world: int) -> dict[str, Parts]:
    """Every mesh of that many ranks with every schedule and every dispatcher, valid or not, as it is written."""
    sizes = itertools.product(range(1, world + 1), repeat=3)
    meshes = [mesh for mesh in sizes if mesh[0] * mesh[1] * mesh[2] == world]
    return {written(*parts): parts for parts in itertools.product(meshes, SCHEDULES, DISPATCHERS)}


def written(mesh: Mesh, schedule: str, dispatcher: str) -> str:
    """Sizes of one, and the usual schedule and dispatcher, go without saying."""
    sizes = "".join(f"{axis}{size}" for axis, size in zip(("pp", "edp", "ep"), mesh) if size > 1) or "pp1"
    usual = "alltoall" if mesh[2] > 1 else "local"
    return "/".join([sizes, *[schedule] * (schedule != "1f1b"), *[dispatcher] * (dispatcher != usual)])


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


# ---------------------------------------------------------------- what meets

Row = Mapping[str, Any]  # of each option a value


def layout_cover(valid: Collection[Parts], gpus_per_node: int) -> list[Parts]:
    """Few of these layouts, in which every mesh meets every schedule and every dispatcher, and these meet as `_exchanges` says."""
    names = ("mesh", "schedule", "dispatcher")
    options = {name: _known(valid, part) for part, name in enumerate(names)}
    rows = covering(options, lambda row: tuple(row.values()) in valid, _exchanges(valid, gpus_per_node))
    return [tuple(row.values()) for row in rows]


def _exchanges(valid: Collection[Parts], gpus_per_node: int) -> list[Row]:
    """Every schedule with every dispatcher; that which goes by nodes where experts are on several nodes, if any are."""
    rows = []
    for schedule, dispatcher in itertools.product(SCHEDULES, DISPATCHERS):
        row, wanted = {"schedule": schedule, "dispatcher": dispatcher}, dispatcher == "hierarchical"
        apart = [mesh for mesh, *how in valid if wanted and how == [schedule, dispatcher] and mesh[2] > gpus_per_node]
        rows.append(row | {"mesh": apart[0]} if apart else row)
    return rows


def option_cases(base: Sequence[str], valid: Collection[Parts], routing: str = "natural") -> list[Case]:
    """Cases in which every pair of values of `OPTIONS`, schedules, dispatchers and a few meshes of these layouts meets, and every
    schedule every dispatcher in FP8, as far as the configuration allows it. What the user has set is left alone: what is in `base` and
    not in `USUAL`, and a `routing` that is not the natural one."""
    usual = composed(tuple(base))
    given = {word.partition("=")[0].lstrip("+~") for word in base if word not in USUAL}
    given |= {"routing"} if routing != "natural" else set()
    how = {"mesh": _few(valid), "schedule": _known(valid, 1), "dispatcher": _known(valid, 2)}
    options = how | {name: values for name, values in OPTIONS.items() if name not in given}
    fp8 = [row | {"precision": "fp8"} for row in _exchanges([v for v in valid if v[0] in how["mesh"]], usual.cluster.gpus_per_node)]
    also = fp8 if len(how["schedule"]) > 1 and "precision" in options else []

    def case(row: Row) -> Case:
        own = [name for name in row if name not in how and name != "routing" and not _is(usual, name, row[name])]
        words = tuple(f"{name}={row[name]}" for name in own)
        layout = written(row["mesh"], row["schedule"], row["dispatcher"])
        return Case(layout=layout, options=words, routing=row.get("routing", routing), base=tuple(base))

    def possible(row: Row) -> bool:
        try:
            return tuple(row[name] for name in how) in valid and bool(case(row).config())
        except ConfigError:
            return False

    return [case(row) for row in covering(options, possible, also)]


def _known(valid: Collection[Parts], part: int) -> list:
    return list(dict.fromkeys(parts[part] for parts in valid))


def _few(valid: Collection[Parts]) -> list[Mesh]:
    """Four meshes as different as they come, those of most axes first."""
    alike = {}
    for mesh in _known(valid, 0):
        alike.setdefault(tuple(size > 1 for size in mesh), mesh)
    return [alike[axes] for axes in sorted(alike, key=sum, reverse=True)[:4]]


def _is(config: Config, name: str, value: str) -> bool:
    if name == "precision":
        return config.precision.name == value
    return get(config, name) == _typed(config, name, value)


def covering(
    options: Mapping[str, Sequence[Any]], possible: Callable[[Row], bool], also: Iterable[Row] = (), *, seed: int = 0
) -> list[dict[str, Any]]:
    """Few rows in which each pair of values of different options meets, and those of each part of a row in `also`, if a possible row has
    them and at most two further values that are not the first of theirs. `possible(row)`: of a whole row.

    Greedy: a row begins with the largest part that is still missing, and takes for every other option, in random order, the value that
    meets the most missing ones among those with which some row is still found.
    """
    names, random_ = list(options), random.Random(seed)
    tried = functools.cache(lambda row: possible(dict(row)))

    def completed(row: Row) -> dict[str, Any] | None:
        """A possible row with these values: the first value of every other option, or with up to two of those changed."""
        usual = {name: values[0] for name, values in options.items()} | dict(row)
        changes = [(name, value) for name in names if name not in row for value in options[name][1:]]
        for change in [(), *itertools.combinations(changes, 1), *itertools.combinations(changes, 2)]:
            if tried(tuple((usual | dict(change)).items())):
                return usual | dict(change)
        return None

    every = [{a: x, b: y} for a, b in itertools.combinations(names, 2) for x, y in itertools.product(options[a], options[b])]
    missing = {frozenset(part.items()) for part in [*also, *every] if completed(part)}
    first = lambda part: (-len(part), sorted((names.index(name), list(options[name]).index(value)) for name, value in part))
    rows = []
    while missing:
        row = dict(min(missing, key=first))
        for name in random_.sample(names, len(names)):
            if name not in row:
                gain = {value: sum(part <= {*row.items(), (name, value)} for part in missing) for value in options[name]}
                best = sorted(options[name], key=gain.__getitem__, reverse=True)
                row[name] = next(value for value in best if completed(row | {name: value}))
        missing = {part for part in missing if not part <= row.items()}
        rows.append({name: row[name] for name in names})
    return rows
