"""Chunks of flattened tensors through torch's distributed checkpoint (DCP): strict planners, a hashing writer, a verifying reader.

Stock DCP drops duplicates and ignores gaps and left-over tensors silently, checksums nothing, and unpickles what it is given.
"""

import io
import struct
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import BinaryIO

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from ...conf import files
from .files import HashedFile, digest, flush_folder, forget_cache
from .manifest import CheckpointError, DamagedError, read_manifest, unpickle_metadata, verify, write_manifest

METADATA = ".metadata"


class ChunkSavePlanner(dcp.DefaultSavePlanner):
    """Plans the saving of {name: Chunk}. CheckpointError unless each element of each tensor has exactly one owner."""

    def __init__(self):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def create_local_plan(self):
        self.plan = SavePlan([write_item(name, chunk) for name, chunk in self.state_dict.items()])
        return self.plan

    def create_global_plan(self, all_plans):
        owned = defaultdict(list)
        for plan in all_plans:
            for item in plan.items:
                data = item.tensor_data
                owned[item.index.fqn].append((data.chunk.offsets[0], data.chunk.sizes[0], data.size[0], data.properties.dtype))
        for name, pieces in owned.items():
            if len({piece[2:] for piece in pieces}) > 1:
                raise CheckpointError(f"ranks disagree about the size or dtype of {name!r}: {sorted({str(p[2:]) for p in pieces})}")
            _check_cover(name, pieces[0][2], [(low, low + n) for low, n, *_ in pieces], once=True)
        return super().create_global_plan(all_plans)

    def lookup_object(self, index):
        return self.state_dict[index.fqn].data


class ChunkLoadPlanner(dcp.DefaultLoadPlanner):
    """Plans the filling of {name: Chunk} in place.

    CheckpointError for a tensor that is missing, of another size or kind, or (whole or in part) wanted by no rank. Where
    `optional(name)`, a missing tensor leaves its chunk as it was, and an unwanted one stays behind.
    """

    def __init__(self, optional: Callable[[str], bool]):
        super().__init__()
        self._optional = optional

    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False):
        self.state_dict, self.metadata = state_dict, metadata

    def create_local_plan(self):
        items = []
        for name, chunk in self.state_dict.items():
            saved = self.metadata.state_dict_metadata.get(name)
            if saved is None and self._optional(name):
                continue
            if not isinstance(saved, TensorStorageMetadata):
                raise CheckpointError(f"the checkpoint does not hold {name!r}: was it written by another model or optimizer?")
            if saved.size != torch.Size([chunk.numel]) or saved.properties.dtype.is_floating_point != chunk.data.is_floating_point():
                there, here = f"{saved.size.numel()} of {saved.properties.dtype}", f"{chunk.numel} of {chunk.data.dtype}"
                raise CheckpointError(f"{name!r}: the checkpoint holds {there}, this run needs {here}")
            wanted = ChunkStorageMetadata(torch.Size([chunk.offset]), chunk.data.shape)
            found = create_read_items_for_chunk_list(name, saved, [wanted])
            _check_cover(name, chunk.data.numel(), [(i.dest_offsets[0], i.dest_offsets[0] + i.lengths[0]) for i in found], once=True)
            items += found
        return LoadPlan(items)

    def create_global_plan(self, global_plan):
        read = defaultdict(list)
        for item in (item for plan in global_plan for item in plan.items):
            low = item.dest_index.offset[0] + item.dest_offsets[0]
            read[item.dest_index.fqn].append((low, low + item.lengths[0]))
        for name, saved in self.metadata.state_dict_metadata.items():
            if not self._optional(name):
                if name not in read:
                    raise CheckpointError(f"the checkpoint holds {name!r}, which this run has no place for: is it another model's?")
                _check_cover(name, saved.size[0], read[name], once=False)
        return global_plan

    def lookup_tensor(self, index):
        return self.state_dict[index.fqn].data

    def load_bytes(self, read_item, value):
        raise CheckpointError(f"checkpoint item {read_item.dest_index.fqn!r} is a pickle: do not load it")


@dataclass(frozen=True)
class _HashedResult(WriteResult):
    sha256: str  # of the file that holds this item, as it was written
    num_bytes: int


class _HashingFiles(FileSystem):
    """Where DCP gets its streams from. `written`: of every file, its name: (SHA-256, bytes), as they went to the system."""

    def __init__(self):
        self.written: dict[str, tuple[str, int]] = {}

    @contextmanager
    def create_stream(self, path, mode):
        assert mode == "wb", f"{path}: only written here"
        with HashedFile(path) as file:
            yield file
        self.written[Path(path).name] = file.sha256, file.num_bytes


class HashedWriter(dcp.FileSystemWriter):
    """Each rank hashes what it writes, flushes it and reads it back; the coordinator writes the manifest last, then calls `commit`.

    DamagedError where the disk gives back something else.
    """

    def __init__(self, path: Path, extra: dict, *, prepare: Callable[[], None], commit: Callable[[], None]):
        super().__init__(path, overwrite=False, sync_files=True)
        self._extra, self._prepare, self._commit = extra, prepare, commit
        self.fs = _HashingFiles()

    def storage_meta(self):
        return StorageMeta(save_id=self.save_id)  # DCP's own would hold the absolute path

    def prepare_local_plan(self, plan):
        return plan  # DCP's own looks into a folder that the coordinator has not made yet

    def prepare_global_plan(self, plans):
        self._prepare()
        return super().prepare_global_plan(plans)

    def write_data(self, plan, planner):
        written = super().write_data(plan, planner)
        results = written.wait()
        for file in {r.storage_data.relative_path for r in results}:
            self._read_back(file)
        hashed: torch.futures.Future = torch.futures.Future()
        hashed.set_result([_hashed(r, *self.fs.written[r.storage_data.relative_path]) for r in results])
        return hashed

    def finish(self, metadata, results):
        super().finish(metadata, results)
        folder = Path(self.path)
        self.fs.written[METADATA] = self.fs.written.pop(METADATA + ".tmp")  # DCP has renamed it
        self._read_back(METADATA)
        files = {r.storage_data.relative_path: (r.sha256, r.num_bytes) for rank in results for r in rank}
        files[METADATA] = self.fs.written[METADATA]
        hashes, sizes = ({file: wrote[i] for file, wrote in files.items()} for i in (0, 1))
        write_manifest(folder, hashes, self._extra, sizes)
        flush_folder(folder)
        self._commit()

    def _read_back(self, file: str) -> None:
        path = Path(self.path, file)
        forget_cache(path)
        if digest(path) != self.fs.written[file][0]:
            raise DamagedError(path.parent, file, "reads back other than it was written: the disk, or what is before it, is failing")


class VerifiedReader(dcp.FileSystemReader):
    """Verifies `.metadata` before unpickling it (restricted), and each data file once, before any is read from.

    Raises DamagedError here and in `prepare_local_plan`; so with DCP no rank has copied anything when another refuses.
    """

    def __init__(self, path: Path):
        super().__init__(path)
        self.manifest = read_manifest(Path(path))
        verify(Path(path), METADATA, self.manifest)
        self.metadata = unpickle_metadata(files.read(Path(path, METADATA)))
        _check_placed(self.metadata)
        self._verified: set[str] = set()

    def read_metadata(self, *args, **kwargs):
        return self.metadata

    def prepare_local_plan(self, plan):
        for file in sorted({self.storage_data[item.storage_index].relative_path for item in plan.items} - self._verified):
            verify(Path(self.path), file, self.manifest)
            self._verified.add(file)
        return plan

    def read_part(self, index: MetadataIndex, start: int, out: Tensor) -> None:
        """Fill `out`, contiguous and of the saved dtype, with the elements from `start` on of one saved piece, in a file that was verified.

        What torch saves is a zip archive, in which the elements are stored as they are, under `.../data/0`.
        """
        place = self.storage_data[index]
        with files.reading(Path(self.path, place.relative_path)) as file:
            try:
                header = place.offset + _stored_at(_Window(file, place.offset, place.length))
                file.seek(header + 26)
                name_length, extra_length = struct.unpack("<HH", file.read(4))
                file.seek(header + 30 + name_length + extra_length + start * out.itemsize)
                count = file.readinto(out.view(torch.uint8).numpy())
            except (OSError, ValueError, LookupError, OverflowError, struct.error, zipfile.BadZipFile, NotImplementedError) as error:
                what = f"{index.fqn!r} cannot be read ({error}): it is not what torch saves"
                raise CheckpointError(f"{place.relative_path}: {what}") from None
        if count != out.nbytes:
            raise CheckpointError(f"{place.relative_path}: has {count:,} bytes of {index.fqn!r} where {out.nbytes:,} should be")


def _stored_at(file: "_Window") -> int:
    """Where the elements' entry begins in an archive of torch's. Raises ValueError where there is none, or it is packed."""
    with zipfile.ZipFile(file) as archive:  # reads its directory only
        entry = next((e for e in archive.infolist() if e.filename.endswith("/data/0")), None)
    if entry is None or entry.compress_type != zipfile.ZIP_STORED:
        raise ValueError("it has no elements, or packed ones")
    return entry.header_offset


class _Window(io.RawIOBase):
    """`length` bytes of a file from `offset` on, as a file of its own: an archive of any size says where its directory is."""

    def __init__(self, file: BinaryIO, offset: int, length: int):
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def seek(self, to: int, whence: int = io.SEEK_SET) -> int:
        at = to + (0, self._at, self._length)[whence]
        if at < 0:
            raise OSError(f"seek to {at}, before the first byte")
        self._at = at
        return at

    def readinto(self, buffer) -> int:
        self._file.seek(self._offset + self._at)
        count = self._file.readinto(memoryview(buffer)[: max(0, self._length - self._at)])
        self._at += count
        return count


def write_item(name, chunk) -> WriteItem:
    if chunk.data.ndim != 1 or not chunk.data.is_contiguous():
        raise CheckpointError(f"chunk {name!r} must be 1-D and contiguous, is {tuple(chunk.data.shape)} with strides {chunk.data.stride()}")
    place = ChunkStorageMetadata(torch.Size([chunk.offset]), chunk.data.shape)
    data = TensorWriteData(place, TensorProperties(dtype=chunk.data.dtype), torch.Size([chunk.numel]))
    return WriteItem(MetadataIndex(name, (chunk.offset,)), WriteItemType.SHARD, tensor_data=data)


def _hashed(result: WriteResult, sha256: str, num_bytes: int) -> _HashedResult:
    return _HashedResult(**{f.name: getattr(result, f.name) for f in fields(WriteResult)}, sha256=sha256, num_bytes=num_bytes)


def _check_placed(metadata: Metadata) -> None:
    """CheckpointError unless what `.metadata` names are tensors, each piece of them with a place in a file."""
    try:
        for name, tensor in metadata.state_dict_metadata.items():
            if isinstance(tensor, TensorStorageMetadata) and not isinstance(tensor.properties.dtype, torch.dtype):
                raise ValueError(f"{name!r} has no dtype")
            for chunk in getattr(tensor, "chunks", ()):
                metadata.storage_data[MetadataIndex(name, chunk.offsets)]
    except Exception as error:  # classes are right, and what they hold is anything
        what = f"{type(error).__name__}: {str(error)[:200]}"
        raise CheckpointError(f"{METADATA} is not what shoestring writes ({what}): do not load it") from None


def _check_cover(name: str, numel: int, ranges: Iterable[tuple[int, int]], *, once: bool) -> None:
    """CheckpointError unless the ranges cover [0, numel), and, with `once`, do not overlap."""
    end = 0
    for low, high in sorted([*ranges, (numel, numel)]):
        if low > end:
            raise CheckpointError(f"{name!r}: nobody has elements [{end}, {low}) of {numel}")
        if high > numel or (once and low < end):
            raise CheckpointError(f"{name!r}: elements [{low}, {high}) of {numel} overlap others, or the end")
        end = max(end, high)
