"""Our side of the exchange with Hugging Face: weights out of a run's checkpoint, and a first checkpoint that training can start from."""

import dataclasses
import warnings
from collections.abc import Callable
from functools import partial
from math import prod
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from ...conf.build import section
from ...conf.schema import ModelConfig
from ...parallel.optimizer.zero import Chunk
from ..checkpoint.checkpointer import Archive
from ..checkpoint.folder import NAME, commit, find_latest, refuse_link
from ..checkpoint.manifest import MANIFEST, understood
from ..checkpoint.storage import ChunkSavePlanner, HashedWriter, write_item
from ..checkpoint.trust import Trust, Verdict, of_checkpoint, of_folder
from .hf_files import INDEX, give_back
from .hf_format import HFError, Piece, pieces, weight_shapes

MASTER, MOMENTS, EMA = ".master", (".exp_avg", ".exp_avg_sq"), ".ema"
BIAS = ".router.bias"
FIRST = "step_00000000"
WEIGHTS = {"master": MASTER, "ema": EMA}

Rows = Callable[[Piece, int, int], Tensor]  # rows first to last of a piece, in any shape and dtype


# What is read of a Hugging Face folder.
TAKEN = ("config.json", "tokenizer.json", "tokenizer_config.json", INDEX, "*.safetensors")


def trusted_checkpoint(source: Path, trust: Trust, log: Callable[[str], None]) -> tuple[Path, Path, Verdict]:
    """`find_checkpoint`, where it and its run's settings and tokenizer may be taken: (checkpoint, run directory, why). `log` hears of one
    that is not ours. Raises CheckpointError for one that is not trusted."""
    checkpoint, run_dir = find_checkpoint(source)
    verdict = of_checkpoint(checkpoint, trust, run_dir / "config.yaml", run_dir / "tokenizer.json")
    if verdict.told:
        log(verdict.told)
    return checkpoint, run_dir, verdict


def trusted_folder(source: Path, trust: Trust, log: Callable[[str], None]) -> Path:
    """Likewise, of a Hugging Face folder."""
    if told := of_folder(source, trust, TAKEN).told:
        log(told)
    return source


class CheckpointWeights:
    """A checkpoint as a source of weights: the optimizer's FP32 masters (or their average, `kind` ema), and the selection biases.

    Files are verified when read. Experts that were moved between ranks (`placement` in the checkpoint's extra) are in order again.
    """

    def __init__(self, path: Path, kind: str = "master"):
        if kind not in WEIGHTS:
            raise HFError(f"weights = {kind}: must be one of {', '.join(WEIGHTS)}")
        self._archive, self._suffix = Archive(path), WEIGHTS[kind]
        if not any(name.endswith(self._suffix) for name in self._archive.names()):
            raise HFError(f"{path}: holds no {kind} weights" + (": was optim.ema_decay 0?" if kind == "ema" else ""))
        extra = self._archive.extra
        with understood(path):
            self.m = section(ModelConfig, extra["model"], "model").freeze()
            self.precision = str(extra["precision"])
            self.tokenizer: str | None = extra.get("tokenizer")  # its fingerprint
            placement = extra.get("placement") or {}
            self._slot_of = {int(layer): {int(e): slot for slot, e in enumerate(table)} for layer, table in placement.items()}

    def names(self) -> list[str]:
        return [n.removesuffix(self._suffix) for n in self._archive.names() if n.endswith((self._suffix, BIAS))]

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements of the flattened weight; of experts, within one expert."""
        key = name if name.endswith(BIAS) else name + self._suffix
        if ".experts." in name and (slot_of := self._slot_of.get(int(name.split(".")[1]))):
            size = self._archive.numel(key) // self.m.num_experts
            expert = start // size
            assert stop <= (expert + 1) * size, f"{name}: [{start}, {stop}) is not of one expert"
            start, stop = (n + (slot_of[expert] - expert) * size for n in (start, stop))
        return self._archive.read(key, start, stop)


def find_checkpoint(source: Path) -> tuple[Path, Path]:
    """(checkpoint, run directory) of a run directory, its folder `checkpoints`, or a checkpoint in that. HFError if there is none."""
    refuse_link(source) if NAME.fullmatch(source.name) else None
    if (source / MANIFEST).is_file() or (source.is_dir() and NAME.fullmatch(source.name)):
        return source, source.resolve().parent.parent
    folder = source / "checkpoints" if (source / "checkpoints").is_dir() else source
    found = find_latest(folder)
    if found is None:
        raise HFError(f"{source}: holds no complete checkpoint; want a run directory, or a folder in its checkpoints/")
    return found, folder.resolve().parent


def write_first(folder: Path, m: ModelConfig, parts: list[Piece], read: Rows, *, precision: str, layout: str = "imported") -> Path:
    """Write folder/step_00000000, with masters of FP32 and moments of zero, and point folder/latest at it.

    `parts`: all pieces of the model but for copies and what is implied. Streams: `read` is asked for a block of rows when its bytes are
    to be written.
    """
    unfinished, final = folder / f".{FIRST}.partial", folder / FIRST
    extra = {"progress": {"step": 0}, "model": dataclasses.asdict(m), "layout": layout, "precision": precision}
    writer = HashedWriter(unfinished, extra, prepare=partial(unfinished.mkdir, parents=True), commit=partial(commit, unfinished, final, 1))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*assuming the intent is to save in a single process")  # it is
        dcp.save({}, storage_writer=writer, planner=_StreamPlanner(m, parts, read), no_dist=True)
    return final


class _StreamPlanner(ChunkSavePlanner):
    """Plans one item per block of rows and kind of state from sizes alone, and makes its data when it is written."""

    def __init__(self, m: ModelConfig, parts: list[Piece], read: Rows):
        super().__init__()
        self._parts, self._read = [*parts, *(p for p in pieces(m) if p.implied)], read
        self._sizes = {name: prod(shape) for name, shape in weight_shapes(m).items()}
        self._written = torch.empty(0)

    def create_local_plan(self):
        items, self._block_of = [], {}
        for piece, first, last in ((p, *rows) for p in self._parts for rows in p.blocks()):
            offset = piece.offset + first * piece.row_numel
            chunk = Chunk(self._sizes[piece.weight], offset, torch.empty((last - first) * piece.row_numel, device="meta"))
            for name in [piece.weight] if piece.is_selection_bias else [piece.weight + suffix for suffix in (MASTER, *MOMENTS)]:
                self._block_of[name, offset] = piece, first, last
                items.append(write_item(name, chunk))
        self.plan = dcp.SavePlan(items)
        return self.plan

    def lookup_object(self, index):
        self._written.untyped_storage().resize_(0)  # DCP keeps what it wrote, until its file is complete
        give_back()
        piece, first, last = self._block_of[index.fqn, index.offset[0]]
        if index.fqn.endswith(MOMENTS) or piece.implied:
            self._written = torch.zeros((last - first) * piece.row_numel)
        else:
            self._written = self._read(piece, first, last).flatten().to(torch.float32, copy=True)
        return self._written
