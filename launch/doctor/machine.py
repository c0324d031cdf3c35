"""What the system gives a process: cores, kernel, limits of open files and of memory that stays in place."""

import os
import platform
import re
import resource
from collections.abc import Callable, Iterator, Sequence

from ...conf.schema import Config
from .line import Line, fail, ok, skipped, warn

KIND = "software"
_OLDEST_KERNEL = (5, 5)  # below it, processes that train over NCCL now and then hang (what accelerate warns of)

Limit = Callable[[int], tuple[int, int]]  # (soft, hard) of a resource


def check(config: Config, local_ranks: int, rdma: Sequence[str], *, limit: Limit = resource.getrlimit) -> Iterator[Line]:
    """`rdma`: its devices here."""
    yield _kernel(platform.release())
    yield _cores(local_ranks)
    yield _open_files(config.parallel.world_size, *limit(resource.RLIMIT_NOFILE))
    yield _locked_memory(rdma, *limit(resource.RLIMIT_MEMLOCK))


def cores() -> int:
    """That this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _kernel(release: str) -> Line:
    found = re.match(r"(\d+)\.(\d+)", release)
    if platform.system() == "Linux" and found and (int(found[1]), int(found[2])) < _OLDEST_KERNEL:
        return warn(KIND, "kernel", f"{release}: older than 5.5, with which ranks now and then hang", "update the system's kernel")
    return ok(KIND, "kernel", f"{platform.system()} {release}", alike=True)


def _cores(local_ranks: int) -> Line:
    return ok(KIND, "cores", f"{cores()} for {local_ranks} rank(s) of a run")


def _open_files(world_size: int, soft: int, hard: int) -> Line:
    """Over gloo a rank has a connection to each other one, in each of its groups; and it has files."""
    enough, fewest = 1024 + 8 * world_size, 256 + 2 * world_size
    if soft == resource.RLIM_INFINITY or soft >= enough:
        return ok(KIND, "open files", f"{_count(soft)} (ulimit -n); {world_size:,} ranks want {enough:,}")
    raised = hard == resource.RLIM_INFINITY or hard >= enough
    do = f"ulimit -n {enough}" if raised else f"raise nofile to {enough} in /etc/security/limits.conf (hard limit: {hard:,})"
    make = fail if soft < fewest else warn
    return make(KIND, "open files", f"{soft:,} (ulimit -n); {world_size:,} ranks want {enough:,}", do)


def _locked_memory(rdma: Sequence[str], soft: int, hard: int) -> Line:
    if not rdma:
        return skipped(KIND, "locked memory", f"no RDMA here, which needs it (ulimit -l: {_kib(soft)})")
    if soft == resource.RLIM_INFINITY:
        return ok(KIND, "locked memory", "unlimited (ulimit -l)")
    do = "ulimit -l unlimited; in a container: --ulimit memlock=-1; else memlock in /etc/security/limits.conf"
    return fail(KIND, "locked memory", f"{_kib(soft)} (ulimit -l): RDMA cannot hold its buffers in place", do)


def _count(number: int) -> str:
    return "unlimited" if number == resource.RLIM_INFINITY else f"{number:,}"


def _kib(number: int) -> str:
    """As `ulimit -l` says it."""
    return "unlimited" if number == resource.RLIM_INFINITY else f"{number // 1024:,} KiB"
