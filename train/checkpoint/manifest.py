"""What makes a folder a checkpoint: `manifest.json`, with the SHA-256 of every file and the state that is not tensors.

It is the last file written. The hashes protect against damage; against somebody who can write the folder only the restricted
unpickler does: `.metadata` is a pickle, and torch's own reader would run whatever program is planted in it.
"""

import contextlib
import errno
import hashlib
import io
import json
import pickle
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType
from typing import Any

from ...conf import files
from .files import digest, forget_cache, write_durably

MANIFEST = "manifest.json"
FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or must not be loaded; the message says which file and what to do."""


class DamagedError(CheckpointError):
    """A file of a checkpoint is missing, or is not what was written. Not: one that is whole, and another model's.

    `who` found it: such as "rank 3: ". A program that can go on from another checkpoint may catch this, and nothing wider.
    """

    def __init__(self, checkpoint: Path, file: str, what: str, *, who: str = "", advice: str = ""):
        self.checkpoint, self.file, self.what, self.who, self.advice = Path(checkpoint), file, what, who, advice
        super().__init__(f"{who}{self.checkpoint / file} {what}{advice}")

    def __reduce__(self):
        return _damaged, (self.checkpoint, self.file, self.what, self.who, self.advice)

    def said(self, *, who: str = "", advice: str = "") -> "DamagedError":
        """The same, with who found it, or what to do."""
        return DamagedError(self.checkpoint, self.file, self.what, who=who or self.who, advice=advice or self.advice)


def _damaged(checkpoint: Path, file: str, what: str, who: str, advice: str) -> DamagedError:
    return DamagedError(checkpoint, file, what, who=who, advice=advice)


@dataclass(frozen=True, kw_only=True)
class Manifest:
    sha256: dict[str, str]  # file name -> hex digest
    num_bytes: dict[str, int]  # likewise; empty in older checkpoints
    extra: dict[str, Any]


def write_manifest(folder: Path, sha256: dict[str, str], extra: dict[str, Any], num_bytes: dict[str, int] | None = None) -> None:
    """Raises DamagedError where what is read back is not what was written."""
    body = {"format": FORMAT, "sha256": sha256, "bytes": num_bytes or {}, "extra": extra}
    body = json.loads(json.dumps(body))  # as it will be read: keys are strings
    write_durably(folder / MANIFEST, json.dumps(body | {"seal": _seal(body)}, indent=1))
    forget_cache(folder / MANIFEST)
    read_manifest(folder)


def read_manifest(folder: Path) -> Manifest:
    """The manifest, itself undamaged. Raises DamagedError where there is none, or not the one that was written, and CheckpointError where
    it cannot be read or is another version's."""
    try:
        body = json.loads(files.read(folder / MANIFEST))
        seal, version = body.pop("seal"), body["format"]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DamagedError(folder, MANIFEST, f"is damaged ({str(error)[:200]})") from None
    except OSError as error:
        raise _unreadable(folder, MANIFEST, error) from None
    if seal != _seal(body):
        raise DamagedError(folder, MANIFEST, "is damaged (its own checksum does not match)")
    if version != FORMAT:
        raise CheckpointError(f"{folder / MANIFEST} has format {str(version)[:40]}, this version of shoestring reads {FORMAT}")
    hashes, sizes, extra = body.get("sha256"), body.get("bytes", {}), body.get("extra")
    if not (_maps(hashes, str) and _maps(sizes, int) and isinstance(extra, dict)):
        raise DamagedError(folder, MANIFEST, "is no list of files with their hashes and sizes")
    return Manifest(sha256=hashes, num_bytes=sizes, extra=extra)


def _maps(value: Any, kind: type) -> bool:
    return isinstance(value, dict) and all(type(item) is kind for item in value.values())


@contextlib.contextmanager
def understood(folder: Path, passing: tuple[type[Exception], ...] = ()) -> Iterator[None]:
    """While what a manifest says beside its hashes is taken: it can be whole, and of another program. Raises CheckpointError, then;
    `passing`: errors that say something else."""
    try:
        yield
    except passing:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, AssertionError, OverflowError) as error:
        what = f"{type(error).__name__}: {str(error)[:200]}"
        raise CheckpointError(f"{folder / MANIFEST} says of its run what no run of ours does ({what}): do not load it") from error


def verify(folder: Path, file: str, manifest: Manifest, *, hashed: bool = True) -> None:
    """Raises DamagedError unless `file` is in the folder, bit for bit as the manifest says; or, not `hashed`, of the right size."""
    wanted = manifest.sha256.get(file)
    if Path(file).name != file or wanted is None:
        raise CheckpointError(f"{folder}: .metadata names a file {file!r} that {MANIFEST} does not: do not load it")
    try:
        files.refuse_special(folder / file)
        size = (folder / file).stat().st_size
        if size != (written := manifest.num_bytes.get(file, size)):
            raise DamagedError(folder, file, f"is damaged (it has {size:,} bytes, {written:,} were written)")
        if hashed and digest(folder / file) != wanted:
            raise DamagedError(folder, file, f"is damaged (its SHA-256 is not the one in {MANIFEST})")
    except OSError as error:
        raise _unreadable(folder, file, error) from None


def verify_all(folder: Path, files: Iterable[str] | None = None, *, hashed: bool = True) -> Manifest:
    """Every file (or those of `files` that the manifest names). Raises as `read_manifest` and `verify` do."""
    manifest = read_manifest(folder)
    for file in sorted(set(manifest.sha256).intersection(manifest.sha256 if files is None else files)):
        verify(folder, file, manifest, hashed=hashed)
    return manifest


def _unreadable(folder: Path, file: str, error: OSError) -> CheckpointError:
    """A file that is gone, or that the disk cannot give, is damage. One that may be there for somebody else, or later, is not."""
    if isinstance(error, files.UnsafeFile):
        return CheckpointError(f"{error}: a checkpoint is read from files of its own only")
    if isinstance(error, FileNotFoundError):
        return DamagedError(folder, file, "is missing: it was removed, or a copy was cut short")
    if error.errno == errno.EIO:
        return DamagedError(folder, file, f"cannot be read ({error.strerror})")
    return CheckpointError(f"{folder / file} cannot be read ({error.strerror}): are its file system and its permissions as they were?")


def unpickle_metadata(data: bytes) -> Any:
    """The DCP `Metadata` in a `.metadata`: one-dimensional tensors in pieces. Raises CheckpointError on any other class or function, and
    where it would change those."""
    reader = _MetadataUnpickler(io.BytesIO(data))
    try:
        metadata = reader.load()
        _check_pieces(metadata)
        return metadata
    except CheckpointError:
        raise
    except (Exception, MemoryError) as error:
        raise CheckpointError(f".metadata is not what shoestring writes ({type(error).__name__}: {str(error)[:200]})") from None
    finally:
        reader.undo()


def _check_pieces(metadata: Any) -> None:
    """Classes can be right, and what they hold anything. Raises whatever a wrong one comes to."""
    for name, tensor in metadata.state_dict_metadata.items():
        numel = tensor.size[0]
        ends = [chunk.offsets[0] + chunk.sizes[0] for chunk in tensor.chunks if len(chunk.offsets) == len(chunk.sizes) == 1]
        if type(name) is not str or len(tensor.size) != 1 or len(ends) != len(tensor.chunks) or max(ends, default=0) > numel:
            raise ValueError(f"{str(name)[:80]!r} is no tensor of one dimension")
    for place in (metadata.storage_data or {}).values():
        if type(place.relative_path) is not str or min(place.offset, place.length) < 0 or place.transform_descriptors:
            raise ValueError(f"{str(place)[:80]} is no place in a file")


class _MetadataUnpickler(pickle.Unpickler):
    """Builds what the `.metadata` of our planner and writer holds, and nothing else."""

    def __init__(self, file: io.BytesIO):
        super().__init__(file)
        self._were: dict[int, tuple[Any, dict[str, Any]]] = {}  # classes and functions that it was given, as they were

    def find_class(self, module, name):
        if name not in _ALLOWED.get(module, ()):
            raise CheckpointError(f".metadata wants {module}.{name}, which no checkpoint of shoestring holds: do not load it")
        found = super().find_class(module, name)
        if id(found) not in self._were:
            self._were[id(found)] = found, _attributes(found)
        return found

    def undo(self) -> None:
        """A pickle can set attributes of what it names (BUILD), for good and for all: they are put back, and CheckpointError raised."""
        same = lambda now, were: now.keys() == were.keys() and all(now[name] is were[name] for name in now)
        changed = [(found, were) for found, were in self._were.values() if not same(_attributes(found), were)]
        for found, were in changed:
            for name in _attributes(found).keys() - were.keys():
                delattr(found, name)
            for name, value in were.items():
                if _attributes(found).get(name) is not value:
                    setattr(found, name, value)
        if changed:
            names = ", ".join(str(getattr(found, "__name__", found)) for found, _ in changed)
            raise CheckpointError(f".metadata would change {names}, which no checkpoint of shoestring does: do not load it")


def _attributes(found: Any) -> dict[str, Any]:
    own = dict(getattr(found, "__dict__", {}))
    return own | {name: getattr(found, name) for name in ("__defaults__", "__kwdefaults__", "__code__") if isinstance(found, FunctionType)}


_ALLOWED = {
    "torch": ["Size", "float64", "float32", "bfloat16", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"],
    "torch.serialization": ["_get_layout"],
    "torch.distributed.checkpoint.filesystem": ["_StorageInfo"],
    "torch.distributed.checkpoint.metadata": [
        *("Metadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING"),
        *("TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata"),
    ],
}


def _seal(body: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
