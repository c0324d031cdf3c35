"""Checkpoints: saved by all ranks, now or in a thread; verified, resharded and loaded by any layout; read whole for export.

What a folder of them holds is in `folder.py`; what makes one of its folders a checkpoint, in `manifest.py`.
"""

import json
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
from . import folder as folders
from .manifest import CheckpointError, DamagedError, read_manifest, verify_all
from .storage import ChunkLoadPlanner, ChunkSavePlanner, HashedWriter, VerifiedReader

# Beside its elements, of each chunk: its headers in the file, and its place in `.metadata`. Beside all of them: room for logs and records.
BYTES_PER_CHUNK, BYTES_TO_SPARE = 4096, 16 << 20


class SaveError(CheckpointError):
    """Nothing was saved, on all ranks alike; older checkpoints are as they were, and the next save may succeed."""


class NoRoomError(SaveError):
    """It was not even begun."""


class Checkpointer:
    """Saves and loads the chunks of all ranks of `group` under `folder`. Every method is collective over the group.

    `group` is a gloo group that nothing else uses, since asynchronous saves talk over it from a thread (None: the default group).
    The newest `keep_last` checkpoints stay; older ones go once a newer one is complete, and was read back from the disk.
    """

    def __init__(self, folder: Path, *, keep_last: int, async_save: bool, group: dist.ProcessGroup | None = None):
        self.folder, self.keep_last, self.async_save, self.group = Path(folder), keep_last, async_save, group
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._in_flight: Future | None = None

    def save(self, step: int, chunks: dict[str, Chunk], extra: dict[str, Any]) -> None:
        """Write the checkpoint of `step`, or snapshot the chunks now and write them in a thread (one at a time: waits for the last).

        `extra` is JSON, taken from the group's first rank. Raises SaveError on every rank where a file system of any has no room for it
        or fails, and CheckpointError where the chunks are wrong: here or, for an asynchronous save, in the next `wait`, `save`, `latest`
        or `load`.
        """
        self.wait()
        extra = json.loads(json.dumps(extra))
        if not self.async_save:
            self._write(step, chunks, extra)
            return
        snapshot = {name: Chunk(c.numel, c.offset, c.data.detach().to("cpu", copy=True)) for name, c in chunks.items()}
        self._in_flight = self._thread.submit(self._write, step, snapshot, extra)

    @property
    def is_first(self) -> bool:
        """Whether this is the rank that decides, and tells the others."""
        return self._rank() == 0

    def under_way(self) -> bool:
        """Whether this rank's part of an asynchronous save is. Not collective; other ranks may be sooner or later."""
        return self._in_flight is not None and not self._in_flight.done()

    def wait(self) -> None:
        """Until the asynchronous save, if any, is complete. Raises what it raised."""
        in_flight, self._in_flight = self._in_flight, None
        if in_flight:
            in_flight.result()

    def latest(self) -> Path | None:
        """The checkpoint to go on from; the first rank's answer, on all ranks."""
        self.wait()
        return self._from_first(partial(folders.find_latest, self.folder))

    def load(self, path: Path, chunks: dict[str, Chunk], optional: Callable[[str], bool] = lambda name: False) -> dict[str, Any]:
        """Fill the chunks in place, converting between floating-point dtypes; returns `extra`.

        Every file is verified on all ranks before anything is copied on any. Raises on all ranks DamagedError where any has found a
        damaged file; CheckpointError for a tensor that is missing, of another size, or (in part) wanted by nobody: unless
        `optional(name)`, for which a missing tensor leaves the chunk as it was.
        """
        self.wait()
        reader = self._agree(partial(VerifiedReader, Path(path)))
        planner = ChunkLoadPlanner(optional)
        try:
            dcp.load(dict(chunks), storage_reader=reader, planner=planner, process_group=self.group, no_dist=not dist.is_initialized())
        except CheckpointException as error:
            raise _chosen(_causes(error), f"{path} was not loaded: ") from error
        return reader.manifest.extra

    def set_aside(self, damage: DamagedError) -> str:
        """Quarantine a checkpoint in which some rank has found damage (all pass the same); a sentence that tells of it.

        Raises `damage`, with advice, for a checkpoint of another folder than this one; and CheckpointError where the first rank reads the
        file as it was written: then it is a rank, its host or its mount that errs.
        """
        return self._from_first(partial(self._set_aside, damage))

    def _set_aside(self, damage: DamagedError) -> str:
        if damage.checkpoint.parent.resolve() != self.folder.resolve():
            raise _advised(damage)
        try:
            verify_all(damage.checkpoint, [damage.file])
        except DamagedError:
            try:
                aside = folders.quarantine(damage)
            except OSError as error:
                raise CheckpointError(f"{damage}; and it could not be set aside ({error}): rename or remove it yourself") from None
            left = next(iter(folders.candidates(self.folder)), None)
            return f"{damage}. It is now {aside}, which nothing here uses or removes; next is {left.name if left else 'none'}"
        raise CheckpointError(f"{damage}; but rank 0 reads it as it was written: look at the host and the mount of the rank that did not")

    def _write(self, step: int, chunks: dict[str, Chunk], extra: dict[str, Any]) -> None:
        final = self.folder / folders.name_of(step)
        unfinished = final.with_name(f".{final.name}{folders.PARTIAL}")
        writer = HashedWriter(
            unfinished,
            extra,
            prepare=partial(folders.prepare, unfinished),
            commit=partial(folders.commit, unfinished, final, self.keep_last),
        )
        try:
            self._check_room(chunks)
            dcp.save(chunks, storage_writer=writer, planner=ChunkSavePlanner(), process_group=self.group, no_dist=not dist.is_initialized())
        except CheckpointException as error:
            self._from_first(partial(folders.abandon, unfinished))  # no rank writes any more, and none goes on before
            causes = _causes(error)
            kind = SaveError if all(isinstance(cause, (OSError, DamagedError)) for cause in causes.values()) else CheckpointError
            raise kind(f"the checkpoint of step {step} was not written to {self.folder}: {_first(causes)}") from error

    def _check_room(self, chunks: dict[str, Chunk]) -> None:
        """NoRoomError unless each rank's host has room for what all ranks write: they write to one file system."""
        free = self._agree(lambda: shutil.disk_usage(_there(self.folder)).free, SaveError)
        said = self._everyones((sum(c.data.nbytes + BYTES_PER_CHUNK for c in chunks.values()), free))
        need, (free, rank) = sum(n for n, _ in said) + BYTES_TO_SPARE, min((free, rank) for rank, (_, free) in enumerate(said))
        if free < need:
            raise NoRoomError(f"needs {need / 1e9:.3f} GB, has {free / 1e9:.3f} GB at {self.folder} (rank {rank}): make room there")

    def _agree(self, attempt: Callable[[], Any], kind: type[CheckpointError] = CheckpointError) -> Any:
        """attempt() on every rank; where it raises CheckpointError or OSError on one, all raise (they would wait for it later)."""
        result, failure = None, None
        try:
            result = attempt()
        except (CheckpointError, OSError) as error:
            failure = error
        if causes := {rank: error for rank, error in enumerate(self._everyones(failure)) if error is not None}:
            raise _chosen(causes, "", kind)
        return result

    def _everyones(self, value: Any) -> list[Any]:
        if not dist.is_initialized():
            return [value]
        values = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(values, value, group=self.group)
        return values

    def _from_first(self, attempt: Callable[[], Any]) -> Any:
        """What attempt() is, or raises, on the first rank; the others do not try."""
        answer: list[Any] = [None, None]
        if self._rank() == 0:
            try:
                answer = [attempt(), None]
            except CheckpointError as error:
                answer = [None, error]
        if dist.is_initialized():
            dist.broadcast_object_list(answer, group=self.group, group_src=0)
        if answer[1] is not None:
            raise answer[1]
        return answer[0]

    def _rank(self) -> int:
        return dist.get_rank(self.group) if dist.is_initialized() else 0


def _causes(error: CheckpointException) -> dict[int, BaseException]:
    return {rank: cause for rank, (cause, _) in sorted(error.failures.items())}


def _first(causes: dict[int, BaseException]) -> str:
    rank, cause = next(iter(causes.items()))
    return f"rank {rank}: {cause if isinstance(cause, CheckpointError) else f'{type(cause).__name__}: {cause}'}"


def _chosen(causes: dict[int, BaseException], what: str, kind: type[CheckpointError] = CheckpointError) -> CheckpointError:
    """The error to raise on all ranks. It is damage only where no rank has found anything else: a checkpoint may be damaged, and another
    model's as well."""
    others = {rank: cause for rank, cause in causes.items() if not isinstance(cause, DamagedError)}
    if others:
        return kind(what + _first(others))
    rank, damage = next(iter(causes.items()))
    return damage.said(who=f"{what}rank {rank}: ")


def _there(path: Path) -> Path:
    """The path, or the nearest above it that exists."""
    return next(p for p in (path, *path.absolute().parents) if p.exists())


def _advised(damage: DamagedError) -> DamagedError:
    valid = folders.newest_valid(damage.checkpoint.parent, but=damage.checkpoint)
    return damage.said(advice=f"; nearest valid one: {valid}" if valid else "; no other checkpoint there is whole")


class Archive:
    """One checkpoint, read tensor by tensor on one process, without torch.distributed. Each file is verified once.

    Raises DamagedError for a damaged file, here or when it is first read from, with the newest checkpoint beside it that is whole.
    """

    def __init__(self, path: Path):
        self._reader = _or_advised(partial(VerifiedReader, Path(path)))
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
        for item in _or_advised(partial(self._reader.prepare_local_plan, planner.create_local_plan())).items:
            low, count = item.dest_offsets[0], item.lengths[0]
            self._reader.read_part(item.storage_index, item.storage_offsets[0], wanted[low : low + count])
        return wanted


def _or_advised(attempt: Callable[[], Any]) -> Any:
    try:
        return attempt()
    except DamagedError as damage:
        raise _advised(damage) from None


def names(path: Path) -> list[str]:
    """Names of the tensors in a checkpoint."""
    return Archive(path).names()


def read_full(path: Path, name: str) -> Tensor:
    """One whole tensor, flat. For many, open one `Archive`: it verifies each file once."""
    return Archive(path).read(name)


def read_extra(path: Path) -> dict[str, Any]:
    """The `extra` that a checkpoint was saved with. Raises DamagedError if that is damaged or missing."""
    return read_manifest(Path(path)).extra
