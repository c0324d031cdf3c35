"""Offsets past 2^31 and 2^32 in files: checkpoint pieces and the plans over them, safetensors shards, token caches.

Files have holes: terabytes would fit. What is read back was written where an independent reader, or Python's integers, say.
"""

import io
import itertools
import json
import pickle
import random
import struct
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors
import torch
from shoestring.parallel.optimizer.zero import Chunk
from shoestring.train.checkpoint.manifest import CheckpointError, unpickle_metadata
from shoestring.train.checkpoint.storage import ChunkLoadPlanner, ChunkSavePlanner, VerifiedReader
from shoestring.train.data.token_cache import TokenStream
from shoestring.train.interop.hf_files import HFFolder, Stored, write_json, write_shards
from shoestring.train.interop.hf_format import Piece
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex

GIB = 1 << 30
ZEROS = bytes(1 << 24)


class Holes(io.FileIO):
    """A file in which long blocks of zeros are not written."""

    def write(self, data):
        view = memoryview(data).cast("B")
        if len(view) >= 1 << 20 and view[0] == 0 and not np.frombuffer(view, np.uint64, len(view) // 8).any():
            self.seek(len(view), io.SEEK_CUR)
            return len(view)
        return super().write(view)


# ---------------------------------------------------------------- checkpoints


def cut(numel, ranks, seed):
    borders = [0, *sorted(random.Random(seed).sample(range(1, numel), ranks - 1)), numel]
    return list(itertools.pairwise(borders))


def chunk_of(numel, low, high, dtype=torch.float32):
    return Chunk(numel, low, torch.empty(high - low, dtype=dtype, device="meta"))


def test_plans_over_pieces_past_int32():
    """A layer's 256 experts, 7.5 G elements saved by 128 ranks and loaded by 48 that cut them elsewhere: who reads what from where."""
    name, numel = "layers.3.experts.gate_up.master", 256 * 4096 * 7168
    saved, wanted = cut(numel, 128, seed=0), cut(numel, 48, seed=1)
    plans, planner = [], ChunkSavePlanner()
    for rank, (low, high) in enumerate(saved):
        planner.set_up_planner({name: chunk_of(numel, low, high)}, is_coordinator=rank == 0)
        plans.append(planner.create_local_plan())
    plans, metadata = planner.create_global_plan(plans)
    metadata = unpickle_metadata(pickle.dumps(metadata))
    assert metadata.state_dict_metadata[name].size == torch.Size([numel])
    loads = []
    for low, high in wanted:
        planner = ChunkLoadPlanner(lambda name: False)
        planner.set_up_planner({name: chunk_of(numel, low, high, torch.bfloat16)}, metadata)
        loads.append(planner.create_local_plan())
        found = {
            (i.storage_index.offset[0], i.storage_offsets[0], i.dest_offsets[0], i.lengths[0]) for i in loads[-1].items if i.lengths[0]
        }
        overlaps = [(max(low, a), min(high, b), a) for a, b in saved if max(low, a) < min(high, b)]
        assert found == {(a, first - a, first - low, last - first) for first, last, a in overlaps}
    planner.create_global_plan(loads)
    for plan in (loads[:-1], loads[1:]):
        with pytest.raises(CheckpointError, match="nobody has elements"):
            planner.create_global_plan(plan)


@pytest.mark.parametrize(
    "offset, numel",
    [(2 * GIB + 3, 1000), (4 * GIB + 3, 1000), (0, GIB // 2 + 9), (0, GIB + 9)],
    ids=["begins past 2^31", "begins past 2^32", "2 GiB long", "4 GiB long"],  # the last is a zip64 archive
)
def test_parts_of_far_and_long_pieces(tmp_path, monkeypatch, offset, numel):
    """As torch saves it: an uncompressed archive with the elements under `data/0`, anywhere in a rank's file."""
    monkeypatch.setattr(zipfile, "crc32", lambda data, value=0: 0)  # seconds, for a sum that nobody looks at
    last = torch.tensor([1.5, -2.5, 3.5])
    path = tmp_path / ("archive" if offset else "__0_0.distcp")
    with Holes(path, "w") as body, zipfile.ZipFile(body, "w") as archive:
        archive.writestr("x/data.pkl", b"p" * 156)
        with archive.open("x/data/0", "w", force_zip64=True) as entry:
            for left in range(4 * (numel - 3), 0, -len(ZEROS)):
                entry.write(ZEROS[: min(left, len(ZEROS))])
            entry.write(last.numpy().tobytes())
        archive.writestr("x/version", b"3\n")
    length = path.stat().st_size
    with open(tmp_path / "__0_0.distcp", "ab") as file:
        if offset:
            file.truncate(offset)
            file.write(path.read_bytes())
        file.write(b"what another piece begins with")
    index, reader = MetadataIndex("w", (0,)), VerifiedReader.__new__(VerifiedReader)
    reader.path, reader.storage_data = tmp_path, {index: _StorageInfo("__0_0.distcp", offset, length)}
    for start in (numel - 3, numel - 5):
        out = torch.full((numel - start,), torch.nan)
        reader.read_part(index, start, out)
        assert out.tolist() == [0.0] * (numel - start - 3) + last.tolist()
    assert (length > 4 * GIB) == (numel > GIB)


# ---------------------------------------------------------------- safetensors


def test_a_shard_past_uint32(tmp_path, monkeypatch):
    """4.3 GB of tensors in one file: its header, and its last tensor as NumPy, the safetensors library and we read it."""
    numel, tail = 1 << 28, torch.arange(128.0 * 256).view(128, 256)
    block = torch.zeros(numel // 16)
    opened = Path.open
    monkeypatch.setattr(Path, "open", lambda path, mode="r", **options: Holes(path, "w") if mode == "wb" else opened(path, mode, **options))
    big = [Stored(name=f"big.{i}", shape=(numel,), dtype=torch.float32, blocks=lambda: [block] * 16) for i in range(4)]
    write_shards(tmp_path, [*big, Stored(name="last", shape=(128, 256), dtype=torch.float32, blocks=lambda: [tail])], 1e12)
    path, far = tmp_path / "model.safetensors", 4 * 4 * numel
    with open(path, "rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        assert json.loads(file.read(length))["last"]["data_offsets"] == [far, far + 4 * 128 * 256]
        file.seek(8 + length + far)
        assert np.array_equal(np.fromfile(file, "<f4").reshape(128, 256), tail)
    with safetensors.safe_open(path, framework="pt") as file:
        assert torch.equal(file.get_tensor("last"), tail)
    write_json(tmp_path / "config.json", {})
    assert torch.equal(HFFolder(tmp_path).read(Piece(name="last", shape=(128, 256), weight="last"), 100, 128), tail[100:])
    assert far == 1 << 32 and path.stat().st_blocks * 512 < 1 << 24


# ---------------------------------------------------------------- token caches


@pytest.mark.parametrize("dtype", ["<u2", "<u4"])
def test_token_streams_past_uint32(tmp_path, dtype):
    """Pieces of 2^31 + 5, 7 and 2^32 + 3 tokens end to end: reads inside each, and over both seams."""
    lengths, dtype = [2**31 + 5, 7, 2**32 + 3], np.dtype(dtype)
    cache = SimpleNamespace(path=lambda p, what: tmp_path / f"{p}.{what}", dtype=dtype)
    starts = [0, *itertools.accumulate(lengths)]
    places = [0, 2**31 - 3, starts[1] - 4, starts[2] - 3, starts[2] + 2**31 - 2, starts[3] - 2**16, starts[3] - 6]
    planted = {place + i: 1 + (place + i) % 60_000 for place in places for i in range(6)}
    for p, length in enumerate(lengths):
        with open(cache.path(p, "train.bin"), "wb") as file:
            file.truncate(length * dtype.itemsize)
            for place, token in planted.items():
                if starts[p] <= place < starts[p + 1]:
                    file.seek((place - starts[p]) * dtype.itemsize)
                    file.write(token.to_bytes(dtype.itemsize, "little"))
    stream = TokenStream(cache, "train", lengths)
    assert stream.num_tokens == sum(lengths)
    for place in places:
        out = np.empty(6, dtype=np.int64)
        stream.read(place, out)
        assert out.tolist() == [planted[place + i] for i in range(6)], place
    assert [stream.file_of(place).name[0] for place in (starts[1] - 1, starts[1], starts[2], sum(lengths) - 1)] == ["0", "1", "2", "2"]
