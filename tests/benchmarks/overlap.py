"""How much communication lies under compute, and how long ranks idle: `python tests/benchmarks/overlap.py [options]`.

Four measurements of the real executor on forked ranks (gloo) of this host, each from traces of whole steps:

    paced    4 ranks, pp 2 x ep 2: compute phases and exchanges last a given time around tiny real ones, so that few cores suffice
    real     2 ranks, ep 2, one core each: real compute, and links on which the exchanges take as long as it does
    bubbles  4 ranks, every schedule, equal chunks: idle share and makespan, beside what `parallel/timeline.py` simulates
    nodes    4 and 8 ranks in nodes of two, slow links between them: the same routing under `alltoall` and `hierarchical`, and what of
             each lies under paced compute

Prints tables; --json keeps every number; --page writes docs/overlap.md with a picture of one step. Nothing is asserted.
"""

import argparse
import datetime
import json
import os
import platform
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import torch
import torch.distributed as dist
from overlap_page import draw_step, page, tables
from shoestring.conf.compose import load
from shoestring.conf.schema import Config
from shoestring.launch.local import fork_ranks
from shoestring.parallel.fabric import Fabric, Link, Pace
from shoestring.parallel.phases import MicroBatch
from shoestring.parallel.schedule import SCHEDULES
from shoestring.parallel.timeline import by_kind, simulate
from shoestring.parallel.trace import Recorder, Span, Tracer
from shoestring.parallel.trace_measure import length, measure, union
from shoestring.train.engine import Engine

# Slots of one block's phases. even: every slot of a pair balances. trace: the shares of DeepSeek's published trace.
SLOTS = {
    "even": {
        ("attention", "F"): 1, ("experts", "F"): 0.5, ("experts", "B"): 1, ("experts", "W"): 0.5, ("attention", "B"): 0.5,
        ("attention", "W"): 0.5, ("dispatch", "F"): 1, ("combine", "F"): 1, ("combine", "B"): 1, ("dispatch", "B"): 1,
    },
    "trace": {
        ("attention", "F"): 0.562, ("experts", "F"): 0.593, ("experts", "B"): 0.683, ("experts", "W"): 0.652, ("attention", "B"): 1.203,
        ("attention", "W"): 0.307, ("dispatch", "F"): 0.935, ("combine", "F"): 1.213, ("combine", "B"): 0.806, ("dispatch", "B"): 1.046,
    },
}  # fmt: skip
# With the blocks of a stage, which are four in the trace.
PACES = {"even": (SLOTS["even"], 1), "trace": (SLOTS["trace"], 1), "trace, 4 blocks": (SLOTS["trace"], 4)}
CHUNK = {(phase, kind): 1 for phase in ("attention", "experts") for kind in "FBW"}  # F = I = W = 2, B = 4
EXCHANGES = ("dispatch", "combine")
MODES = ("no latency", "overlap", "no overlap")
PARTS = ("paced", "real", "bubbles", "nodes")
# Of `nodes`: so slow that an exchange takes many times what forked ranks need to hand a message on, even if others use their cores.
LINKS = {"intra": Link(latency=2e-4, bandwidth=2e6, packet=4096), "inter": Link(latency=1e-3, bandwidth=2.5e5, packet=4096)}
PER_NODE = 2
DISPATCHERS = ("alltoall", "hierarchical")


def main() -> None:
    options = parse()
    results: dict = {"setting": setting(options)}
    if "paced" in options.parts:
        results["paced"], step = paced(options)
        if options.plot:
            draw_step(step, options.plot)
    if "real" in options.parts:
        results["real"] = real(options)
    if "bubbles" in options.parts:
        results["bubbles"] = bubbles(options)
    if "nodes" in options.parts:
        results["nodes"] = nodes(options)
    print(f"{results['setting']}\n\n" + "\n\n".join(tables(results).values()))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if options.page:
        options.page.write_text(page(results, command(options), os.path.relpath(options.plot, options.page.parent)), encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--paces", nargs="+", choices=PACES, default=list(PACES), help="of `paced` (default: all)")
    parser.add_argument("--micro-batches", type=int, default=64, help="of a step of `paced` and `real` (default 64)")
    parser.add_argument("--slot-ms", type=float, default=20.0, help="of `paced` and `bubbles` (default 20)")
    parser.add_argument("--runs", type=int, default=5, help="interleaved, of everything (default 5)")
    parser.add_argument("--json", type=Path, help="every number of every run")
    parser.add_argument("--plot", type=Path, metavar="SVG", help="draw a step; needs the extra `bench`")
    parser.add_argument("--page", type=Path, metavar="MD", help="write the page; its picture goes beside it unless --plot says where")
    options = parser.parse_args()
    if options.page and not options.plot:
        options.plot = options.page.with_name("overlap_step.svg")
    return options


def setting(options: argparse.Namespace) -> str:
    libraries = ", ".join(f"{name} {version(name)}" for name in ("shoestring", "torch"))
    return (
        f"{datetime.date.today()}  python {platform.python_version()}, {libraries}, {os.cpu_count()} cores\n"
        f"{options.micro_batches} micro-batches, slots of {options.slot_ms:g} ms, medians of {options.runs} interleaved run(s)"
    )


def command(options: argparse.Namespace) -> str:
    chosen = ["--parts", *options.parts] if set(options.parts) < set(PARTS) else []
    chosen += ["--paces", *options.paces] if set(options.paces) < set(PACES) else []
    chosen += ["--micro-batches", str(options.micro_batches), "--slot-ms", f"{options.slot_ms:g}", "--runs", str(options.runs)]
    return shlex.join([*chosen, "--page", str(options.page)])


# ---------------------------------------------------------------- one traced step


class NoOverlap(Pace):
    """Every exchange is waited for at once."""

    def issue(self, op, phase, pending):
        pending = super().issue(op, phase, pending)
        pending.land()
        return pending


def configured(words: str, *, micro_batches: int, sequences: int = 1, blocks: int = 1) -> Config:
    """Only MoE blocks, so many in each stage."""
    base = load(["model=micro", "data=synthetic", *words.split()])
    tokens = micro_batches * sequences * base.data.seq_len * base.parallel.dp
    more = [f"model.num_layers={blocks * base.parallel.num_stages}", f"model.num_dense_layers=0 train.micro_batch_sequences={sequences}"]
    return load(["model=micro", "data=synthetic", *words.split(), *" ".join(more).split(), f"train.global_batch_tokens={tokens}"])


def even_choice(config: Config):
    """`MicroBatch.choose`: every expert gets as many tokens."""
    m = config.model

    def choose(layer, select, score_TE):
        first = torch.arange(len(score_TE)) * m.top_k
        return (first[:, None] + torch.arange(m.top_k)) % m.num_experts

    return choose


def limited_choice(config: Config):
    """`MicroBatch.choose`: the router's own choice from random scores, alike under every dispatcher."""

    def choose(layer, select, score_TE):
        generator = torch.Generator().manual_seed(1000 * layer + dist.get_rank())
        return select(torch.rand(score_TE.shape, generator=generator, dtype=score_TE.dtype))

    return choose


def batches(config: Config, choice: Callable) -> list[MicroBatch]:
    size = config.train.micro_batch_sequences, config.data.seq_len + 1
    rows = torch.randint(config.model.vocab_size, size, generator=torch.Generator().manual_seed(dist.get_rank()))
    one = MicroBatch(tokens_BS=rows[:, :-1], targets_BN=rows[:, 1:], counted=False, choose=choice(config))
    return [one] * config.num_micro_batches


def traced(engine: Engine, tracer: Recorder, seen_by: Tracer, choice: Callable = even_choice) -> list[Span] | None:
    """One step's spans, on rank 0."""
    engine.executor.tracer = seen_by
    mine = batches(engine.config, choice)
    tracer.begin()
    engine.executor.step(mine)
    return tracer.finish()


def pair_share(spans: Sequence[Span]) -> float:
    """Of exchanges, those inside pairs: with perfect overlap and nothing under lone actions, the most that can be hidden."""
    pairs = {(s.rank, s.stage, s.micro_batch) for s in spans if s.what == "pair"}
    inside = [(s.rank, s.start, s.end) for s in spans if s.what == "pair"]
    exchanges = [s for s in spans if s.what == "exchange"]
    count = sum(any(r == s.rank and a <= s.start < b for r, a, b in inside) for s in exchanges)
    return count / len(exchanges) if exchanges and pairs else 0.0


def numbers(spans: Sequence[Span]) -> dict[str, float | None]:
    m = measure(spans)
    return {"seconds": m.seconds, "bubble": m.bubble, "comm": m.comm_seconds, "exposed": m.exposed_seconds,
            "hidden": m.hidden_share, "hidden_in_pairs": m.pair_hidden_share, "in_pairs": pair_share(spans)}  # fmt: skip


# ---------------------------------------------------------------- paced


def paced(options: argparse.Namespace) -> tuple[dict, list[Span]]:
    """{pace: {mode: runs}}, and the first overlapped step's spans."""
    slot = options.slot_ms / 1e3
    of_paces = [fork_ranks(4, paced_rank, pace, options.micro_batches, slot, options.runs, timeout_s=7200)[0] for pace in options.paces]
    return {pace: found for pace, (found, _) in zip(options.paces, of_paces)}, of_paces[0][1]


def paced_rank(pace: str, micro_batches: int, slot: float, runs: int) -> tuple[dict[str, list], list[Span] | None]:
    (slots, blocks), num = PACES[pace], micro_batches
    words = "parallel.pp=2 parallel.ep=2 parallel.schedule=dualpipev parallel.chunks=2 data.seq_len=8"
    engine, tracer = Engine(configured(words, micro_batches=num, blocks=blocks)), Recorder(dist.get_rank())
    traced(engine, tracer, tracer)  # first calls are slow
    found, step = {mode: [] for mode in MODES}, None
    for _, mode in ((i, mode) for i in range(runs) for mode in MODES):
        seconds = {key: slot * n for key, n in slots.items() if mode != "no latency" or key[0] not in EXCHANGES}
        spans = traced(engine, tracer, (NoOverlap if mode == "no overlap" else Pace)(tracer, seconds))
        if spans:
            found[mode].append(numbers(spans))
            step = spans if mode == "overlap" and step is None else step
    return found, step


# ---------------------------------------------------------------- real compute


def real(options: argparse.Namespace) -> dict:
    return fork_ranks(2, real_rank, options.micro_batches, options.runs, timeout_s=3600)[0]


def real_rank(micro_batches: int, runs: int) -> dict[str, list]:
    """{mode: runs}, on links whose bandwidth makes a step's exchanges last as long as its compute."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[dist.get_rank() % len(cores)]})
    words = "parallel.ep=2 parallel.schedule=dualpipev parallel.chunks=2 data.seq_len=256 model.max_seq_len=256 model.dim=256"
    config = configured(f"{words} model.expert_hidden_dim=256", micro_batches=micro_batches)
    rank = dist.get_rank()
    fabric = Fabric(rank, nodes=[0, 1], intra=Link(), inter=Link())
    engine, tracer = Engine(config, transport=fabric), Recorder(rank)
    traced(engine, tracer, tracer)
    before = fabric.sent_bytes["inter"]
    spans = traced(engine, tracer, tracer)
    busy = torch.tensor([length(union((s.start, s.end) for s in spans if s.rank == 0 and s.what == "compute")) if spans else 0.0])
    dist.broadcast(busy, 0)
    link = Link(packet=4096, bandwidth=(fabric.sent_bytes["inter"] - before) / busy.item())
    found = {mode: [] for mode in MODES}
    for _, mode in ((i, mode) for i in range(runs) for mode in MODES):
        fabric.ports["inter"].link = Link() if mode == "no latency" else link
        spans = traced(engine, tracer, (NoOverlap if mode == "no overlap" else Pace)(tracer, {}))
        if spans:
            found[mode].append(numbers(spans))
    return found


# ---------------------------------------------------------------- bubbles


def layouts() -> Iterator[tuple[str, int, int]]:
    """(schedule, pp, chunks)"""
    for pp in (2, 4):
        for name, schedule in SCHEDULES.items():
            chunks = next(c for c in (1, 2) if schedule.rule(pp, c, 4 * pp) is None)
            yield name, pp, chunks


def bubbles(options: argparse.Namespace) -> list[dict]:
    """A row per layout: simulated, and of each run."""
    slot, rows = options.slot_ms / 1e3, []
    for name, pp, chunks in layouts():
        num = 4 * pp
        made = SCHEDULES[name].actions(pp, chunks, num)
        timeline = simulate(made, by_kind(F=2 * slot, B=4 * slot, I=2 * slot, W=2 * slot))
        runs = fork_ranks(4, bubble_rank, name, pp, chunks, num, slot, options.runs, timeout_s=600)[0]
        simulated = {"bubble": timeline.bubble, "seconds": timeline.makespan}
        rows.append({"schedule": name, "pp": pp, "micro_batches": num, "runs": runs, "simulated": simulated})
    return rows


def bubble_rank(name: str, pp: int, chunks: int, num: int, slot: float, runs: int) -> list[dict]:
    words = f"parallel.pp={pp} parallel.edp={4 // pp} parallel.schedule={name} parallel.chunks={chunks} data.seq_len=8"
    engine, tracer = Engine(configured(words, micro_batches=num)), Recorder(dist.get_rank())
    traced(engine, tracer, tracer)
    pace = Pace(tracer, {key: slot * slots for key, slots in CHUNK.items()})
    steps = [traced(engine, tracer, pace) for _ in range(runs)]
    return [numbers(spans) for spans in steps if spans]


# ---------------------------------------------------------------- nodes


def nodes(options: argparse.Namespace) -> dict:
    """ "exchanges": a row per layout, payload and dispatcher; "pairs": {dispatcher: {mode: runs}}."""
    exchanges = [row for num in (2, 4) for row in fork_ranks(num * PER_NODE, node_rank, num, options.runs, timeout_s=3600)[0]]
    return {"exchanges": exchanges, "pairs": fork_ranks(4, pairs_rank, options.slot_ms / 1e3, options.runs, timeout_s=3600)[0]}


def on_nodes(words: str, *, num_nodes: int, dispatcher: str, micro_batches: int) -> tuple[Engine, Fabric]:
    """Tokens go to at most two nodes, which is what groups of experts are here."""
    rank, world = dist.get_rank(), dist.get_world_size()
    fabric = Fabric(rank, [r // PER_NODE for r in range(world)], intra=LINKS["intra"], inter=LINKS["inter"])
    words += f" parallel.ep={world} parallel.dispatcher={dispatcher} cluster.gpus_per_node={PER_NODE} model.dim=256"
    words += f" model.num_groups={num_nodes} model.num_limited_groups=2"
    return Engine(configured(words, micro_batches=micro_batches), transport=fabric), fabric


def sent(engine: Engine, fabric: Fabric, tracer: Recorder, seen_by: Tracer) -> tuple[list[Span] | None, dict[str, int]]:
    """A step's spans, on rank 0, and the bytes of all ranks over each kind of link."""
    before = fabric.sent_bytes
    spans = traced(engine, tracer, seen_by, limited_choice)
    total = torch.tensor([fabric.sent_bytes[kind] - before[kind] for kind in LINKS])
    dist.all_reduce(total)
    return spans, dict(zip(LINKS, total.tolist()))


def node_rank(num_nodes: int, runs: int) -> list[dict]:
    """One block, nothing overlapped: what an exchange takes."""
    tracer, cases = Recorder(dist.get_rank()), []
    for payload, dispatcher in ((payload, dispatcher) for payload in ("bf16", "fp8") for dispatcher in DISPATCHERS):
        engine, fabric = on_nodes(
            f"precision={payload} data.seq_len=256 model.max_seq_len=256", num_nodes=num_nodes, dispatcher=dispatcher, micro_batches=1
        )
        cases.append(({"nodes": num_nodes, "payload": payload, "dispatcher": dispatcher, "runs": []}, engine, fabric))
    for i in range(runs + 1):  # the first is for warming up
        for row, engine, fabric in cases:
            spans, num_bytes = sent(engine, fabric, tracer, NoOverlap(tracer, {}))
            if spans and i:
                row["runs"].append(numbers(spans) | num_bytes)
    return [row for row, _, _ in cases]


def pairs_rank(slot: float, runs: int) -> dict[str, dict[str, list]]:
    """{dispatcher: {mode: runs}}: compute in even slots, and links on which an exchange takes one."""
    tracer, num, cases = Recorder(dist.get_rank()), 8, []
    compute = {key: slot * slots for key, slots in SLOTS["even"].items() if key[0] not in EXCHANGES}
    for dispatcher in DISPATCHERS:
        words = "parallel.schedule=dualpipev parallel.chunks=2 data.seq_len=64"
        engine, fabric = on_nodes(words, num_nodes=2, dispatcher=dispatcher, micro_batches=num)
        _, num_bytes = sent(engine, fabric, tracer, tracer)
        # Two legs follow each other; one exchange uses both kinds of links at once, and is as long as the slower.
        ratio = LINKS["intra"].bandwidth / LINKS["inter"].bandwidth
        load = num_bytes["inter"] + (num_bytes["intra"] / ratio if dispatcher == "hierarchical" else 0)
        bandwidth = load / (4 * 2 * num * 4) / slot  # ranks, stages, micro-batches; there and back, forward and backward
        links = {"intra": replace(LINKS["intra"], bandwidth=bandwidth * ratio), "inter": replace(LINKS["inter"], bandwidth=bandwidth)}
        cases.append((dispatcher, engine, fabric, links))
    found = {dispatcher: {mode: [] for mode in MODES} for dispatcher in DISPATCHERS}
    for _, mode, (dispatcher, engine, fabric, links) in ((i, mode, case) for i in range(runs) for mode in MODES for case in cases):
        for kind, port in fabric.ports.items():
            port.link = Link() if mode == "no latency" else links[kind]
        spans = traced(engine, tracer, (NoOverlap if mode == "no overlap" else Pace)(tracer, compute), limited_choice)
        if spans:
            found[dispatcher][mode].append(numbers(spans))
    return found


if __name__ == "__main__":
    main()
