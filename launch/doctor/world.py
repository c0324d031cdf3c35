"""Ranks for the doctor: those that torchrun has started, or a few that are started here for it, on CPU or on this machine's GPUs."""

import json
import os
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist

from ...conf.errors import ConfigError
from ...conf.schema import Config
from ...parallel import world
from .. import device as devices
from .. import exit_codes, secrets
from ..environment import Place
from ..ranks import Ranks, Try
from ..validate import validate
from . import gpus
from .line import Line, fail, ok, skipped
from .ranks import everyones, look_together

_MOST = 4  # ranks that are started here
_PATIENCE_S = 60.0
_FOUND = "found.json"


def alone(config: Config) -> list[Line]:
    """What is left to see on this machine: the configuration's rules, torch's GPUs, and what a few ranks find."""
    try:
        validate(config)
        kind = devices.choose_type(config)
    except ConfigError as error:
        return [fail("software", "configuration", str(error), "change that setting"), skipped("fabric", "ranks", "none was started")]
    lines = [ok("software", "configuration", "every rule of schedules, dispatchers and kernels is kept"), *_torch_gpus(kind)]
    most = torch.cuda.device_count() if kind == "cuda" else _MOST
    num = min(config.cluster.gpus_per_node, _MOST, most)
    if num < 2:
        return [*lines, skipped("fabric", "ranks", f"one device of a node ({config.cluster.name}) has nobody here to talk to")]
    return [*lines, *start(config, kind, num)]


def _torch_gpus(kind: str) -> list[Line]:
    seen, there = len(gpus.look().gpus), torch.cuda.device_count() if kind == "cuda" else 0
    if not seen:
        return []
    if there < seen and kind == "cuda":
        return [fail("machine", "GPUs of torch", f"{there} of {seen}", "echo $CUDA_VISIBLE_DEVICES; python -m torch.utils.collect_env")]
    return [ok("machine", "GPUs of torch", f"{there} of {seen}" + (", as launch.device says" if kind == "cpu" else ""))]


def start(config: Config, kind: str, num: int, look: Callable[..., list[Line]] = look_together) -> list[Line]:
    """`num` ranks here, for as long as they look at each other. Nothing is left of them."""
    with tempfile.TemporaryDirectory(prefix="shoestring-doctor-") as folder:
        what = Try(
            run_dir=Path(folder), logs=Path(folder) / "logs", flight=Path(folder) / "flight", target=launched,
            args=(config, Path(folder), kind, look), world_size=num, device_type=kind, patience_s=_PATIENCE_S,
        )  # fmt: skip
        with Ranks(what) as ranks:
            ending = ranks.watch()
        found = Path(folder) / _FOUND
        if ending.code or not found.exists():
            value = f"{num} ranks started here: {ending.what or 'they said nothing'}"
            return [fail("fabric", "ranks", value, "can they meet? ip addr show lo; env | grep -E 'GLOO|NCCL'")]
        return [Line(**line) for line in json.loads(found.read_text())]


def launched(config: Config, folder: Path, kind: str, look: Callable[..., list[Line]]) -> int:
    """One of them. A failed one leaves at once: its peers are stuck."""
    place = Place.from_environment()
    try:
        on = _device(kind, place)
        world.join(on, timeout_s=_PATIENCE_S)
        lines = look(config, on, 0, socket.gethostname())
        if place.rank == 0:
            (folder / _FOUND).write_text(json.dumps([asdict(line) for line in lines]))
        dist.barrier()
        world.leave()
        return exit_codes.OK
    except BaseException as error:
        code, message = exit_codes.of(error), f"rank {place.rank}: {exit_codes.sentence(error)}"
        trace = secrets.hide(traceback.format_exc())
        record = {"time": time.monotonic(), "rank": place.rank, "code": code, "message": message, "traceback": trace}
        (folder / "logs" / f"failure-{place.rank}.json").write_text(json.dumps(record))
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)


def joined(config: Config, place: Place, mine: Callable[[], list[Line]]) -> tuple[Mapping[str, list[Line]], list[Line]]:
    """As a rank of a world that is started elsewhere: on rank 0 the lines of each node by its name, and those of all together; on the
    others nothing."""
    kind = devices.choose_type(config)
    on = _device(kind, place)
    world.join(on, timeout_s=max(_PATIENCE_S, min(600.0, config.launch.timeout_s)))
    try:
        node = place.rank - place.local_rank
        hosts = everyones((socket.gethostname(), node))
        host = _names(hosts)[node]
        lines = [*mine(), *_torch_gpus(kind)] if place.local_rank == 0 else []
        of_all = everyones((host, lines))
        together = look_together(config, on, node, host)
    finally:
        world.leave()
    return ({name: lines for name, lines in of_all if lines} if place.rank == 0 else {}), together


def _names(hosts: list[tuple[str, int]]) -> dict[int, str]:
    """Of each node; with a number where several are on one host."""
    nodes = dict.fromkeys(hosts)
    several = len({host for host, _ in nodes}) < len(nodes)
    return {node: f"{host} (node {i})" if several else host for i, (host, node) in enumerate(nodes)}


def _device(kind: str, place: Place) -> torch.device:
    if kind == "cpu":
        torch.set_num_threads(1)
        return torch.device("cpu")
    if place.local_rank >= (count := torch.cuda.device_count()):
        raise ConfigError("launch.device", "cuda", f"local rank {place.local_rank} has no GPU of its own: this machine has {count}")
    torch.cuda.set_device(place.local_rank)
    return torch.device("cuda", place.local_rank)
