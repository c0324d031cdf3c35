"""Checkpoints: saved by all ranks, now or in a thread; verified, resharded and loaded by any layout; read whole for export.

A folder of checkpoints holds:
    latest                      name of the newest, moved by os.replace after everything in it is on disk
    step_00000100/              complete: it got this name after its manifest was flushed
        manifest.json  .metadata  __<rank>_0.distcp
    .step_00000200.partial/     a save that is under way, or was torn
"""

import json
import logging
import os
import re
import shutil
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from ...parallel.optimizer.zero import Chunk
from .manifest import MANIFEST, CheckpointError, flush_folder, read_manifest, write_durably
from .storage import ChunkLoadPlanner, ChunkSavePlanner, HashedWriter, VerifiedReader

log = logging.getLogger(__name__)

LATEST = "latest"
PARTIAL, RETIRED = ".partial", ".retired"
NAME = re.compile(r"step_(\d{8,})")


class Checkpointer:
    """Saves and loads the chunks of all ranks of `group` under `folder`. Every method is collective over the group.

    `group` is a gloo group that nothing else uses, since asynchronous saves talk over it from a thread (None: the default group).
    The newest `keep_last` checkpoints stay; older ones go once a newer one is complete.
    """

    def __init__(self, folder: Path, *, keep_last: int, async_save: bool, group: dist.ProcessGroup | None = None):
        self.folder, self.keep_last, self.async_save, self.group = Path(folder), keep_last, async_save, group
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._in_flight: Future | None = None

    def save(self, step: int, chunks: dict[str, Chunk], extra: dict[str, Any]) -> None:
        """Write the checkpoint of `step`, or snapshot the chunks now and write them in a thread (one at a time: waits for the last).

        `extra` is JSON, taken from the group's first rank. Raises CheckpointError on every rank when any fails, here or, for an
        asynchronous save, in the next `wait`, `save`, `latest` or `load`.
        """
        self.wait()
        extra = json.loads(json.dumps(extra))
        if not self.async_save:
            self._write(step, chunks, extra)
            return
        snapshot = {name: Chunk(c.numel, c.offset, c.data.detach().to("cpu", copy=True)) for name, c in chunks.items()}
        self._in_flight = self._thread.submit(self._write, step, snapshot, extra)

    def wait(self) -> None:
        """Until the asynchronous save, if any, is complete. Raises what it raised."""
        in_flight, self._in_flight = self._in_flight, None
        if in_flight:
            in_flight.result()

    def latest(self) -> Path | None:
        """The newest complete checkpoint; the first rank's answer, on all ranks."""
        self.wait()
        answer = [None]
        if self._rank() == 0:
            answer = [find_latest(self.folder)]
        if dist.is_initialized():
            dist.broadcast_object_list(answer, group=self.group, group_src=0)
        return answer[0]

    def load(self, path: Path, chunks: dict[str, Chunk], optional: Callable[[str], bool] = lambda name: False) -> dict[str, Any]:
        """Fill the chunks in place, converting between floating-point dtypes; returns `extra`.

        Every file is verified on all ranks before anything is copied on any. Raises CheckpointError on all ranks when one finds a
        damaged file, or a tensor that is missing, of another size, or (in part) wanted by nobody: unless `optional(name)`, for which
        a missing tensor leaves the chunk as it was.
        """
        self.wait()
        reader = self._agree(lambda: VerifiedReader(Path(path)))
        planner = ChunkLoadPlanner(optional)
        try:
            dcp.load(dict(chunks), storage_reader=reader, planner=planner, process_group=self.group, no_dist=not dist.is_initialized())
        except CheckpointException as error:
            raise CheckpointError(f"{path} was not loaded: {_first_failure(error)}") from error
        return reader.manifest.extra

    def _write(self, step: int, chunks: dict[str, Chunk], extra: dict[str, Any]) -> None:
        name = f"step_{step:08d}"
        unfinished = self.folder / f".{name}{PARTIAL}"
        writer = HashedWriter(
            unfinished,
            extra,
            prepare=partial(_start_afresh, unfinished),
            commit=partial(commit, unfinished, self.folder / name, self.keep_last),
        )
        try:
            dcp.save(chunks, storage_writer=writer, planner=ChunkSavePlanner(), process_group=self.group, no_dist=not dist.is_initialized())
        except CheckpointException as error:
            raise CheckpointError(f"the checkpoint of step {step} was not written to {self.folder}: {_first_failure(error)}") from error

    def _agree(self, attempt: Callable[[], Any]) -> Any:
        """attempt() on every rank; when one raises CheckpointError, all do (the others would wait for it in the next collective)."""
        result, failure = None, None
        try:
            result = attempt()
        except CheckpointError as error:
            failure = str(error)
        failures = [failure]
        if dist.is_initialized():
            failures = [None] * dist.get_world_size(self.group)
            dist.all_gather_object(failures, failure, group=self.group)
        for rank, message in enumerate(failures):
            if message is not None:
                raise CheckpointError(f"rank {rank}: {message}")
        return result

    def _rank(self) -> int:
        return dist.get_rank(self.group) if dist.is_initialized() else 0


class Archive:
    """One checkpoint, read tensor by tensor on one process, without torch.distributed. Each file is verified once.

    Raises CheckpointError for a damaged file, here or when it is first read from.
    """

    def __init__(self, path: Path):
        self._reader = VerifiedReader(Path(path))
        self._saved = self._reader.metadata.state_dict_metadata
        self._reader.set_up_storage_reader(self._reader.metadata, True)

    @property
    def extra(self) -> dict[str, Any]:
        return self._reader.manifest.extra

    def names(self) -> list[str]:
        return sorted(self._saved)

    def numel(self, name: str) -> int:
        return self._saved[name].size.numel()

    def read(self, name: str, start: int = 0, stop: int | None = None) -> Tensor:
        """Elements `start` to `stop` (None: the last) of the tensor `name`, flattened, in the dtype it was saved in.

        Only these are read: memory is theirs, however large the pieces are that ranks have written.
        """
        if name not in self._saved:
            raise CheckpointError(f"{self._reader.checkpoint_id} does not hold {name!r}")
        numel, dtype = self.numel(name), self._saved[name].properties.dtype
        stop = numel if stop is None else stop
        assert 0 <= start <= stop <= numel, (name, start, stop, numel)
        wanted = torch.empty(stop - start, dtype=dtype)
        planner = ChunkLoadPlanner(lambda name: False)
        planner.set_up_planner({name: Chunk(numel, start, wanted)}, self._reader.metadata)
        for item in self._reader.prepare_local_plan(planner.create_local_plan()).items:
            low, count = item.dest_offsets[0], item.lengths[0]
            self._reader.read_part(item.storage_index, item.storage_offsets[0], wanted[low : low + count])
        return wanted


def names(path: Path) -> list[str]:
    """Names of the tensors in a checkpoint."""
    return Archive(path).names()


def read_full(path: Path, name: str) -> Tensor:
    """One whole tensor, flat. For many, open one `Archive`: it verifies each file once."""
    return Archive(path).read(name)


def read_extra(path: Path) -> dict[str, Any]:
    """The `extra` that a checkpoint was saved with. Raises CheckpointError if it is damaged or there is none."""
    return read_manifest(Path(path)).extra


def find_latest(folder: Path) -> Path | None:
    """The checkpoint that `latest` names, or, where that is not complete, the complete one of the highest step."""
    complete = {path.name: path for _, path in complete_checkpoints(folder)}
    pointer = folder / LATEST
    pointed = pointer.read_text(errors="replace").strip() if pointer.is_file() else None
    if pointed in complete:
        return complete[pointed]
    newest = next(reversed(complete.values()), None)
    if newest or pointed is not None:
        said = "is missing" if pointed is None else f"names {pointed!r}, which is not a complete checkpoint"
        log.warning("%s %s: taking %s", pointer, said, newest.name if newest else "none")
    return newest


def complete_checkpoints(folder: Path) -> list[tuple[int, Path]]:
    """(step, path), lowest step first."""
    found = [(NAME.fullmatch(p.name), p) for p in folder.iterdir()] if folder.is_dir() else []
    return sorted((int(match[1]), p) for match, p in found if match and (p / MANIFEST).is_file())


def commit(unfinished: Path, final: Path, keep_last: int) -> None:
    """Give a flushed checkpoint its name, point `latest` at it, then remove what is too old. For one rank."""
    folder = final.parent
    if final.exists():  # a run that went back to an older checkpoint has come to this step again
        os.rename(final, folder / f".{final.name}{RETIRED}")
    os.rename(unfinished, final)
    flush_folder(folder)
    write_durably(folder / f".{LATEST}", final.name + "\n")
    os.replace(folder / f".{LATEST}", folder / LATEST)
    flush_folder(folder)
    for retired in folder.glob(f".*{RETIRED}"):
        _remove(retired)
    step = int(NAME.fullmatch(final.name)[1])
    # Higher steps belong to a branch that this run has left: they are not its history, and not for it to remove.
    for _, old in [found for found in complete_checkpoints(folder) if found[0] <= step][:-keep_last]:
        _remove(old)


def _start_afresh(unfinished: Path) -> None:
    """An empty folder to write into; leftovers of torn saves go."""
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    for torn in unfinished.parent.glob(f".*{PARTIAL}"):
        shutil.rmtree(torn)
    unfinished.mkdir()


def _remove(checkpoint: Path) -> None:
    """The manifest first: a removal that is cut short leaves no checkpoint. Failing to remove must not fail the run."""
    try:
        (checkpoint / MANIFEST).unlink(missing_ok=True)
        shutil.rmtree(checkpoint)
    except OSError as error:
        log.warning("%s could not be removed (%s): remove it yourself", checkpoint, error)


def _first_failure(error: CheckpointException) -> str:
    rank, (cause, _) = min(error.failures.items(), key=lambda item: item[0])
    return f"rank {rank}: {cause if isinstance(cause, CheckpointError) else f'{type(cause).__name__}: {cause}'}"
