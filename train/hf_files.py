"""Folders of safetensors files with an index: read one tensor at a time after everything was checked, written one shard at a time."""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from ..conf.schema import ModelConfig
from .hf_format import HFError, Piece, pieces
from .manifest import flush_folder

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
_READABLE = ("F64", "F32", "BF16", "F16")  # safetensors' names
_SHOWN = 4  # names listed in an error


class HFFolder:
    """The tensors of a checkpoint folder. Headers are read at once, tensors when asked for; one file is open at a time.

    Raises HFError for a missing or damaged file, and where index and files disagree.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config: dict[str, Any] = read_json(path / "config.json")
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._file_of: dict[str, str] = {}
        self._open: tuple[str, Any] = ("", None)
        claimed = self._index()
        for file in sorted(set(claimed.values())) if claimed else [SINGLE]:
            self._read_header(file)
        for name, file in claimed.items():
            if self._file_of.get(name) != file:
                raise HFError(f"{path / INDEX}: says that {name} is in {file}, and it is not there")
        if claimed and (extra := self._file_of.keys() - claimed.keys()):
            raise HFError(f"{path / INDEX}: does not list {_some(extra)}, found in the files")

    def read(self, name: str) -> Tensor:
        """The tensor, in its stored dtype."""
        try:
            return self._handle(self._file_of[name]).get_tensor(name)
        except (OSError, safetensors.SafetensorError) as error:
            raise HFError(f"{self.path / self._file_of[name]}: {name} cannot be read ({error})") from None

    def _index(self) -> dict[str, str]:
        """Tensor name -> file name; empty for a folder with a single file."""
        if not (self.path / INDEX).exists():
            if not (self.path / SINGLE).exists():
                raise HFError(f"{self.path}: has neither {INDEX} nor {SINGLE}")
            return {}
        claimed = read_json(self.path / INDEX).get("weight_map")
        if not isinstance(claimed, dict) or not claimed:
            raise HFError(f"{self.path / INDEX}: has no weight_map")
        for file in set(claimed.values()):
            if not isinstance(file, str) or Path(file).name != file:
                raise HFError(f"{self.path / INDEX}: {file!r} is not the name of a file in this folder")
        return claimed

    def _read_header(self, file: str) -> None:
        handle = self._handle(file)
        for name in list(handle.keys()):
            if name in self._file_of:
                raise HFError(f"{self.path}: {name} is in both {self._file_of[name]} and {file}")
            described = handle.get_slice(name)
            self._file_of[name], self.shapes[name], self.dtypes[name] = file, tuple(described.get_shape()), described.get_dtype()

    def _handle(self, file: str) -> Any:
        if self._open[0] != file:
            self._open = ("", None)  # the last one is closed first: its pages need not stay
            try:
                self._open = (file, safetensors.safe_open(self.path / file, framework="pt"))
            except FileNotFoundError:
                raise HFError(f"{self.path / file}: the file is missing") from None
            except (OSError, safetensors.SafetensorError) as error:
                raise HFError(f"{self.path / file}: is not a whole safetensors file ({error})") from None
        return self._open[1]


def matched(folder: HFFolder, m: ModelConfig, *, skip_mtp: bool = False) -> list[Piece]:
    """The pieces of model `m` that the folder holds: all of them, in the order of our weights, and nothing else.

    Raises HFError naming the first tensors that are missing, unexpected, mis-shaped, or quantised. Experts may be stored one by one or
    stacked. `skip_mtp` leaves out layers past the last one (multi-token prediction), which are otherwise unexpected. A tied model may
    hold its table a second time as lm_head.weight, if the two are equal.
    """
    stacked = any(name.endswith(".mlp.experts.gate_up_proj") for name in folder.shapes)
    wanted = list(pieces(m, stacked=stacked))
    by_name = {p.name: p for p in wanted}
    extra = folder.shapes.keys() - by_name.keys()
    mtp = {name for name in extra if name.startswith("model.layers.") and (n := name.split(".")[2]).isdigit() and int(n) >= m.num_layers}
    if mtp and not skip_mtp:
        raise HFError(f"{folder.path}: has layers past the last one, {m.num_layers - 1} (multi-token prediction): {_some(mtp)}; "
                      "skip_mtp=True (--skip-mtp) leaves them out")  # fmt: skip
    extra -= mtp
    if m.tie_embeddings and "lm_head.weight" in extra:
        if not torch.equal(folder.read("lm_head.weight"), folder.read("model.embed_tokens.weight")):
            raise HFError(f"{folder.path}: tie_word_embeddings is true, and lm_head.weight differs from model.embed_tokens.weight")
        extra.remove("lm_head.weight")
    if extra:
        scales = [name for name in extra if name.endswith("_scale_inv")]
        hint = ": quantised weights are not read, convert them to bfloat16 first" if scales else ""
        raise HFError(f"{folder.path}: unexpected {_some(scales or extra)}{hint}")
    if missing := [p.name for p in wanted if p.numel and p.name not in folder.shapes]:
        raise HFError(f"{folder.path}: missing {_some(missing)}")
    for name, piece in by_name.items():
        if piece.numel and folder.shapes[name] != piece.shape:
            raise HFError(f"{folder.path}: {name} has shape {folder.shapes[name]}, and config.json asks for {piece.shape}")
        if piece.numel and folder.dtypes[name] not in _READABLE:
            raise HFError(f"{folder.path}: {name} is stored as {folder.dtypes[name]}; readable: {', '.join(_READABLE)}")
    return [p for p in wanted if p.numel]


def write_shards(out: Path, tensors: Iterable[tuple[Piece, Tensor]], sizes: Sequence[int], max_shard_bytes: float) -> None:
    """Write tensors (contiguous, in an order that `sizes`, their bytes, knows beforehand) as numbered files and an index.

    Holds one shard at a time. A tensor larger than `max_shard_bytes` has a shard of its own.
    """
    shard_of = list(_plan(sizes, max_shard_bytes))
    count = shard_of[-1] + 1
    file = lambda shard: SINGLE if count == 1 else f"model-{shard + 1:05d}-of-{count:05d}.safetensors"
    weight_map, held, current = {}, {}, 0
    for shard, (piece, tensor) in zip(shard_of, tensors, strict=True):
        if shard != current:
            _write(out / file(current), held)
            held, current = {}, shard
        held[piece.name], weight_map[piece.name] = tensor, file(shard)
    _write(out / file(current), held)
    if count > 1:
        write_json(out / INDEX, {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map})


def _plan(sizes: Sequence[int], limit: float) -> Iterator[int]:
    """Shard of each tensor: in order, a new one when the next does not fit."""
    shard, filled = 0, 0
    for size in sizes:
        if filled and filled + size > limit:
            shard, filled = shard + 1, 0
        filled += size
        yield shard


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, path, metadata={"format": "pt"})
    _flush(path)


class NewFolder:
    """A folder under a temporary name beside `out`, renamed to it when all went well and removed when not."""

    def __init__(self, out: Path):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise HFError(f"{out}: exists and is not an empty folder; remove it, or choose another place")
        self.out, self.temporary = out, out.with_name(f".{out.name}.{os.getpid()}.tmp")

    def __enter__(self) -> Path:
        shutil.rmtree(self.temporary, ignore_errors=True)
        self.temporary.mkdir(parents=True)
        return self.temporary

    def __exit__(self, kind, error, trace) -> None:
        if kind is None:
            self.temporary.rename(self.out)  # POSIX: also onto an empty folder
            flush_folder(self.out.parent)
        else:
            shutil.rmtree(self.temporary, ignore_errors=True)


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise HFError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise HFError(f"{path}: is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise HFError(f"{path}: must hold one JSON object")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    _flush(path)


def _flush(path: Path) -> None:
    """To the disk, not only to its cache: the folder's final name must mean that its files are whole."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _some(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
