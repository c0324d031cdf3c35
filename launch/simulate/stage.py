"""What each pipeline stage computes and exchanges for one micro-batch, in seconds: a list of steps, as the executor's phases are."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

from ...conf.schema import Config, PhaseConfig
from ...train import block_ops, cost
from ...train.block_ops import Call
from ...train.traffic import even_rows, row_bytes
from .rates import Rates
from .teams import beside_gathers, gather_seconds, team_seconds


@dataclass(frozen=True, kw_only=True)
class Busy:
    """Seconds of compute; `again`: of them, recomputation."""

    seconds: float = 0.0
    again: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Compute:
    """A phase, by pass: alone, and beside an exchange."""

    name: str
    alone: dict[str, Busy]
    beside: dict[str, Busy]

    def of(self, when: str, beside: bool) -> Busy:
        return (self.beside if beside else self.alone).get(when, Busy())


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """Both directions of one; empty where there is none: it keeps the place, as in a dense block."""

    name: str
    alone: dict[str, float]
    beside: dict[str, float]

    def of(self, when: str, beside: bool) -> float:
        return (self.beside if beside else self.alone).get(when, 0.0)


StageSteps = tuple[Compute | Exchange, ...]


@dataclass(frozen=True, kw_only=True)
class Load:
    """`rows`: of the rank whose experts have the most, over the mean, in all MoE layers or in each; all wait for it in every exchange.
    `compute`, `links`: times what kernels, and exchanges, would take."""

    rows: float | tuple[float, ...] = 1.0
    compute: float = 1.0
    links: float = 1.0

    def of(self, moe_layer: int) -> float:
        """`rows` of one layer; a dense block, whose number is below 0, has none."""
        return self.rows if not isinstance(self.rows, tuple) else self.rows[moe_layer] if moe_layer >= 0 else 1.0


def stages(config: Config, rates: Rates, load: Load, layers: Sequence[range]) -> list[StageSteps]:
    """Of every pipeline stage; `layers`: those of each."""
    m, slower = config.model, load.compute
    alike = cache(lambda kind, rows: _block(config, rates, replace(load, rows=rows), kind))  # blocks of a kind, with as many rows
    block = lambda layer: alike(min(layer, m.num_dense_layers), load.of(layer - m.num_dense_layers))
    made = []
    for index, blocks in enumerate(layers):
        first, last = index == 0, index == len(layers) - 1
        steps: list[Compute | Exchange] = [_ends(config, rates, slower, "embed")] if first else []
        for layer in (layer for layer in blocks if layer < m.num_layers):
            steps += block(layer)
        if last:
            steps.append(_ends(config, rates, slower, "head"))
            for layer in (layer for layer in blocks if layer >= m.num_layers):
                steps += [_ends(config, rates, slower, "predict"), *block(layer)]
        made.append(tuple(steps))
    return made


def micro_batch_tokens(config: Config) -> int:
    return config.train.micro_batch_sequences * config.data.seq_len


def _block(config: Config, rates: Rates, load: Load, layer: int) -> StageSteps:
    c, m = config, config.model
    tokens, routed = micro_batch_tokens(c), cost.block_params(m, layer).router > 0
    exchanged = routed and c.parallel.ep > 1
    calls = block_ops.block_calls(
        m, layer, tokens=tokens, seq_len=c.data.seq_len, fp8=c.precision.linear == "fp8", width=cost.ELEMENT_BYTES[c.precision.compute],
        ep=c.parallel.ep if routed else 1, recompute=c.train.recompute, sent=sent_rows(c) if exchanged else 0,
        rows=load.rows * tokens * m.top_k if exchanged else None,
    )  # fmt: skip
    b = cost.block_params(m, layer)
    held = {"attention": (b.attention + b.router + b.norms, 0), "experts": (b.dense_mlp + b.shared, b.experts)}
    phases = [
        _compute(c, name, [call for call in calls if call.phase == phase], rates, load.compute, held[phase])
        for phase, name in (("attention", "attention"), ("experts", "experts" if routed else "mlp"))
    ]
    exchanges = [_exchange(c, rates, load, name, exchanged) for name in ("dispatch", "combine")]
    return phases[0], exchanges[0], phases[1], exchanges[1]


def _ends(config: Config, rates: Rates, slower: float, phase: str) -> Compute:
    m, width = config.model, cost.ELEMENT_BYTES[config.precision.compute]
    calls = block_ops.end_calls(m, tokens=micro_batch_tokens(config), width=width, embed=phase == "embed", head=phase != "embed")
    modules = m.mtp_depth if phase == "predict" else 1  # all are alike
    table = m.vocab_size * m.dim
    return _compute(config, phase, [call for call in calls if call.phase == phase], rates, slower / modules, (table, 0))


def _compute(
    config: Config, name: str, calls: Sequence[Call], rates: Rates, slower: float, held: tuple[int, int]
) -> Compute:  # fmt: skip
    """Kernels one after another, and what this software, or another's, adds to them. `held`: dense and expert parameters."""
    sent, gathered = team_seconds(config, rates, name), gather_seconds(config, rates, dense=held[0], experts=held[1])
    own = {when: config.stack.phases.get(f"{name}_{when}", PhaseConfig()) for when in "FBW"}

    def busy(beside: bool) -> dict[str, Busy]:
        timed = [(call, slower * rates.seconds(call, beside=beside)) for call in calls]
        sums = lambda when, chosen: own[when].times * sum(seconds for call, seconds in timed if call.when == when and chosen(call))
        return {
            when: Busy(seconds=sums(when, lambda c: True) + own[when].host_us * 1e-6, again=sums(when, lambda c: c.again)) for when in "FBW"
        }

    alone, beside = busy(False), busy(True)

    def by_pass(mine: dict[str, Busy]) -> dict[str, Busy]:
        total = lambda passes, of: sum(of[when].seconds for when in passes)
        more = {
            when: sent.get(when, 0.0) + beside_gathers(total(passes, mine), total(passes, beside), gathered.get(when, 0.0))
            for when, passes in {"F": "F", "B": "BW"}.items()
        }
        return {when: replace(found, seconds=found.seconds + more.get(when, 0.0)) for when, found in mine.items()}

    return Compute(name=name, alone=by_pass(alone), beside=by_pass(beside))


# ---------------------------------------------------------------- exchanges


def dispatcher_of(config: Config) -> str:
    name = config.parallel.dispatcher
    return name if name != "auto" else "alltoall" if config.parallel.ep > 1 else "local"


def sent_rows(config: Config) -> float:
    """That a rank gathers in order to send them, in each exchange to experts."""
    return 0.0 if dispatcher_of(config) == "deepep" else sum(even_rows(config).sent)


def exchange_bytes(config: Config, when: str, name: str) -> tuple[float, float, float]:
    """What a rank sends in one exchange: (between nodes, inside the node beside it, inside the node after it)."""
    rows, row, ep = even_rows(config), row_bytes(config), config.parallel.ep
    num, key = sum(rows.sent), f"{name} {when}"
    if rows.inside_sent:
        others, places = len(rows.sent) - 1, len(rows.inside_sent)
        after = sum(rows.inside_sent) * (places - 1) / places * row[f"{key} inside"]
        return num * others / len(rows.sent) * row[key], 0.0, after
    in_node = min(ep, config.cluster.gpus_per_node)
    return num * (ep - in_node) / ep * row[key], num * (in_node - 1) / ep * row[key], 0.0


def _exchange(config: Config, rates: Rates, load: Load, name: str, exchanged: bool) -> Exchange:
    if not exchanged:
        return Exchange(name=name, alone={}, beside={})

    own = config.stack.phases.get("exchange", PhaseConfig())

    def seconds(when: str, beside: bool) -> float:
        inter, intra, after = (num * load.rows for num in exchange_bytes(config, when, name))
        legs = rates.link_seconds(inter, intra, beside=beside), rates.link_seconds(0, after, beside=beside)
        together = max(legs) if dispatcher_of(config) == "deepep" else sum(legs)  # DeepEP's legs run at the same time
        return load.links * own.times * together + own.host_us * 1e-6

    return Exchange(name=name, alone={w: seconds(w, False) for w in "FB"}, beside={w: seconds(w, True) for w in "FB"})
