"""Our side of the exchange with Hugging Face: weights out of a run's checkpoint, and a first checkpoint that training can start from."""

import dataclasses
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from ..conf.schema import ModelConfig, YarnConfig
from ..parallel.zero import Chunk
from .checkpoint import Archive, commit, find_latest
from .hf_format import HFError, Piece
from .manifest import MANIFEST
from .storage import ChunkSavePlanner, HashedWriter, write_item

MASTER, MOMENTS = ".master", (".exp_avg", ".exp_avg_sq")
FIRST = "step_00000000"


class CheckpointWeights:
    """A checkpoint as a source of weights: the optimizer's FP32 masters, and the selection biases. Files are verified when read."""

    def __init__(self, path: Path):
        self._archive = Archive(path)
        fields = dict(self._archive.extra["model"])
        self.m = ModelConfig(**fields | {"yarn": YarnConfig(**fields["yarn"])}).freeze()
        self.precision: str = self._archive.extra["precision"]

    def names(self) -> list[str]:
        return [n.removesuffix(MASTER) for n in self._archive.names() if n.endswith((MASTER, ".router.bias"))]

    def read(self, name: str) -> Tensor:
        return self._archive.read(name if name.endswith(".router.bias") else name + MASTER)


def find_checkpoint(source: Path) -> tuple[Path, Path]:
    """(checkpoint, run directory) of a run directory, its folder `checkpoints`, or a checkpoint in that. HFError if there is none."""
    if (source / MANIFEST).is_file():
        return source, source.resolve().parent.parent
    folder = source / "checkpoints" if (source / "checkpoints").is_dir() else source
    found = find_latest(folder)
    if found is None:
        raise HFError(f"{source}: holds no complete checkpoint; want a run directory, or a folder in its checkpoints/")
    return found, folder.resolve().parent


def write_first(folder: Path, m: ModelConfig, parts: list[Piece], read: Callable[[str], Tensor], *, precision: str) -> Path:
    """Write folder/step_00000000, with masters of FP32 and moments of zero, and point folder/latest at it.

    Streams: each piece is asked for, by name, when its bytes are to be written.
    """
    unfinished, final = folder / f".{FIRST}.partial", folder / FIRST
    extra = {"progress": {"step": 0}, "model": dataclasses.asdict(m), "layout": "imported", "precision": precision}
    writer = HashedWriter(unfinished, extra, prepare=partial(unfinished.mkdir, parents=True), commit=partial(commit, unfinished, final, 1))
    sizes: dict[str, int] = {}
    for p in parts:
        sizes[p.weight] = max(sizes.get(p.weight, 0), p.offset + p.numel)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to save in a single process")  # it is
        dcp.save({}, storage_writer=writer, planner=_StreamPlanner(parts, sizes, read), no_dist=True)
    return final


class _StreamPlanner(ChunkSavePlanner):
    """Plans one item per piece and kind of state from sizes alone, and makes its data when it is written."""

    def __init__(self, parts: list[Piece], sizes: dict[str, int], read: Callable[[str], Tensor]):
        super().__init__()
        self._parts, self._sizes, self._read = parts, sizes, read

    def create_local_plan(self):
        items, self._piece_of = [], {}
        for p in self._parts:
            chunk = Chunk(self._sizes[p.weight], p.offset, torch.empty(p.numel, device="meta"))
            for name in [p.weight] if p.is_selection_bias else [p.weight + suffix for suffix in (MASTER, *MOMENTS)]:
                self._piece_of[name, p.offset] = p
                items.append(write_item(name, chunk))
        self.plan = dcp.SavePlan(items)
        return self.plan

    def lookup_object(self, index):
        piece = self._piece_of[index.fqn, index.offset[0]]
        if index.fqn.endswith(MOMENTS):
            return torch.zeros(piece.numel)
        return self._read(piece.name).flatten().to(torch.float32)
