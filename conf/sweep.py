"""Several runs from one command line, in Hydra's words: `optim.lr=1e-3,3e-4 parallel.ep=1,2` are four jobs, always in the same order.

Words with several values are those of Hydra's own sweeper: choices (`a,b`), `range(...)`, and `glob(...)` over the files of a group.
"""

import itertools
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hydra.core.override_parser.types import Glob, Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from .compose import choices, compose, finish, parse
from .errors import ConfigError
from .schema import Config

MOST = 1_000  # jobs: each is composed and checked before the first starts
_LONGEST = 120  # characters of a folder's name
_PLACES = ("name", "run_dir")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One run of a sweep. `own`: the words that set it apart; `words`: all of it, its place included, as `load` takes them.

    `config` is None where they are wrong, and `error` says how.
    """

    number: int
    own: tuple[str, ...]
    words: tuple[str, ...]
    config: Config | None
    error: ConfigError | None = None

    def __str__(self) -> str:
        return f"job {self.number}" + (f" ({' '.join(self.own)})" if self.own else "")


def sweep(words: Sequence[str], config_dir: str | Path | None = None) -> list[Job]:
    """The jobs of a command line, from number 0 on: the last word with several values changes fastest.

    A job's run directory is `<run_dir>/<number>_<its own words>`, and so is its name, unless `name` or `run_dir` are given such that they
    differ. Raises ConfigError for words that are no sweep, and where two jobs would share a directory; what is wrong with one job's
    settings is in that job.
    """
    told = [(own, all_words, _try(compose, all_words, config_dir)) for own, all_words in expand(words, config_dir)]
    composed = [found for _, _, found in told]
    leaves = [_leaf(number, own) for number, (own, _, _) in enumerate(told)]
    names = _places("name", composed, leaves, keep=_distinct)
    given = any(parse(word).key_or_group in _PLACES for word in words)
    dirs = _places("run_dir", composed, leaves, keep=lambda found: given and len(set(found)) > 1)
    _refuse_shared(dirs)
    jobs = []
    for number, (own, all_words, found) in enumerate(told):
        if isinstance(found, DictConfig):
            all_words = _moved(all_words, found, name=names[number], run_dir=dirs[number])
            found = _try(finish, found)
        config, error = (found, None) if isinstance(found, Config) else (None, found)
        jobs.append(Job(number=number, own=tuple(own), words=tuple(all_words), config=config, error=error))
    return jobs


def _try(function, *args):
    """Its result, or the ConfigError that it raises."""
    try:
        return function(*args)
    except ConfigError as error:
        return error


# ---------------------------------------------------------------- words


def expand(words: Sequence[str], config_dir: str | Path | None) -> list[tuple[list[str], list[str]]]:
    """(own words, all words) of each job. A key with several values and another word for it: the last counts, as in Hydra's sweeper."""
    parsed = [parse(word) for word in words]
    swept = {one.key_or_group for one in parsed if one.is_sweep_override()}
    options: dict[object, list[str]] = {}
    for number, (word, one) in enumerate(zip(words, parsed)):
        key = one.key_or_group if one.key_or_group in swept else number
        options[key] = _values(word, one, config_dir) if one.is_sweep_override() else [word]
    number = math.prod(len(values) for values in options.values())
    if number > MOST:
        raise ConfigError("--multirun", f"{number:,} jobs", f"must be at most {MOST:,}")
    several = [len(values) > 1 for values in options.values()]
    return [([word for word, mine in zip(job, several) if mine], list(job)) for job in itertools.product(*options.values())]


def _values(word: str, parsed: Override, config_dir: str | Path | None) -> list[str]:
    """A word of one value for each of a word's several."""
    key, text = parsed.key_or_group, word.partition("=")[2]
    if not parsed.is_discrete_sweep():
        raise ConfigError(key, text, "has no values to go through: give choices (a,b), range(start,stop) or glob(pattern)")
    sweep_of = parsed.value()
    if getattr(sweep_of, "shuffle", False):
        raise ConfigError(key, text, "would be in another order each time, and a job is known by its number: leave out the shuffle")
    if isinstance(sweep_of, Glob):
        values = sweep_of.filter(choices(key, config_dir))
    else:
        try:
            values = list(itertools.islice(parsed.sweep_string_iterator(), MOST + 1))
        except HydraException as error:
            raise ConfigError(key, text, str(error).splitlines()[0]) from None
    if not values:
        options = ", ".join(choices(key, config_dir))
        raise ConfigError(key, text, "is no value at all" + (f"; there are {options}" if options else ""))
    return [f"{parsed.get_key_element()}={value}" for value in values]


# ---------------------------------------------------------------- places


def _leaf(number: int, own: Sequence[str]) -> str:
    """A folder's name."""
    text = "_".join([str(number), *own])
    return re.sub(r"[^A-Za-z0-9._=+-]+", "_", text)[:_LONGEST].rstrip("._")


def _places(field: str, composed: Sequence[DictConfig | ConfigError], leaves: Sequence[str], *, keep) -> list[str]:
    """The field of each job: as its words say, where `keep` of all is true, else below that. A job that is wrong has one nobody shares."""
    found = [_text(one, field) for one in composed]
    known = [text for text in found if text]
    if known and keep(known):
        return [text or leaf for text, leaf in zip(found, leaves)]
    return [os.path.join(text, leaf) for text, leaf in zip(found, leaves)]


def _text(composed: DictConfig | ConfigError, field: str) -> str:
    """"" where it cannot be told: `finish` says why."""
    try:
        return str(composed[field]).strip() if isinstance(composed, DictConfig) else ""
    except OmegaConfBaseException:
        return ""


def _distinct(found: Sequence[str]) -> bool:
    return len(set(found)) == len(found)


def _refuse_shared(dirs: Sequence[str]) -> None:
    first: dict[str, int] = {}
    for number, path in enumerate(dirs):
        other = first.setdefault(os.path.realpath(path), number)
        if other != number:
            rule = f"is that of job {other} and of job {number}: let all words together make it differ, or leave it to the sweep"
            raise ConfigError("run_dir", path, rule)


def _moved(words: Sequence[str], composed: DictConfig, **places: str) -> list[str]:
    """Sets the places of a job; its words with them."""
    moved = {}
    for field, place in places.items():
        if _text(composed, field) not in ("", place):
            composed[field] = place
            moved[field] = f"{field}={QuotedString(text=place, quote=Quote.single).with_quotes()}"
    return [*(word for word in words if parse(word).key_or_group not in moved), *moved.values()]
