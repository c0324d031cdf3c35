"""Is there room for what a run writes, and may it write there? Space, inodes and a really written file in the run's folder, space in the
data's cache and in shared memory.
"""

import os
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ...conf.schema import Config
from ...train import cost
from .line import Line, fail, gigabytes, nearest_there, ok, skipped, warn

KIND = "storage"
_TO_SPARE = 16 << 20  # bytes, for logs and records
_CACHE = 2e9  # bytes: below this a corpus may not fit
_SHARED = (64 << 20, 256 << 20)  # bytes per rank, of which gloo, NCCL and data workers make use: too few, and enough
_SLOW_S = 1.0  # of one small file, written and flushed


def check(config: Config, local_ranks: int, *, shared: Path = Path("/dev/shm"), stat: Callable = os.statvfs) -> Iterator[Line]:
    """`local_ranks`: of a run on this machine. `stat`: of a path's file system."""
    run_dir, cache = Path(config.run_dir), Path(config.data.cache_dir)
    yield _room(config, stat)
    yield _cache(cache, run_dir, stat)
    yield _inodes(config, run_dir, stat)
    yield _writing("write run_dir", "run_dir", run_dir)
    yield _writing("write cache", "data.cache_dir", cache)
    yield _shared_memory(shared, local_ranks, config, stat)


def _room(config: Config, stat: Callable) -> Line:
    """A new checkpoint is written whole before the oldest goes."""
    one, kept = cost.checkpoint_bytes(config), config.checkpoint.keep_last
    there = min(_bytes_of(Path(config.run_dir) / "checkpoints"), kept * one)
    needed = one * (kept + 1) - there + _TO_SPARE
    folder = nearest_there(config.run_dir)
    free = _free(stat(folder))
    of = f"{gigabytes(free)} free at {folder}; {kept} + 1 checkpoints of {gigabytes(one)}"
    if there:
        of += f", of which {gigabytes(there)} is there"
    if free < needed:
        do = f"du -xsh {folder}/* | sort -h; or run_dir=/another/disk, or checkpoint.keep_last={max(1, kept - 1)}"
        return fail(KIND, "room for run_dir", f"{of}: {gigabytes(needed - free)} too few", do)
    return ok(KIND, "room for run_dir", of)


def _cache(cache: Path, run_dir: Path, stat: Callable) -> Line:
    folder = nearest_there(cache)
    free = _free(stat(folder))
    value = f"{gigabytes(free)} free at {folder}, for tokenised data"
    if os.stat(folder).st_dev == os.stat(nearest_there(run_dir)).st_dev:
        value += " (the same file system)"
    if free < _CACHE:
        return warn(KIND, "room for data cache", value, "data.cache_dir=/another/disk")
    return ok(KIND, "room for data cache", value)


def _inodes(config: Config, run_dir: Path, stat: Callable) -> Line:
    folder = nearest_there(run_dir)
    found = stat(folder)
    if not found.f_files:
        return ok(KIND, "inodes", f"no limit at {folder}")
    needed = (config.checkpoint.keep_last + 1) * (config.parallel.world_size + 8) + 4 * config.parallel.world_size + 100
    value = f"{found.f_favail:,} free at {folder}; a run makes up to {needed:,} files"
    if found.f_favail < needed:
        return fail(KIND, "inodes", value, f"df -i {folder}; remove small files, or run_dir=/another/disk")
    return ok(KIND, "inodes", value)


def _writing(check: str, setting: str, path: Path) -> Line:
    """A file is created, flushed, renamed and removed, in the folder or the nearest above it."""
    folder = nearest_there(path)
    where = folder if Path(folder) == path.expanduser().absolute() else f"{folder} (no {path} yet)"
    new = os.path.join(folder, f".shoestring-doctor-{socket.gethostname()}-{os.getpid()}")
    began = time.monotonic()
    try:
        _write(new)
    except OSError as error:
        do = f"ls -ld {folder}; mount | grep ' {_mount(folder)} '; or {setting}=/a/folder/of/yours"
        return fail(KIND, check, f"{where}: {error.strerror}", do)
    seconds = time.monotonic() - began
    if seconds > _SLOW_S:
        return warn(KIND, check, f"{where}: one small file took {seconds:.1f} s", f"is the disk or the mount overloaded? df -h {folder}")
    return ok(KIND, check, f"{where}: a file came and went in {1e3 * seconds:.0f} ms")


def _write(new: str) -> None:
    renamed = f"{new}.renamed"
    try:
        handle = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.write(handle, b"shoestring doctor\n")
            os.fsync(handle)
        finally:
            os.close(handle)
        os.replace(new, renamed)
    finally:
        for left in (new, renamed):
            if os.path.lexists(left):
                os.unlink(left)


def _shared_memory(shared: Path, local_ranks: int, config: Config, stat: Callable) -> Line:
    if not shared.is_dir():
        return skipped(KIND, str(shared), "not seen here")
    found = stat(shared)
    free, few, enough = _free(found), *(n * local_ranks for n in _SHARED)
    value = f"{gigabytes(free)} free of {gigabytes(found.f_blocks * found.f_frsize)}, for {local_ranks} rank(s)"
    do = f"in a container: --ipc=host or --shm-size=8g; else mount -o remount,size=8g {shared}"
    if free < few and config.launch.device != "cpu" and not config.cluster.device.startswith("CPU"):
        return fail(KIND, str(shared), f"{value}: NCCL starts with less than {gigabytes(few)} only by chance", do)
    return ok(KIND, str(shared), value) if free >= enough else warn(KIND, str(shared), value, do)


def _free(found: os.statvfs_result) -> int:
    """Bytes for whoever is not root."""
    return found.f_bavail * found.f_frsize


def _bytes_of(folder: Path) -> int:
    """On disk, as far as it can be read."""
    total = 0
    for here, _, files in os.walk(folder):
        for name in files:
            try:
                total += os.lstat(os.path.join(here, name)).st_size
            except OSError:
                continue
    return total


def _mount(path: str) -> str:
    while not os.path.ismount(path):
        path = os.path.dirname(path)
    return path
