"""Folders of safetensors files with an index: read some rows at a time after everything was checked, written as streams.

Whatever the size of a tensor or of a file, neither is ever held whole.
"""

import ctypes
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor

from ...conf.schema import ModelConfig
from ..checkpoint.files import flush_folder
from .hf_format import BLOCK, HFError, Piece, pieces
from .hf_fp8 import SIDE, dequantise, grid

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
SCALE = "_scale_inv"  # after the name of a quantised weight
_NAMES = {torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float8_e4m3fn: "F8_E4M3"}
_READABLE = ("F64", "F32", "BF16", "F16")  # without scales
_SHOWN = 4  # names listed in an error


class HFFolder:
    """The tensors of a checkpoint folder. Headers are read at once, rows when asked for; one file is open at a time.

    Raises HFError for a missing or damaged file, and where index and files disagree.
    """

    def __init__(self, path: Path):
        self.path = path
        self.config: dict[str, Any] = read_json(path / "config.json")
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        self._file_of: dict[str, str] = {}
        self._open: tuple[str, Any] = ("", None)
        self._touched = 0  # elements read since then
        claimed = self._index()
        for file in sorted(set(claimed.values())) if claimed else [SINGLE]:
            self._read_header(file)
        for name, file in claimed.items():
            if self._file_of.get(name) != file:
                raise HFError(f"{path / INDEX}: says that {name} is in {file}, and it is not there")
        if claimed and (extra := self._file_of.keys() - claimed.keys()):
            raise HFError(f"{path / INDEX}: does not list {_some(extra)}, found in the files")

    def read(self, piece: Piece, first: int, last: int) -> Tensor:
        """Rows `first` to `last` of the piece, in their stored dtype; what was quantised in FP32. `first` begins a row of scales."""
        rows = self._rows(piece.name, first, last, piece.index)
        if self.dtypes[piece.name] != "F8_E4M3":
            return rows
        return dequantise(rows, self._rows(piece.name + SCALE, first // SIDE, -(-last // SIDE)))

    def _rows(self, name: str, first: int, last: int, index: int | None = None) -> Tensor:
        file = self._file_of[name]
        self._touched += (last - first) * prod(self.shapes[name][1:] if index is None else self.shapes[name][2:])
        if self._touched > BLOCK:
            self._close()
        try:
            tensor = self._handle(file).get_slice(name)
            return tensor[first:last] if index is None else tensor[index, first:last]
        except (OSError, safetensors.SafetensorError) as error:
            raise HFError(f"{self.path / file}: {name} cannot be read ({error})") from None

    def _index(self) -> dict[str, str]:
        """Tensor name -> file name; empty for a folder with a single file."""
        if not (self.path / INDEX).exists():
            if not (self.path / SINGLE).exists():
                raise HFError(f"{self.path}: has neither {INDEX} nor {SINGLE}")
            return {}
        claimed = read_json(self.path / INDEX).get("weight_map")
        if not isinstance(claimed, dict) or not claimed:
            raise HFError(f"{self.path / INDEX}: has no weight_map")
        for file in claimed.values():
            if not isinstance(file, str) or not file.isprintable() or Path(file).name != file or not file.endswith(".safetensors"):
                raise HFError(f"{self.path / INDEX}: {str(file)[:80]!r} is not the name of a safetensors file in this folder")
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
            self._close()
            try:
                self._open = (file, safetensors.safe_open(self.path / file, framework="pt"))
            except FileNotFoundError:
                raise HFError(f"{self.path / file}: the file is missing") from None
            except (OSError, safetensors.SafetensorError) as error:
                raise HFError(f"{self.path / file}: is not a whole safetensors file ({error})") from None
        return self._open[1]

    def _close(self) -> None:
        """Files are mapped into memory: the pages that were read stay until then."""
        self._open, self._touched = ("", None), 0


def matched(folder: HFFolder, m: ModelConfig, *, mtp: str = "check") -> list[Piece]:
    """The pieces of model `m` that the folder holds: all of them, in the order of our weights, and nothing else; copies are left out.

    `mtp`: of prediction modules' copies of embedding and head. check: they must be equal to the model's; shared-from-main: they are not
    looked at; skip: of a model without prediction modules, and the folder's are left out. Raises HFError naming the first tensors that
    are missing, unexpected or mis-shaped. Experts may be stored one by one or stacked. A tied model may hold its table a second time as
    lm_head.weight, if the two are equal.
    """
    stacked = any(name.endswith(".mlp.experts.gate_up_proj") for name in folder.shapes)
    _check_size(folder, m, stacked)
    wanted = [p for p in pieces(m, stacked=stacked) if p.numel and not p.implied]
    copies = [p for p in wanted if p.copy and p.name in folder.shapes]
    if m.tie_embeddings and "lm_head.weight" in folder.shapes:
        copies.append(Piece(name="lm_head.weight", shape=(m.vocab_size, m.dim), weight="embed", copy=True))
    own = [p for p in wanted if not p.copy]
    _check_names(folder, m, own, copies, skip_mtp=mtp == "skip")
    for piece in own + copies:
        _check_stored(folder, piece)
    originals = {p.weight: p for p in own if p.weight in ("embed", "head")}
    for piece in copies:
        if (mtp == "check" or piece.name == "lm_head.weight") and not _equal(folder, piece, originals[piece.weight]):
            more = "; --mtp shared-from-main takes the model's for both" if piece.name != "lm_head.weight" else ""
            raise HFError(f"{folder.path}: {piece.name} differs from {originals[piece.weight].name}, and our model has one for both{more}")
    return own


def _check_size(folder: HFFolder, m: ModelConfig, stacked: bool) -> None:
    """Before names are listed: config.json may ask for more than any memory holds."""
    most = max((shape[0] for shape in folder.shapes.values() if shape), default=0) if stacked else len(folder.shapes)
    for what, asked, there in (("layers", m.num_blocks, len(folder.shapes)), ("experts", m.num_experts if m.num_moe_layers else 0, most)):
        if asked > there:
            there = f"{len(folder.shapes):,} tensors"
            raise HFError(f"{folder.path}: missing most: config.json asks for {asked:,} {what}, and there are {there}")


def _check_names(folder: HFFolder, m: ModelConfig, own: list[Piece], copies: list[Piece], *, skip_mtp: bool) -> None:
    known = {p.name for p in own + copies} | {p.name for p in pieces(m) if not p.numel}
    known |= {p.name + SCALE for p in own if folder.dtypes.get(p.name) == "F8_E4M3"}
    extra = folder.shapes.keys() - known
    mtp = {name for name in extra if name.startswith("model.layers.") and (n := name.split(".")[2]).isdigit() and int(n) >= m.num_blocks}
    if mtp and not skip_mtp:
        raise HFError(f"{folder.path}: has layers past the last one, {m.num_blocks - 1} (multi-token prediction): {_some(mtp)}; "
                      "--skip-mtp leaves them out")  # fmt: skip
    if extra - mtp:
        raise HFError(f"{folder.path}: unexpected {_some(extra - mtp)}")
    if missing := {p.name for p in own if p.name not in folder.shapes}:
        only_mtp = all(name.startswith("model.layers.") and int(name.split(".")[2]) >= m.num_layers for name in missing)
        hint = "; --skip-mtp does without layers for multi-token prediction" if only_mtp else ""
        raise HFError(f"{folder.path}: missing {_some(missing)}{hint}")


def _check_stored(folder: HFFolder, piece: Piece) -> None:
    name, dtype = piece.name, folder.dtypes[piece.name]
    found = folder.shapes[name] if piece.index is None else folder.shapes[name][1:]
    if found != piece.shape:
        raise HFError(f"{folder.path}: {name} has shape {folder.shapes[name]}, and config.json asks for {piece.shape}")
    if dtype == "F8_E4M3":
        scale = folder.shapes.get(name + SCALE), folder.dtypes.get(name + SCALE)
        if piece.index is not None or not folder.config.get("quantization_config") or scale != (grid(piece.shape), "F32"):
            raise HFError(f"{folder.path}: {name} is stored as F8_E4M3; readable with quantization_config in config.json, and "
                          f"{name}{SCALE} of shape {grid(piece.shape)} in F32")  # fmt: skip
    elif dtype not in _READABLE:
        raise HFError(f"{folder.path}: {name} is stored as {dtype}; readable: {', '.join(_READABLE)}, F8_E4M3")


def _equal(folder: HFFolder, one: Piece, other: Piece) -> bool:
    return all(torch.equal(folder.read(one, *rows), folder.read(other, *rows)) for rows in one.blocks())


# ---------------------------------------------------------------- out


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A tensor to write; `blocks` makes its elements, in order and of any shape, when they are wanted."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: Callable[[], Iterable[Tensor]]

    @property
    def num_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


def write_shards(out: Path, tensors: Sequence[Stored], max_shard_bytes: float) -> None:
    """Write tensors as numbered files and an index. A tensor larger than `max_shard_bytes` has a file of its own."""
    shards = list(_shards(tensors, max_shard_bytes))
    weight_map = {}
    for i, shard in enumerate(shards):
        file = SINGLE if len(shards) == 1 else f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        _write(out / file, shard)
        weight_map |= {t.name: file for t in shard}
    if len(shards) > 1:
        write_json(out / INDEX, {"metadata": {"total_size": sum(t.num_bytes for t in tensors)}, "weight_map": weight_map})


def _shards(tensors: Sequence[Stored], limit: float) -> Iterator[list[Stored]]:
    """In order, a new one when the next tensor does not fit."""
    shard, num_bytes = [], 0
    for tensor in tensors:
        if shard and num_bytes + tensor.num_bytes > limit:
            yield shard
            shard, num_bytes = [], 0
        shard.append(tensor)
        num_bytes += tensor.num_bytes
    yield shard


def _write(path: Path, tensors: list[Stored]) -> None:
    """One safetensors file: eight bytes for the length of its header, the header, the tensors. Widest first, so that all are aligned."""
    tensors = sorted(tensors, key=lambda t: -t.dtype.itemsize)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for t in tensors:
        header[t.name] = {"dtype": _NAMES[t.dtype], "shape": t.shape, "data_offsets": [end, end := end + t.num_bytes]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for t in tensors:
            for block in t.blocks():
                assert block.dtype == t.dtype
                file.write(block.contiguous().flatten().view(torch.uint8).numpy())
                del block  # before the next one is made
                give_back()
        assert file.tell() == 8 + len(text) + end, f"{path}: tensors are not as large as announced"
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


def give_back() -> None:
    """Free memory to the system: glibc keeps holes of blocks, which what is small and stays has made too small for the next block."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim:
            trim(0)


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise HFError(f"{path}: cannot be read ({error.strerror})") from None
    except (ValueError, RecursionError) as error:
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
