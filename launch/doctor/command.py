"""`shoestring doctor`: what is wrong with this node, or with all nodes of a fabric, before money is spent.

Alone it looks at this machine, and starts a few ranks here that look at each other. As ranks of torchrun, the first of each node looks at
its machine, all look at each other, and rank 0 says what came of it. `quick` is what needs no rank and imports nothing heavy, for `launch`.
"""

import dataclasses
import json
import os
import pkgutil
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from ...conf.compose import load_any_data
from ...conf.schema import Config
from .. import exit_codes
from ..environment import Place, under_torchrun
from . import gpus, machine, network, software, storage, variables
from .line import CODES, FAIL, WARN, Line, exit_code, merged, show, skipped, warn

__all__ = ["FAIL", "KINDS", "WARN", "Line", "exit_code", "main", "quick", "show"]

# By name: they import torch, which --quick need not wait for.
_ALONE, _JOINED = "shoestring.launch.doctor.world:alone", "shoestring.launch.doctor.world:joined"
_WANDB_S = {True: 1.0, False: 5.0}  # quickly, or not
KINDS = tuple(CODES)
_PACKAGE = Path(__file__).resolve().parents[2]


def main(
    words: Sequence[str],
    config_dir: str | Path | None = None,
    *,
    as_json: bool = False,
    only_quick: bool = False,
    port: int | None = None,
    say: Callable[[str], None] | None = None,
) -> int:
    """An exit code: of the first failure, 0 without one. Of ranks that torchrun has started rank 0 speaks. `say`: None for the console."""
    config, environ = load_any_data(list(words), config_dir), dict(os.environ)
    place = _place(environ)
    if only_quick and place and place.rank:
        return exit_codes.OK
    mine = lambda: [*_machine(config, environ, place, port, hurried=only_quick)]
    if place and not only_quick:
        by_host, together = pkgutil.resolve_name(_JOINED)(config, place, mine)
        if place.rank:
            return exit_codes.OK
    else:
        by_host = {socket.gethostname(): mine()}
        together = [] if only_quick else pkgutil.resolve_name(_ALONE)(config)
    lines = sorted([*merged(by_host), *together], key=lambda line: list(CODES).index(line.kind))
    code = exit_code(lines)
    if as_json:
        record = {"exit_code": code, "hosts": list(by_host), "lines": [dataclasses.asdict(line) for line in lines]}
        (say or print)(json.dumps(record, indent=1, ensure_ascii=False))
    else:
        show(lines, title=_title(config, list(by_host), place), say=say)
    return code


def quick(config: Config) -> list[Line]:
    """What one process finds out about this machine in a second or two, W&B included. Imports no torch."""
    environ = dict(os.environ)
    return [*_machine(config, environ, _place(environ), None, hurried=True)]


def _machine(config: Config, environ: Mapping[str, str], place: Place | None, port: int | None, *, hurried: bool) -> Iterator[Line]:
    seen, rdma = gpus.look(), network.rdma()
    nodes, local_ranks = _size(config, environ, place)
    device = config.launch.device if config.launch.device != "auto" else "cuda" if seen.gpus else "cpu"
    situation = variables.Situation(
        gpus=len(seen.gpus), rdma=rdma, interfaces=network.interfaces(), cores=machine.cores(), local_ranks=local_ranks,
        nodes=place.world_size // local_ranks if place else 1, device=device, wandb=config.launch.wandb, package=_PACKAGE,
    )  # fmt: skip
    yield from software.check(config)
    yield from _guarded("software", "limits", lambda: machine.check(config, local_ranks, rdma))
    yield from _guarded("software", "port", lambda: [_port(port, place)])
    yield from variables.check(environ, situation)
    yield from _guarded("storage", "storage", lambda: storage.check(config, local_ranks))
    yield from gpus.check(config, seen)
    yield from _guarded("machine", "network", lambda: network.check_devices(config, nodes))
    yield from network.check_wandb(config, environ, timeout_s=_WANDB_S[hurried])


def _guarded(kind: str, check: str, find: Callable[[], Iterable[Line]]) -> Iterator[Line]:
    """What the system refuses to tell is one line, and no end of all others."""
    try:
        yield from find()
    except OSError as error:
        yield warn(kind, check, f"cannot be looked at: {error}", "is this process allowed to? id")


def _port(port: int | None, place: Place | None) -> Line:
    """On the node that would hold it."""
    if place and port is None:
        return skipped("software", "port", "torchrun holds the one that these ranks met at; another: --port N")
    if place and place.rank:
        return skipped("software", f"port {port}", "looked at on the first node")
    return network.check_port(network.PORT if port is None else port)


def _place(environ: Mapping[str, str]) -> Place | None:
    """None, too, where the variables of ranks are not whole: a line says so."""
    whole = all(environ.get(name, "0").isdecimal() for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"))
    return Place.from_environment() if whole and "MASTER_ADDR" in environ and "MASTER_PORT" in environ else None


def _size(config: Config, environ: Mapping[str, str], place: Place | None) -> tuple[int, int]:
    """(nodes, ranks on this one) of a run: of the ranks that are there, or as its layout has them."""
    if place:
        local = environ.get("LOCAL_WORLD_SIZE", "")
        local_ranks = int(local) if local.isdecimal() and int(local) else place.world_size
        return max(1, place.world_size // local_ranks), local_ranks
    world_size = config.parallel.world_size
    if config.cluster.device.startswith("CPU"):
        return 1, world_size
    local_ranks = min(world_size, config.cluster.gpus_per_node)
    return -(-world_size // local_ranks), local_ranks


def _title(config: Config, hosts: Sequence[str], place: Place | None) -> str:
    p = config.parallel
    where = hosts[0] if len(hosts) == 1 else f"{len(hosts)} nodes"
    ranks = f", {place.world_size} ranks" if place and under_torchrun() else ""
    run = f"{config.model.name} on {p.world_size:,} rank(s) (pp {p.pp} x edp {p.edp} x ep {p.ep}), cluster {config.cluster.name}"
    return f"{where}{ranks}; for {run}, run_dir {config.run_dir}"
