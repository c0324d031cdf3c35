"""Which environment variables contradict each other, the configuration or the machine, or cost what nobody wants to pay: for each, what it
does and what to do.

`FLAGS` is the table of those that are wrong by their value alone; the functions after it look at more than one fact. Nothing here reads the
environment: it is handed in.
"""

import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from .line import FAIL, WARN, Line, fail, ok, warn

KIND = "variables"
Environ = Mapping[str, str]
_TRUE = ("1", "true", "yes", "y", "on")
_HERE = ("localhost", "127.0.0.1", "::1")


@dataclass(frozen=True, kw_only=True)
class Situation:
    """`gpus`: that the driver sees. `rdma`, `interfaces`: names of devices. `local_ranks`: of a run on this node. `nodes`: that take part.
    `package`: the folder of the package that is running."""

    gpus: int = 0
    rdma: Sequence[str] = ()
    interfaces: Sequence[str] = ()
    cores: int = 1
    local_ranks: int = 1
    nodes: int = 1
    device: str = "cpu"  # that ranks compute on
    wandb: str = "disabled"
    package: Path = Path()


@dataclass(frozen=True, kw_only=True)
class Flag:
    """`bad`: whether a value is. `matters`: where it would be a failure; elsewhere it is a warning."""

    name: str
    bad: Callable[[str], bool]
    does: str
    matters: Callable[[Situation], bool] = lambda s: False
    do: str = ""  # unset it


_is_true: Callable[[str], bool] = lambda value: value.strip().lower() in _TRUE
_on_gpu: Callable[[Situation], bool] = lambda s: s.device == "cuda"

FLAGS = (
    Flag(name="NCCL_P2P_DISABLE", bad=_is_true, does="GPUs of a node reach each other through the host's memory, not over NVLink"),
    Flag(name="NCCL_SHM_DISABLE", bad=_is_true, does="GPUs of a node without NVLink between them talk over network sockets"),
    Flag(name="NCCL_IB_DISABLE", bad=_is_true, does="NCCL leaves RDMA alone and sends over TCP", matters=lambda s: bool(s.rdma)),
    Flag(name="CUDA_LAUNCH_BLOCKING", bad=_is_true, does="the host waits for each kernel: nothing overlaps", matters=_on_gpu),
    Flag(name="TRITON_INTERPRET", bad=_is_true, does="Triton kernels run in Python, thousands of times slower", matters=_on_gpu),
    Flag(name="PYTORCH_NO_CUDA_MEMORY_CACHING", bad=_is_true, does="each tensor is allocated by the driver, which waits for the GPU",
         matters=_on_gpu),
    Flag(name="NCCL_DEBUG", bad=lambda v: v.upper() == "TRACE", does="NCCL writes a line for each call of each rank",
         do="export NCCL_DEBUG=WARN"),
    Flag(name="TORCH_DISTRIBUTED_DEBUG", bad=lambda v: v.upper() == "DETAIL", does="ranks compare each collective with each other first"),
    Flag(name="TORCH_NCCL_ASYNC_ERROR_HANDLING", bad=lambda v: v.strip() == "0", does="an error in NCCL ends no rank: they wait for ever"),
    Flag(name="NCCL_ALGO", bad=bool, does="NCCL may not choose the algorithm that fits a message"),
    Flag(name="NCCL_PROTO", bad=bool, does="NCCL may not choose the protocol that fits a message; a wrong one can corrupt data"),
    Flag(name="PYTHONOPTIMIZE", bad=bool, does="Python leaves assertions out, and with them checks of invariants"),
)  # fmt: skip


def check(environ: Environ, situation: Situation) -> Iterator[Line]:
    """A line for each variable that is wrong; one that says so where none is."""
    found = [*_flags(environ, situation)]
    for rule in (_ranks, _threads, _visible, _waiting, _interfaces, _proxies, _wandb, _device, _path):
        found += rule(environ, situation)
    yield from found or [ok(KIND, "environment", f"none of {len(environ)} variables is in conflict with another, or costly")]


def _flags(environ: Environ, situation: Situation) -> Iterator[Line]:
    for flag in FLAGS:
        value = environ.get(flag.name)
        if value is not None and flag.bad(value):
            state = FAIL if flag.matters(situation) else WARN
            yield Line(kind=KIND, check=f"{flag.name}={value}", state=state, value=flag.does, advice=flag.do or f"unset {flag.name}")


# ---------------------------------------------------------------- more than one fact


def _ranks(environ: Environ, situation: Situation) -> Iterator[Line]:
    """Launchers set these together; a shell in which one was left starts every process as its own run, or as a rank that waits."""
    has = {name: name in environ for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")}
    numbers = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK") if has[name]]
    wrong = [name for name in numbers if not environ[name].isdecimal()]
    if wrong:
        yield fail(KIND, f"{wrong[0]}={environ[wrong[0]]}", "is no whole number", f"unset {' '.join(numbers)}, and let torchrun set them")
        return
    if has["RANK"] != has["WORLD_SIZE"]:
        there, lacks = ("RANK", "WORLD_SIZE") if has["RANK"] else ("WORLD_SIZE", "RANK")
        value = f"is set and {lacks} is not: each process would train a run of its own"
        yield fail(KIND, f"{there}={environ[there]}", value, f"unset {there}, or start ranks with torchrun, which sets both")
        return
    if not has["RANK"]:
        return
    if int(environ["RANK"]) >= int(environ["WORLD_SIZE"]):
        value = f"is not below WORLD_SIZE={environ['WORLD_SIZE']}: ranks are counted from 0"
        yield fail(KIND, f"RANK={environ['RANK']}", value, "start ranks with torchrun")
    lacking = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not has[name]]
    if lacking:
        value = f"is set and {' and '.join(lacking)} not: ranks do not know where to meet"
        yield fail(KIND, f"RANK={environ['RANK']}", value, "unset RANK WORLD_SIZE, or start ranks with torchrun")
    elif not has["LOCAL_RANK"] and situation.device == "cuda":
        value = "is not set: RANK stands for it, which is wrong on all nodes but the first"
        yield warn(KIND, "LOCAL_RANK", value, "start ranks with torchrun, or: export LOCAL_RANK=$SLURM_LOCALID")


def _threads(environ: Environ, situation: Situation) -> Iterator[Line]:
    value = environ.get("OMP_NUM_THREADS")
    if value is None:
        return
    threads = value.split(",")[0].strip()
    if not threads.isdecimal() or int(threads) == 0:
        yield fail(KIND, f"OMP_NUM_THREADS={value}", "is no number of threads", "export OMP_NUM_THREADS=1")
    elif int(threads) > 1 and int(threads) * situation.local_ranks > situation.cores:
        total = int(threads) * situation.local_ranks
        what = f"{threads} threads x {situation.local_ranks} rank(s) = {total} on {situation.cores} core(s): they wait for each other"
        fits = max(1, situation.cores // situation.local_ranks)
        yield warn(KIND, f"OMP_NUM_THREADS={value}", what, f"export OMP_NUM_THREADS={fits}")


def _visible(environ: Environ, situation: Situation) -> Iterator[Line]:
    value = environ.get("CUDA_VISIBLE_DEVICES")
    if value is None or not situation.gpus:
        return
    listed = [part.strip() for part in value.split(",")]
    seen = next((n for n, part in enumerate(listed) if part in ("", "-1", "NoDevFiles")), len(listed))  # what follows is not seen, either
    if seen < situation.gpus:
        what = f"hides {situation.gpus - seen} of {situation.gpus} GPUs"
        enough = seen >= situation.local_ranks and seen > 0
        if situation.device == "cuda" and not enough:
            what += f", and {situation.local_ranks} rank(s) of this node want one each"
        make = fail if situation.device == "cuda" and not enough else warn
        yield make(KIND, f"CUDA_VISIBLE_DEVICES={value}", what, "unset CUDA_VISIBLE_DEVICES")


def _waiting(environ: Environ, situation: Situation) -> Iterator[Line]:
    waits = next((n for n in ("TORCH_NCCL_BLOCKING_WAIT", "NCCL_BLOCKING_WAIT") if _is_true(environ.get(n, ""))), None)
    if not waits:
        return
    names = ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "NCCL_ASYNC_ERROR_HANDLING")
    handles = next((n for n in names if environ.get(n, "0").strip() != "0"), None)
    does = "the host waits for each collective: nothing overlaps"
    if handles:
        value = f"contradicts {handles}={environ[handles]}, which torch then leaves aside; {does}"
        yield fail(KIND, f"{waits}={environ[waits]}", value, f"unset {waits}")
    else:
        yield warn(KIND, f"{waits}={environ[waits]}", does, f"unset {waits}")


def _interfaces(environ: Environ, situation: Situation) -> Iterator[Line]:
    """NCCL takes beginnings of names, after "^" those to leave out, after "=" whole names; gloo whole names only."""
    for name in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        value = environ.get(name, "")
        if not value or not situation.interfaces:
            continue
        leave_out, whole = value.startswith("^"), name.startswith("GLOO") or value.lstrip("^").startswith("=")
        words = [word for word in value.lstrip("^=").split(",") if word]
        fits = [i for i in situation.interfaces if any(i == word if whole else i.startswith(word) for word in words)]
        chosen = [i for i in situation.interfaces if i not in fits] if leave_out else fits
        if not chosen:
            value_of = f"fits no interface of this machine: {', '.join(situation.interfaces)}"
            yield fail(KIND, f"{name}={value}", value_of, f"unset {name}, or name one of these")
        elif situation.nodes > 1 and set(chosen) == {"lo"} and environ.get("MASTER_ADDR") not in _HERE:
            yield fail(KIND, f"{name}={value}", "no other node is reached over lo", f"unset {name}")
    hca = environ.get("NCCL_IB_HCA", "")
    words = [word.partition(":")[0] for word in hca.lstrip("^=").split(",") if word]
    if situation.rdma and words and not hca.startswith("^") and not any(d.startswith(w) for w in words for d in situation.rdma):
        yield fail(KIND, f"NCCL_IB_HCA={hca}", f"fits no RDMA device here: {', '.join(situation.rdma)}", "unset NCCL_IB_HCA")


def _proxies(environ: Environ, situation: Situation) -> Iterator[Line]:
    """In either spelling; the lower one wins, as in Python and curl."""
    get = lambda name: environ.get(name.lower()) or environ.get(name, "")
    named = {name: get(name) for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY") if get(name)}
    if not named:
        return
    for name, value in named.items():
        if urlsplit(value if "//" in value else f"//{value}").hostname in _HERE and situation.nodes > 1:
            yield warn(KIND, name, "its proxy is on this machine: each node needs one of its own", "check it on every node, or unset it")
    exempt = {word.strip().lstrip(".") for word in get("NO_PROXY").split(",")}
    if not exempt & {"*", *_HERE}:
        value = "requests to this machine itself (127.0.0.1: dashboards, metrics) would go through the proxy"
        yield warn(KIND, "/".join(named), value, "export NO_PROXY=localhost,127.0.0.1,$NO_PROXY")


def _wandb(environ: Environ, situation: Situation) -> Iterator[Line]:
    mode = environ.get("WANDB_MODE", "").strip().lower()
    mode = "disabled" if _is_true(environ.get("WANDB_DISABLED", "")) else mode
    wanted = situation.wandb
    alike = {"dryrun": "offline", "run": "online"}.get(mode, mode)
    if mode and alike != wanted:
        name = "WANDB_MODE" if environ.get("WANDB_MODE") else "WANDB_DISABLED"
        value = f"has no effect: launch.wandb={wanted} is what counts"
        do = f"launch.wandb={alike}" if alike in ("online", "offline", "disabled") else f"launch.wandb={wanted}"
        yield warn(KIND, f"{name}={environ[name]}", value, f"give {do} if that is meant, and unset {name}")


def _device(environ: Environ, situation: Situation) -> Iterator[Line]:
    value = environ.get("DS_ACCELERATOR")
    if value and value != situation.device:
        what = f"DeepSpeed would compute on {value}, and ranks on {situation.device}"
        yield fail(KIND, f"DS_ACCELERATOR={value}", what, "unset DS_ACCELERATOR")


def _path(environ: Environ, situation: Situation) -> Iterator[Line]:
    for entry in filter(None, re.split(r":", environ.get("PYTHONPATH", ""))):
        folder = Path(entry).resolve()
        other = (folder / "shoestring").resolve()
        if folder == situation.package:
            value = "is the package itself: `train` and `kernels` are top-level modules then, for other packages too"
            yield warn(KIND, "PYTHONPATH", f"{entry} {value}", "unset PYTHONPATH, and pip install -e . instead")
        elif other != situation.package and (other / "__init__.py").is_file():
            value = f"{entry} has another shoestring than the one that runs, {situation.package}"
            yield fail(KIND, "PYTHONPATH", value, "unset PYTHONPATH")
        elif shadowed := [n for n in ("torch", "triton", "deepspeed") if _shadows(folder, n)]:
            yield warn(KIND, "PYTHONPATH", f"{entry} has {', '.join(shadowed)}, found before what is installed", "unset PYTHONPATH")


def _shadows(folder: Path, name: str) -> bool:
    if not ((folder / name / "__init__.py").is_file() or (folder / f"{name}.py").is_file()):
        return False
    found = importlib.util.find_spec(name)
    return bool(found and found.origin and Path(found.origin).resolve().is_relative_to(folder))
