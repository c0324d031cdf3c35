"""What `shoestring plan` is asked: its words, and the run that they describe, with what nobody said made up."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from omegaconf.errors import OmegaConfBaseException

from ...conf.compose import compose, load_any_data
from ...conf.errors import ConfigError, UnknownKey, most_like
from ...conf.phases import Phase, phases
from ...conf.rules import get, replaced
from ...conf.schema import Config
from ..simulate.recorded import Recorded, read
from .layouts import Layout

OWN = ("gpus", "tokens", "budget_usd", "deadline_days", "search", "output", "page", "top", "routing")
TOKENS_PER_GPU = 30_720  # of a step, where nobody says: DeepSeek-V3's 15,360 sequences on 2,048 GPUs
BATCH = "train.global_batch_tokens"


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
    routing: Path | None = None
    output: Path | None = None
    page: Path | None = None
    top: int = 5

    @property
    def command(self) -> str:
        own = {"gpus": "auto" if self.gpus is None else self.gpus, "tokens": self.tokens, "budget_usd": self.budget_usd,
               "deadline_days": self.deadline_days, "routing": self.routing, "search": "" if self.search else "false"}  # fmt: skip
        return shlex.join(["shoestring", "plan", *self.words, *(f"{key}={value}" for key, value in own.items() if value)])

    @property
    def keys(self) -> frozenset[str]:
        """That the user has set."""
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
        elif key in ("output", "page", "routing"):
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


# ---------------------------------------------------------------- the run


@dataclass(frozen=True, kw_only=True)
class Asked:
    """`run`: as composed, of one process. `config`: its main phase, the one with most tokens, which is what layouts are searched for and
    steps are shown of. `phases`: of the run, or none where `tokens` are the main phase's. `notes`: what was made up."""

    request: Request
    run: Config
    config: Config
    main: str
    phases: tuple[Phase, ...]
    tokens: float
    words: tuple[str, ...]
    makes_batch: bool  # nobody gave one: each number of GPUs has its own
    recorded: Recorded | None = None  # routing, in place of the term imbalance
    notes: list[str] = field(default_factory=list)

    @property
    def fixed(self) -> frozenset[str]:
        """Keys of layouts that a search leaves alone: those that the user has set (a preset of the group `parallel` is one layout among
        others), and those of the main phase's own."""
        keys = Layout.of(self.config).settings
        return self.request.keys | {key for key in keys if get(self.run, key) != get(self.config, key)}

    def words_of(self, layout: Layout, config: Config) -> list[str]:
        """The command line of the run in this layout."""
        made = {*layout.settings, *[BATCH] * self.makes_batch}
        length = [f"train.tokens={round(self.tokens)}"] * bool(self.request.tokens and not self.run.phases)
        own = [word for word in self.words if word.partition("=")[0].lstrip("+~") not in made]
        return [*own, *length, *[f"{BATCH}={config.train.global_batch_tokens}"] * self.makes_batch, *layout.words]

    def at(self, gpus: int) -> Config:
        """Of `config`, with the batch of so many GPUs where nobody gave one."""
        if not self.makes_batch:
            return self.config
        c = self.config
        return replaced(c, BATCH, _batch(gpus, c.data.seq_len, c.parallel.dp * c.train.micro_batch_sequences))


def ask(request: Request) -> Asked:
    """With a batch, a sequence length and a number of tokens for what nobody set. Raises ConfigError."""
    words, notes, given = list(request.words), [], request.keys
    makes_batch = "experiment" not in given and BATCH not in given
    if "experiment" not in given:
        seq_len, unit, world = _shape(words, request.config_dir)
        if "data.seq_len" not in given:
            words.append(f"data.seq_len={seq_len}")
            notes.append(f"data.seq_len is not given: sequences of {seq_len:,} tokens")
        if makes_batch:
            gpus = request.gpus or max(64, world)
            batch = _batch(gpus, seq_len, unit)
            words.append(f"{BATCH}={batch}")
            each = f"{batch // seq_len:,} sequences a step, for {gpus:,} GPUs"
            notes.append(f"{BATCH} is not given: {each if request.gpus is not None else f'{TOKENS_PER_GPU:,} for each GPU'}")
        if not given & {"train.tokens", "train.steps"} and not request.tokens:
            words.append("train.tokens=1_000_000_000_000")
            notes.append("tokens is not given: a trillion")
    run = _load(list(words), request.config_dir)
    stretches = phases(run)
    main = max(stretches, key=lambda phase: phase.num_tokens)
    if request.tokens and run.phases:
        notes.append(f"tokens is given: all of them as in phase {main.name}; without it, each phase is priced")
    config, recorded = main.config, None
    if request.routing:
        recorded = read(request.routing, run.model)
        if term := config.stack.terms.get("imbalance"):
            told = replace(term, source=f"recorded in {request.routing}, layer by layer")
            config = replaced(config, "stack.terms", {**config.stack.terms, "imbalance": told})
    return Asked(
        request=request,
        run=run,
        config=config,
        main=main.name,
        phases=() if request.tokens else stretches,
        tokens=request.tokens or float(sum(phase.num_tokens for phase in stretches)),
        words=tuple(words),
        makes_batch=makes_batch,
        recorded=recorded,
        notes=notes,
    )


def _shape(words: list[str], config_dir: str | None) -> tuple[int, int, int]:
    """Of a configuration that is not complete: a sequence's length; how many make a micro-batch for every pipeline; its processes."""
    tree = compose(words, config_dir)
    p, given = tree.parallel, any(word.startswith("data.seq_len=") for word in words)
    try:
        seq_len = tree.data.seq_len if given else min(4096, tree.model.max_seq_len)
        dp = max(1, p.edp * p.ep)
        return max(1, int(seq_len)), max(1, dp * tree.train.micro_batch_sequences), max(1, p.pp * dp)
    except (TypeError, ValueError, OmegaConfBaseException):  # what is wrong will be said when all is checked
        return 4096, 1, 1


def _load(words: list[str], config_dir: str | None) -> Config:
    try:
        return load_any_data(words, config_dir)
    except UnknownKey as error:
        raise UnknownKey(error.field, error.value, error.rule, most_like(error.field, [*OWN, str(error.nearest)])) from None


def _batch(gpus: int, seq_len: int, unit: int) -> int:
    """Tokens; `unit`: sequences that make a micro-batch for every pipeline of the layout that is given, if one is."""
    sequences = _round(max(1, gpus * TOKENS_PER_GPU // seq_len))
    return max(1, sequences // unit) * unit * seq_len


def _round(sequences: int) -> int:
    """Down to a number with many divisors, for ranks and micro-batches to share out."""
    unit = 1 << max(0, sequences.bit_length() - 5)
    return max(1, sequences // unit * unit)
