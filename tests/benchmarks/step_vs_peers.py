"""One optimizer step of Shoestring beside its peers', on this machine's CPU: `python tests/benchmarks/step_vs_peers.py [options] [words]`.

The same 6.1 M-parameter DeepSeek-V3-shaped model, from the same weights, on the same tokens: against `transformers` on two threads of
one process, and against DeepSpeed AutoEP on two processes of one thread. Prints ratios of interleaved pairs; tokens/s are for
orientation. Words change the model that all train, as for `shoestring train`: model.dim=256. Takes about ten minutes.
"""

import argparse
import datetime
import os
import platform
import warnings
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # read when DeepSpeed is imported
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import autoep
import torch
import torch.distributed as dist
from arena import Arena, Duel, Entry
from peers import SEQ_LEN, SEQUENCES, Contestant, Shoestring, Variant, configure, make
from shoestring.launch.local import fork_ranks
from shoestring.train.cost import num_params
from torch.profiler import ProfilerActivity, profile

PRECISIONS = ("fp32", "bf16")
OURS = [  # the first of each precision is what everyone meets
    Variant(library="shoestring", precision=p, compiled=compiled, words=("launch.compile=true",) if compiled else ())
    for compiled in (False, True)
    for p in PRECISIONS
]
TRANSFORMERS = [
    Variant(library="transformers", precision=p, experts=experts, compiled=compiled)
    for compiled in (False, True)
    for p in PRECISIONS
    for experts in ("eager", "grouped_mm")
]
AUTOEP = [Variant(library="AutoEP", precision=p, experts=experts) for p in PRECISIONS for experts in ("loop", "grouped_mm")]
AIMS = {"plain fp32": 1.15, "best": 2.0, "ep 2": 1.5}
BALANCING_OFF = ("optim.bias_update_speed=0", "optim.sequence_balance_coef=0")  # peers have none: without it all train alike
AGREEMENT = 1e-4


def main() -> None:
    options = parse()
    print_setting(options)
    autoep.preload()
    # Ranks are forked while this process has not computed anything: OpenMP's threads do not survive a fork.
    headlines = {}
    for ranks, part in ((autoep.RANKS, two_ranks), (1, one_process)):
        headlines |= fork_ranks(ranks, part, options, timeout_s=7200)[0]
    print("\nheadline                        ratio   aim   pair")
    for name, aim in AIMS.items():
        if name in headlines:
            duel = headlines[name]
            print(f"{name:<28} {duel.ratio[1]:>8.2f} {aim:>5.2f}   {duel.ours} / {duel.theirs}")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=10, help="timed pairs of steps in each duel (default 10)")
    parser.add_argument("--threads", type=int, default=2, help="of the single process; the two ranks have half of them each")
    parser.add_argument("--quick", action="store_true", help="3 pairs, nothing compiled")
    parser.add_argument("--only", default="", metavar="TEXT", help="peers whose name has this in it, such as AutoEP or 'bf16 grouped_mm'")
    parser.add_argument("--profile", action="store_true", help="instead: where the time of one step goes, for plain contestants")
    parser.add_argument("words", nargs="*", help="configuration words")
    options = parser.parse_args()
    options.pairs = 3 if options.quick else options.pairs
    if options.pairs < 2:
        parser.error(f"--pairs {options.pairs}: quartiles want at least 2")
    return options


def print_setting(options: argparse.Namespace) -> None:
    m = configure(options.words, precision="fp32", micro=4).model
    libraries = " ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "deepspeed"))
    print(f"{datetime.date.today()}  {cpu_name()}, {os.cpu_count()} cores, {options.threads} threads")
    print(f"python {platform.python_version()}, {libraries}")
    print(
        f"{num_params(m).total / 1e6:.2f} M parameters: {m.num_layers} layers of {m.dim}, {m.num_experts} experts of "
        f"{m.expert_hidden_dim}, top {m.top_k}, vocabulary {m.vocab_size}; a step is {SEQUENCES} sequences of {SEQ_LEN} tokens"
    )
    print(f"ratio: the peer's time / Shoestring's, median [quartiles] of {options.pairs} pairs of steps")
    print("(n): sequences in a micro-batch, the faster of two choices for each side", flush=True)


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


# ---------------------------------------------------------------- the two sections, run by forked ranks


def two_ranks(options: argparse.Namespace) -> dict[str, Duel]:
    """Each on half the threads."""
    torch.set_num_threads(max(1, options.threads // autoep.RANKS))

    def make_on_ranks(variant: Variant, micro: int) -> Contestant:
        if variant.library == "AutoEP":
            return autoep.AutoEP(configure(options.words, precision="fp32", micro=micro, ranks=autoep.RANKS), variant)
        words = [*options.words, *variant.words]
        return Shoestring(configure(words, precision=variant.precision, micro=micro, ranks=autoep.RANKS))

    title = f"ep {autoep.RANKS}: {autoep.RANKS} processes of {torch.get_num_threads()} thread(s), gloo"
    duels = section(options, title, make_on_ranks, AUTOEP, splits=[4, SEQUENCES // autoep.RANKS])
    return {"ep 2": duels["best"]} if duels else {}


def one_process(options: argparse.Namespace) -> dict[str, Duel]:
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")  # the compiler's, about code of transformers
    title = f"one process of {options.threads} thread(s)"
    return section(options, title, lambda v, micro: make(v, micro=micro, words=options.words), TRANSFORMERS, splits=[4, SEQUENCES])


def section(options, title: str, make_one, peers: list[Variant], splits: list[int]) -> dict[str, Duel]:
    """Print agreement, then a table; return the duels of the headlines: of plain fp32, and of the fastest of either side."""
    allowed = lambda v: not (v.compiled and (options.quick or options.profile))
    ours, peers = [v for v in OURS if allowed(v)], [v for v in peers if allowed(v) and options.only in v.name]
    if not peers:
        return {}
    arena = Arena(make_one, vocab_size=configure(options.words, precision="fp32", micro=splits[0]).model.vocab_size, pairs=options.pairs)
    say(f"\n{title}")
    if options.profile:
        for variant in [*ours, *peers]:
            print_profile(arena, Entry(variant=variant, micro=splits[-1]))
        return {}
    check_agreement(arena, peers, splits[0])
    duels, speeds = survey(arena, ours, peers, splits)
    headlines = {"best": best_pair(arena, duels, speeds)}
    plain = [d for d in duels if d.theirs.variant in peers and d.theirs.variant.precision == "fp32" and not d.theirs.variant.compiled]
    if plain:
        headlines["plain fp32"] = min(plain, key=lambda d: d.ratio[1])
    return headlines


def check_agreement(arena: Arena, peers: list[Variant], micro: int) -> None:
    """All train the same model: the losses of three steps, printed; in fp32 they must be equal."""
    for precision in PRECISIONS:
        ours = arena.losses(Entry(variant=Variant(library="shoestring", precision=precision, words=BALANCING_OFF), micro=micro), 3)
        say(f"  losses, {precision}, balancing off: shoestring {' '.join(f'{loss:.6f}' for loss in ours)}", end="")
        for variant in (v for v in peers if v.precision == precision and not v.compiled):
            apart = max(abs(a - b) for a, b in zip(ours, arena.losses(Entry(variant=variant, micro=micro), 3)))
            say(f"; {variant.library} {variant.experts} within {apart:.1e}", end="")
            if precision == "fp32" and not apart <= AGREEMENT:
                raise SystemExit(f"\n{variant.name} does not train the same model: losses are {apart:.1e} apart, more than {AGREEMENT}")
        say("")


def survey(arena: Arena, ours: list[Variant], peers: list[Variant], splits: list[int]) -> tuple[list[Duel], dict[Entry, float]]:
    """Everyone, our other variants too, against the plain Shoestring of the same precision. Returns the duels, and everyone's speed
    relative to the first: a product of ratios, since tokens/s of different minutes do not compare."""
    duels, speeds, first = [], {}, None
    say(f"  {'variant':<42} {'tokens/s':>9} {'beside shoestring':>26}   ratio")
    for precision in PRECISIONS:
        (plain, *more), others = [[v for v in side if v.precision == precision] for side in (ours, peers)]
        if not others:
            continue
        base = arena.best_split(plain, splits)
        if first is None:
            first, speeds[base] = base, 1.0
        meetings = [(first, base)] * (base != first) + [(base, arena.best_split(v, splits)) for v in [*more, *others]]
        for one, other in meetings:
            duels.append(arena.duel(one, other))
            speeds[other] = speeds[one] / duels[-1].ratio[1]
            say_duel(duels[-1])
    return duels, speeds


def best_pair(arena: Arena, duels: list[Duel], speeds: dict[Entry, float]) -> Duel:
    """The fastest of ours against the fastest of theirs in the survey, measured against each other."""
    ours, theirs = (max((e for e in speeds if (e.variant in OURS) == mine), key=speeds.get) for mine in (True, False))
    known = [d for d in duels if (d.ours, d.theirs) == (ours, theirs)]
    if not known:
        say("  best against best:")
        known = [arena.duel(ours, theirs)]
        say_duel(known[0])
    return known[0]


def print_profile(arena: Arena, entry: Entry) -> None:
    """The operators of two steps, after three to warm up."""
    contestant, rows = arena.make(entry.variant, entry.micro), list(arena.rows(5))
    for batch in rows[:3]:
        contestant.step(batch)
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        for batch in rows[3:]:
            contestant.step(batch)
    say(f"\n{entry}, two steps")
    say(seen.key_averages().table(sort_by="self_cpu_time_total", row_limit=20, max_name_column_width=44))


def say_duel(duel: Duel) -> None:
    low, middle, high = duel.ratio
    ours, theirs = duel.tokens_per_second
    beside = f"{str(duel.ours).removeprefix('shoestring ')} {ours:,.0f}"
    say(f"  {duel.theirs!s:<42} {theirs:>9,.0f} {beside:>26}   {middle:.2f} [{low:.2f} {high:.2f}]")


def say(text: str, end: str = "\n") -> None:
    if dist.get_rank() == 0:
        print(text, end=end, flush=True)


if __name__ == "__main__":
    main()
