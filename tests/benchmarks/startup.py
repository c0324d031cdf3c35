"""What starting a run takes, part by part, and how each part grows: `python tests/benchmarks/startup.py [--out docs/startup.md]`.

On one machine without a GPU: imports of a rank, the rendezvous of agents and ranks (all on this machine's cores: an upper bound for as many
machines), the groups of each world size as one rank makes them with nobody else there, configurations, and what is logged. Each part is
fitted by a constant, a logarithm, a line or a square, whichever is nearest, and drawn out to 256 nodes of 8 ranks.
"""

import argparse
import datetime
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from shoestring.conf.compose import load
from shoestring.conf.schema import ParallelConfig
from shoestring.launch import environment
from shoestring.launch.validate import validate
from shoestring.parallel import world
from shoestring.parallel._torch import join_alone
from shoestring.parallel.groups import Mesh
from torch.distributed.elastic.rendezvous.c10d_rendezvous_backend import C10dRendezvousBackend
from torch.distributed.elastic.rendezvous.dynamic_rendezvous import DynamicRendezvousHandler

NODES, PER_NODE = 256, 8
LAYOUTS = {8: (2, 1, 4), 64: (4, 2, 8), 512: (8, 2, 32), 2048: (16, 2, 64)}  # world: pp, edp, ep; the last is DeepSeek-V3's
SHAPES: dict[str, Callable] = {"constant": np.zeros_like, "log": np.log2, "linear": lambda n: n, "quadratic": lambda n: n**2}
V3 = ["experiment=deepseek_v3", "data.sources.files.paths=[corpus]"]
fork = multiprocessing.get_context("fork")


@dataclass(frozen=True, kw_only=True)
class Part:
    """`seconds` by how many there were of `of` (agents, ranks). `at`: how many there are of them on 256 nodes. `names`: whole seconds
    beside those, in which the store waited for answers of a name server that were lost."""

    name: str
    of: str
    seconds: dict[int, float]
    at: int
    names: dict[int, int] = field(default_factory=dict)

    @property
    def fitted(self) -> tuple[str, float]:
        return fit(self.seconds, self.at)


def fit(measured: dict[int, float], at: int) -> tuple[str, float]:
    """The shape nearest to what was measured, and its value at `at`: a + b g(n), b not negative, by least squares; a plainer shape is kept
    unless another halves its error."""
    n, y = np.array(list(measured), dtype=float), np.array(list(measured.values()))
    best: tuple[float, str, float] | None = None
    for name, shape in SHAPES.items():
        columns = np.stack([np.ones_like(n), shape(n)], axis=1)[:, : 1 if name == "constant" else 2]
        solved, *_ = np.linalg.lstsq(columns, y, rcond=None)
        if name != "constant" and solved[1] < 0:
            continue
        error = float(np.sqrt(np.mean((columns @ solved - y) ** 2)))
        value = float(solved[0] + (solved[1] * shape(np.array(float(at))) if len(solved) > 1 else 0.0))
        if best is None or error < best[0] / 2:
            best = (error, name, value)
    return best[1:]


# ---------------------------------------------------------------- parts


def imports(statement: str, runs: int = 3) -> tuple[float, float, int]:
    """(seconds by the clock, seconds of imports by -X importtime, modules) of a new interpreter."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    with tempfile.TemporaryDirectory() as away:
        run = lambda *flags: subprocess.run(
            [sys.executable, *flags, "-c", statement], cwd=away, env=variables, capture_output=True, text=True, check=True
        )
        run()
        taken = []
        for _ in range(runs):
            began = time.perf_counter()
            run()
            taken.append(time.perf_counter() - began)
        own = [int(us) for us in re.findall(r"^import time:\s+(\d+) \|", run("-X", "importtime").stderr, re.MULTILINE)]
    return statistics.median(taken), sum(own) / 1e6, len(own)


def agents(count: int) -> float:
    """Seconds until `count` agents, each a thread here, have met as torchrun's do (c10d, --nnodes=count)."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ready, errors = threading.Barrier(count + 1), []

    def agent(number: int) -> None:
        try:
            store = dist.TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)
            backend = C10dRendezvousBackend(store, "startup")
            handler = DynamicRendezvousHandler.from_backend("startup", store, backend, min_nodes=count, max_nodes=count)
            ready.wait()
            handler.next_rendezvous()
            ready.wait()
            handler._keep_alive_timer.cancel()
        except Exception as error:
            errors.append(error)
            ready.abort()

    threads = [threading.Thread(target=agent, args=(n,), daemon=True) for n in range(count)]
    for thread in threads:
        thread.start()
    ready.wait(60)
    began = time.perf_counter()
    ready.wait(300)
    taken = time.perf_counter() - began
    for thread in threads:
        thread.join()
    assert not errors, errors
    return taken


def ranks(count: int, join: bool) -> float:
    """Seconds until `count` forked ranks have each met all others at a store (`join`: over gloo, connected one to one)."""
    ports, results = [fork.Pipe(duplex=False) for _ in range(count)], fork.Queue()
    processes = [fork.Process(target=_rank, args=(n, count, ports[n][0], results, join), daemon=True) for n in range(count)]
    for process in processes:
        process.start()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, use_libuv=False)  # not while ranks are being forked
    began = time.perf_counter()
    for _, writer in ports:
        writer.send(store.port)
    for _ in processes:
        results.get(timeout=120)
    taken = time.perf_counter() - began
    for process in processes:
        process.kill()
        process.join()
    return taken


def _rank(rank: int, count: int, port, results, join: bool) -> None:
    store = dist.TCPStore("127.0.0.1", port.recv(), is_master=False, wait_for_workers=False)
    if join:
        world.join(store=store, rank=rank, world_size=count, timeout_s=120)
    else:
        if store.add("here", 1) == count:
            store.set("all", "1")
        store.wait(["all"], datetime.timedelta(seconds=120))
    results.put(rank)
    time.sleep(600)  # until all have met: the parent ends this


def groups(size: int) -> float:
    """Seconds in which one rank of a world makes its groups, the slower of the first and the last rank; nobody else is there."""
    results = fork.Queue()
    for rank in (0, size - 1):
        process = fork.Process(target=_groups, args=(size, rank, results))
        process.start(), process.join()
    return max(results.get(timeout=60) for _ in range(2))


def _groups(size: int, rank: int, results) -> None:
    pp, edp, ep = LAYOUTS[size]
    join_alone(size, rank)
    began = time.perf_counter()
    Mesh.create(ParallelConfig(pp=pp, edp=edp, ep=ep), rank, embeds_at_head=True)
    results.put(time.perf_counter() - began)
    results.close(), results.join_thread()


def configuration() -> tuple[float, float]:
    """(seconds to compose and check, seconds of `validate`) of DeepSeek-V3's run of several phases; the second time in a process."""
    load(V3)
    began = time.perf_counter()
    config = load(V3)
    composed = time.perf_counter()
    validate(config, 2048)
    return composed - began, time.perf_counter() - composed


def logged(short: int = 6, long: int = 16) -> tuple[float, float]:
    """Bytes that rank 0, and each other rank, write in 1000 steps of `tiny`: what a longer run writes more than a shorter one."""
    console, files = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for steps in (short, long):
            words = [f"run_dir={folder}/{steps}", f"data.cache_dir={folder}/cache", f"train.steps={steps}", "optim.warmup_steps=1"]
            done = subprocess.run([sys.executable, "-m", "shoestring.train", "experiment=tiny", *words], capture_output=True, cwd=folder)
            assert done.returncode == 0, done.stderr
            console[steps] = len(done.stdout) + len(done.stderr)
            files[steps] = sum(path.stat().st_size for path in Path(folder, str(steps), "logs").rglob("rank_*"))
    per = 1000 / (long - short)
    return (console[long] - console[short]) * per, (files[long] - files[short]) * per / 3


# ---------------------------------------------------------------- the page

_HELP = """
from shoestring.launch.cli import main
try:
    main(["--help"])
except SystemExit:
    pass
"""


def measure(say: Callable[[str], None]) -> tuple[list[tuple[str, str]], list[Part], float]:
    """Rows of what does not grow, what grows, and how long it all took."""
    began, fixed, parts = time.monotonic(), [], []
    for name, statement in (
        ("`shoestring --help`", _HELP),
        ("a rank, until torch is there", "import shoestring.launch.cli, torch"),
        ("a rank, until its trainer is there", "import shoestring.launch.launcher, shoestring.launch.worker"),
    ):  # fmt: skip
        clock, own, modules = imports(statement)
        fixed.append((f"imports: {name}", f"{clock:.2f} s by the clock; {own:.2f} s of imports, {modules} modules"))
        say(fixed[-1][0])
    composed, checked = configuration()
    fixed.append(("DeepSeek-V3's configuration, composed and checked", f"{composed:.2f} s; layouts of its phases {checked:.2f} s"))
    rank_0, others = logged()
    fixed.append(("logged in 1000 steps of `tiny`", f"rank 0 {rank_0:,.0f} bytes, every other rank {others:,.0f}"))
    say("fixed parts")
    for name, of, sizes, at, one in (
        ("agents meet (torchrun's c10d rendezvous)", "agents", (4, 8, 16, 32, 64), NODES, agents),
        ("ranks meet at a store", "ranks", (4, 8, 16, 32, 64), NODES * PER_NODE, lambda n: ranks(n, join=False)),
        ("ranks connect over gloo", "ranks", (4, 8, 16, 32, 64), NODES * PER_NODE, lambda n: ranks(n, join=True)),
        ("a rank makes its groups", "ranks", tuple(LAYOUTS), NODES * PER_NODE, groups),
    ):
        seconds = {n: statistics.median(one(n) for _ in range(3)) for n in sizes}
        names = {n: int(s) for n, s in seconds.items()} if name.startswith("ranks") else {}
        parts.append(Part(name=name, of=of, seconds={n: s - names.get(n, 0) for n, s in seconds.items()}, at=at, names=names))
        say(f"{name}: {parts[-1].seconds} {parts[-1].fitted}")
    return fixed, parts, time.monotonic() - began


def page(fixed: Sequence[tuple[str, str]], parts: Sequence[Part], *, load_before: float, seconds: float) -> str:
    """In Markdown."""
    lines = [
        "# Starting", "",
        "What comes before the first step, and how it grows with the world. `tests/benchmarks/startup.py` measures this page; "
        "`tests/scale/test_startup.py` counts what must not grow faster.", "",
        f"On {datetime.date.today()}: {os.cpu_count()} CPU cores ({platform.machine()}, no GPU), torch {torch.__version__}, "
        f"python {platform.python_version()}; cores busy with other work just before: {load_before:.2f}; {seconds:.0f} s. "
        "`python tests/benchmarks/startup.py --out docs/startup.md`", "",
        "| what | each rank, whatever the world |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in fixed), "",
    ]  # fmt: skip
    lines += ["| what grows | measured | grows | at 256 nodes x 8 |", "| --- | --- | --- | --- |"]
    for part in parts:
        shape, value = part.fitted
        waited = {n: f" + {s} s for names" for n, s in part.names.items() if s}
        measured = ", ".join(f"{n}: {_short(s)}{waited.get(n, '')}" for n, s in part.seconds.items())
        guess = f"{_short(value)}, extrapolated{', without names' if waited else ''}"
        there = f"{_short(part.seconds[part.at])}, measured" if part.at in part.seconds else guess
        lines.append(f"| {part.name} | {part.of} {measured} | {shape} | {there} ({part.at} {part.of}) |")
    return "\n".join([*lines, "", *NOTES, ""])


def _short(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds * 1e3:.3g} ms"


NOTES = """\
Medians of three. All agents and ranks shared these cores, so what they do at once took turns here: of as many machines, the part that is
their own work is not this slow, and the part of the one store is. Extrapolations are of the fitted shape, far outside of what was measured.

- **Imports** are read from the file system by every rank: the modules are its load, 2,048 times. Ranks import no data set library, no
  torch pipelining and no DeepSpeed unless their run uses one. torch's compiler comes with the first custom operator (torch does that).
- **Groups.** On NCCL a name is one call, twelve at most; gloo is asked for every group of the world, and makes only its own, without a
  barrier. A group's store operations grow with the group and not with the world.
- **gloo.** Connecting the world's hosts is one store read and one connection for each other rank: linear for a rank, quadratic for
  the store, and for cores that all ranks share, as here: of that many machines the square is an upper bound. It is the part to look at
  first on thousands of ranks.
- **Names.** torch's store asks a name server for the name of each rank that connects, one after another, and answers nobody meanwhile.
  Where that server loses answers, as here when many are asked for at once, each costs the resolver's patience: 5 s by default, so that 32
  ranks met in 5.1 s and 64 in 10.5 s. Shoestring sets `RES_OPTIONS=timeout:1 attempts:3` for its ranks unless the environment has it, and
  so has this page: an answer costs the whole seconds "for names" in the table, which no fit has in it. Set it for torchrun too, or use
  `python -m shoestring.launch.elastic`, which does.
- **What ranks are told.** `cluster.env` in a cluster file sets environment variables of ranks (those in the user's own environment
  stay), `cluster.threads` their OMP_NUM_THREADS, `cluster.pin` their CPUs: `cores` shares out the machine's, `numa` takes those beside the
  GPU. Memory follows by first touch. Rank 0's log says in one line what was set. (`tests/launch/test_pinning.py`,
  `tests/conf/test_variables.py`)
- **Logs.** Rank 0 writes to the console, the others to files of 10 MB at most ([exit-codes.md](exit-codes.md)).""".splitlines()


def others(seconds: float = 5.0) -> float:
    """Cores that are busy while nothing here is."""
    idle = lambda: sum(map(int, Path("/proc/stat").read_text().split("\n")[0].split()[4:6])) / os.sysconf("SC_CLK_TCK")
    before, began = idle(), time.monotonic()
    time.sleep(seconds)
    return max(0.0, os.cpu_count() - (idle() - before) / (time.monotonic() - began))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the page")
    options = parser.parse_args()
    environment.prepare(threads=1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    before = others()
    fixed, parts, seconds = measure(lambda line: print(line, file=sys.stderr, flush=True))
    text = page(fixed, parts, load_before=before, seconds=seconds)
    print(text)
    if options.out:
        options.out.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
