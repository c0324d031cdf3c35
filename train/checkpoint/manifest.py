"""What makes a folder a checkpoint: `manifest.json`, with the SHA-256 of every file and the state that is not tensors.

It is the last file written. The hashes protect against damage; against somebody who can write the folder only the restricted
unpickler does: `.metadata` is a pickle, and torch's own reader would run whatever program is planted in it.
"""

import hashlib
import io
import json
import os
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
FORMAT = 1


class CheckpointError(RuntimeError):
    """A checkpoint could not be written, or must not be loaded; the message says which file and what to do."""


@dataclass(frozen=True, kw_only=True)
class Manifest:
    sha256: dict[str, str]  # file name -> hex digest
    extra: dict[str, Any]


def write_manifest(folder: Path, sha256: dict[str, str], extra: dict[str, Any]) -> None:
    body = json.loads(json.dumps({"format": FORMAT, "sha256": sha256, "extra": extra}))  # as it will be read: keys are strings
    write_durably(folder / MANIFEST, json.dumps(body | {"seal": _seal(body)}, indent=1))


def read_manifest(folder: Path) -> Manifest:
    """The manifest, itself undamaged. Raises CheckpointError where there is none, or not the one that was written."""
    try:
        body = json.loads((folder / MANIFEST).read_bytes())
        seal, version = body.pop("seal"), body["format"]
    except FileNotFoundError:
        raise CheckpointError(f"{folder} is not a complete checkpoint: it has no {MANIFEST}; resume from another one") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{folder / MANIFEST} is damaged ({error}): resume from another checkpoint") from None
    if seal != _seal(body):
        raise CheckpointError(f"{folder / MANIFEST} is damaged (its own checksum does not match): resume from another checkpoint")
    if version != FORMAT:
        raise CheckpointError(f"{folder / MANIFEST} has format {version}, this version of shoestring reads {FORMAT}")
    return Manifest(sha256=body["sha256"], extra=body["extra"])


def verify(folder: Path, file: str, manifest: Manifest) -> None:
    """Raises CheckpointError unless `file` is in the folder, bit for bit as the manifest says."""
    wanted = manifest.sha256.get(file)
    if Path(file).name != file or wanted is None:
        raise CheckpointError(f"{folder}: .metadata names a file {file!r} that {MANIFEST} does not: resume from another checkpoint")
    try:
        found = digest(folder / file)
    except OSError as error:
        raise CheckpointError(f"{folder / file} cannot be read ({error}): resume from another checkpoint") from None
    if found != wanted:
        raise CheckpointError(f"{folder / file} is damaged (its SHA-256 is not the one in {MANIFEST}): resume from another checkpoint")


def digest(path: Path) -> str:
    """SHA-256 of a file, hex."""
    sha = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def write_durably(path: Path, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def flush_folder(path: Path) -> None:
    """The folder's entries (names, renames) to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def unpickle_metadata(data: bytes) -> Any:
    """The DCP `Metadata` in a `.metadata`. Raises CheckpointError on any other class or function."""
    try:
        return _MetadataUnpickler(io.BytesIO(data)).load()
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f".metadata is not what shoestring writes ({type(error).__name__}: {error})") from None


class _MetadataUnpickler(pickle.Unpickler):
    """Builds what the `.metadata` of our planner and writer holds, and nothing else."""

    def find_class(self, module, name):
        if name not in _ALLOWED.get(module, ()):
            raise CheckpointError(f".metadata wants {module}.{name}, which no checkpoint of shoestring holds: do not load it")
        return super().find_class(module, name)


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
