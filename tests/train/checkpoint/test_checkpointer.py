"""Checkpoints: what is loaded is what was saved, on any layout and engine; and what is damaged, torn or strange is refused."""

import hashlib
import json
import math
import os
import pickle
import shutil
import threading
import zlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from shoestring.conf.schema import OptimConfig
from shoestring.launch.local import fork_ranks
from shoestring.parallel.optimizer import deepspeed_zero
from shoestring.parallel.optimizer.make import make_optimizer
from shoestring.parallel.optimizer.zero import Chunk, Spec, may_lack
from shoestring.train.checkpoint import folder as folder_module
from shoestring.train.checkpoint import manifest as manifest_module
from shoestring.train.checkpoint.checkpointer import Archive, Checkpointer, names, read_extra, read_full
from shoestring.train.checkpoint.folder import find_latest
from shoestring.train.checkpoint.manifest import CheckpointError, DamagedError, read_manifest
from torch import nn

TENSORS = {
    "w.master": torch.randn(1009, generator=torch.Generator().manual_seed(0)),
    "w.exp_avg": torch.randn(1009, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "w.fp64": torch.randn(10, generator=torch.Generator().manual_seed(2)).double(),
    "counts": torch.arange(7),
    "rng.0": torch.arange(200, dtype=torch.uint8),
    "one": torch.ones(1),  # only one rank can own it
}
EXTRA = {"steps": 3, "lr": 0.1 + 0.2, "data": {"phase": 1, "index": 3_600_000_001}, "name": "naïve"}


def cut(world, rank, seed, values=TENSORS):
    """This rank's chunks of the tensors, cut at random; copies."""
    chunks = {}
    for name, tensor in values.items():
        generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {seed}".encode()))
        borders = [0, *torch.randint(len(tensor) + 1, (world - 1,), generator=generator).sort().values.tolist(), len(tensor)]
        low, high = borders[rank : rank + 2]
        if low < high:
            chunks[name] = Chunk(len(tensor), low, tensor[low:high].clone())
    return chunks


def blank(chunks):
    return {n: Chunk(c.numel, c.offset, torch.zeros_like(c.data)) for n, c in chunks.items()}


def checkpointer(folder, keep_last=2, async_save=False):
    group = dist.new_group(backend="gloo")
    dist.barrier()  # a rank that leaves while another still connects breaks the group
    return Checkpointer(Path(folder), keep_last=keep_last, async_save=async_save, group=group)


def save_all(folder, world=2, steps=(3,), values=TENSORS, **options):
    """Save on `world` ranks; the last step's path."""

    def body():
        c = checkpointer(folder, **options)
        for step in steps:
            c.save(step, cut(world, dist.get_rank(), step, values), EXTRA if dist.get_rank() == 0 else {})
        c.wait()

    fork_ranks(world, body, timeout_s=60)
    return Path(folder) / f"step_{steps[-1]:08d}"


def try_load(path, world=2, wanted=TENSORS, optional=lambda name: False):
    """Each rank's (what load said, whether any chunk was touched)."""

    def body():
        chunks = blank(cut(world, dist.get_rank(), "load", wanted))
        try:
            said = checkpointer(path.parent).load(path, chunks, optional)
        except CheckpointError as error:
            said = str(error)
        return said, any(c.data.count_nonzero() for c in chunks.values())

    return fork_ranks(world, body, timeout_s=60)


def refused(path, message, **options):
    """Every rank refuses, and none has copied anything."""
    for said, touched in try_load(path, **options):
        assert isinstance(said, str) and message in said and not touched, said


# ---------------------------------------------------------------- what goes in comes out


@pytest.mark.parametrize("async_save", [False, True])
@pytest.mark.parametrize("before, after", [(1, 3), (4, 2), (2, 1)])
def test_any_cut_loads_into_any_other(tmp_path, before, after, async_save):
    path = save_all(tmp_path, before, async_save=async_save)

    def body():
        wanted = cut(after, dist.get_rank(), "another")
        found = blank(wanted)
        c = checkpointer(tmp_path)
        assert c.latest() == path
        assert c.load(path, found) == EXTRA
        return all(torch.equal(found[n].data, wanted[n].data) for n in wanted)

    assert fork_ranks(after, body, timeout_s=60) == [True] * after
    assert read_extra(path) == EXTRA


def test_replicas_may_all_load_what_one_saved(tmp_path):
    path = save_all(tmp_path, 1)

    def body():
        found = {n: Chunk(len(t), 0, torch.zeros_like(t)) for n, t in TENSORS.items()}
        checkpointer(tmp_path).load(path, found)
        return all(torch.equal(found[n].data, t) for n, t in TENSORS.items())

    assert fork_ranks(2, body, timeout_s=60) == [True, True]


def test_float_dtypes_convert_by_rounding(tmp_path):
    path = save_all(tmp_path, 2, values={"w": TENSORS["w.master"]})

    def body():
        found = {"w": Chunk(1009, 0, torch.zeros(1009, dtype=torch.bfloat16))}
        checkpointer(tmp_path).load(path, found)
        return torch.equal(found["w"].data, TENSORS["w.master"].bfloat16())

    assert fork_ranks(1, body, timeout_s=60) == [True]


def test_archive_reads_whole_tensors_on_one_process(tmp_path, monkeypatch):
    path = save_all(tmp_path, 3)
    hashed = []
    digest = manifest_module.digest
    monkeypatch.setattr(manifest_module, "digest", lambda p: hashed.append(p.name) or digest(p))
    archive = Archive(path)
    assert archive.names() == names(path) == sorted(TENSORS) and archive.extra == EXTRA
    hashed.clear()
    for name, tensor in TENSORS.items():
        assert archive.numel(name) == len(tensor)
        assert archive.read(name).dtype == tensor.dtype and torch.equal(archive.read(name), tensor)
    assert sorted(hashed) == ["__0_0.distcp", "__1_0.distcp", "__2_0.distcp"]  # each once
    assert torch.equal(read_full(path, "counts"), TENSORS["counts"])
    with pytest.raises(CheckpointError, match="does not hold 'nothing'"):
        archive.read("nothing")


def test_folder_holds_no_absolute_path(tmp_path):
    path = save_all(tmp_path)
    for file in path.iterdir():
        assert str(tmp_path).encode() not in file.read_bytes()
    moved = path.rename(tmp_path / "step_00000009")
    assert torch.equal(read_full(moved, "counts"), TENSORS["counts"])


# ---------------------------------------------------------------- asynchronous


def test_async_save_is_a_snapshot(tmp_path, monkeypatch):
    """The save is held back until the chunks have other values and others' collectives have run."""
    go = threading.Event()
    commit = folder_module.commit
    monkeypatch.setattr(folder_module, "commit", lambda *args: go.wait(30) and commit(*args))

    def body():
        c = checkpointer(tmp_path, async_save=True)
        chunks, extra = cut(2, dist.get_rank(), 0), {"steps": 1}
        c.save(1, chunks, extra)
        for chunk in chunks.values():
            chunk.data.zero_()
        extra["steps"] = 2
        dist.all_reduce(torch.ones(10))
        pending = find_latest(tmp_path) is None
        dist.barrier()
        go.set()
        c.save(2, chunks, extra)  # waits for the first
        first = find_latest(tmp_path) is not None
        c.wait()
        return pending, first

    assert fork_ranks(2, body, timeout_s=60) == [(True, True)] * 2
    one, two = Archive(tmp_path / "step_00000001"), Archive(tmp_path / "step_00000002")
    assert one.extra == {"steps": 1} and two.extra == {"steps": 2}
    assert all(torch.equal(one.read(n), t) and two.read(n).count_nonzero() == 0 for n, t in TENSORS.items())


@pytest.mark.parametrize("async_save", [False, True])
def test_a_failed_save_is_raised_on_every_rank(tmp_path, async_save):
    """A file stands where the folder should be; once it is gone the next save works."""
    folder = tmp_path / "checkpoints"
    folder.write_text("in the way")

    def body():
        c = checkpointer(folder, async_save=async_save)
        message = ""
        try:
            c.save(1, cut(2, dist.get_rank(), 0), {})
            c.wait()
        except CheckpointError as error:
            message = str(error)
        dist.barrier()
        if dist.get_rank() == 0:
            folder.unlink()
        dist.barrier()
        c.save(2, cut(2, dist.get_rank(), 0), {})
        return message, c.latest()

    for message, latest in fork_ranks(2, body, timeout_s=60):
        assert "the checkpoint of step 1 was not written" in message and "rank 0: FileExistsError" in message
        assert latest == folder / "step_00000002"


# ---------------------------------------------------------------- damage


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


def edit_manifest(path, old, new):
    text = (path / "manifest.json").read_text()
    assert old in text
    (path / "manifest.json").write_text(text.replace(old, new))


DAMAGES = {
    "one bit of a tensor": (lambda p: flip(p / "__1_0.distcp"), "__1_0.distcp is damaged"),
    "truncated": (lambda p: os.truncate(p / "__0_0.distcp", 100), "__0_0.distcp is damaged"),
    "a file is gone": (lambda p: (p / "__0_0.distcp").unlink(), "__0_0.distcp is missing"),
    "one bit of .metadata": (lambda p: flip(p / ".metadata"), ".metadata is damaged"),
    "a number in the manifest": (lambda p: edit_manifest(p, '"steps": 3', '"steps": 4'), "manifest.json is damaged"),
    "manifest torn": (lambda p: os.truncate(p / "manifest.json", 200), "manifest.json is damaged"),
    "manifest gone": (lambda p: (p / "manifest.json").unlink(), "manifest.json is missing"),
    "files swapped": (lambda p: swap(p / "__0_0.distcp", p / "__1_0.distcp"), "is damaged"),
}


def swap(a, b):
    one, two = a.read_bytes(), b.read_bytes()
    a.write_bytes(two), b.write_bytes(one)


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = save_all(tmp_path_factory.mktemp("good"))
    assert [said for said, _ in try_load(path)] == [EXTRA, EXTRA]
    return path


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_refused_on_every_rank(good, tmp_path, damage):
    path = Path(shutil.copytree(good, tmp_path / good.name))
    break_it, message = DAMAGES[damage]
    break_it(path)
    refused(path, message)
    with pytest.raises(DamagedError, match=r"(damaged|missing).*; nearest valid one: \S*step_00000002|no other checkpoint there is whole"):
        archive = Archive(path)
        for name in archive.names():
            archive.read(name)


@pytest.mark.parametrize("file", ["manifest.json", ".metadata", "__0_0.distcp"])
def test_damage_that_one_rank_sees_stops_all(good, tmp_path, file):
    """Without agreement the other ranks would wait in the next collective, or be half loaded."""
    bad = Path(shutil.copytree(good, tmp_path / good.name))
    flip(bad / file)

    def body():
        chunks = blank(cut(2, dist.get_rank(), "load"))
        with pytest.raises(CheckpointError, match=f"rank 1: .*{file} is damaged"):
            checkpointer(tmp_path).load(bad if dist.get_rank() == 1 else good, chunks)
        return any(c.data.count_nonzero() for c in chunks.values())

    assert fork_ranks(2, body, timeout_s=60) == [False, False]


def test_what_is_damaged_and_another_models_is_another_models(good, tmp_path):
    """Damage sets a checkpoint aside, and that must not happen to one that was only asked for by mistake."""
    path = Path(shutil.copytree(good, tmp_path / good.name))
    flip(path / "__0_0.distcp"), flip(path / "__1_0.distcp")

    def body():
        chunks = blank(cut(2, dist.get_rank(), "load")) | ({"more": Chunk(5, 0, torch.zeros(5))} if dist.get_rank() == 1 else {})
        with pytest.raises(CheckpointError, match=r"rank 1: the checkpoint does not hold 'more'") as refusal:
            checkpointer(tmp_path).load(path, chunks)
        return type(refusal.value) is CheckpointError

    assert fork_ranks(2, body, timeout_s=60) == [True, True]


class Planted:
    def __reduce__(self):
        return os.mkdir, ("PLANTED",)


@pytest.mark.parametrize("forge", [False, True])
def test_planted_code_does_not_run(good, tmp_path, monkeypatch, forge):
    monkeypatch.chdir(tmp_path)
    path = Path(shutil.copytree(good, tmp_path / good.name))
    metadata = pickle.loads((path / ".metadata").read_bytes())
    metadata.planner_data = Planted()
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    if forge:  # by somebody who can write the folder and knows this code
        manifest = read_manifest(path)
        hashes = manifest.sha256 | {".metadata": hashlib.sha256(pickle.dumps(metadata)).hexdigest()}
        manifest_module.write_manifest(path, hashes, manifest.extra)
    refused(path, ".metadata wants posix.mkdir" if forge else ".metadata is damaged")
    assert not Path("PLANTED").exists()
    dcp.FileSystemReader(path).read_metadata()
    assert Path("PLANTED").exists(), "the plant is dead: this test shows nothing"


def test_a_file_outside_the_folder_is_refused(good, tmp_path):
    path = Path(shutil.copytree(good, tmp_path / good.name))
    metadata = pickle.loads((path / ".metadata").read_bytes())
    for info in metadata.storage_data.values():
        info.relative_path = "../" + info.relative_path
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    hashes = read_manifest(path).sha256 | {".metadata": hashlib.sha256(pickle.dumps(metadata)).hexdigest()}
    manifest_module.write_manifest(path, hashes | {f"../{f}": h for f, h in hashes.items()}, EXTRA)
    refused(path, ".metadata names a file '../__0_0.distcp'")


# ---------------------------------------------------------------- not what this run needs


def test_strange_tensors_are_refused(good):
    without = {n: t for n, t in TENSORS.items() if n != "counts"}
    refused(good, "holds 'counts', which this run has no place for", wanted=without)
    refused(good, "does not hold 'more'", wanted=TENSORS | {"more": torch.ones(5)})
    refused(
        good,
        "'counts': the checkpoint holds 7 of torch.int64, this run needs 8 of torch.int64",
        wanted=TENSORS | {"counts": torch.arange(8)},
    )
    refused(
        good,
        "'counts': the checkpoint holds 7 of torch.int64, this run needs 7 of torch.float32",
        wanted=TENSORS | {"counts": torch.ones(7)},
    )


def test_a_part_that_nobody_wants_is_refused(good):
    """A layout that forgot an expert slab."""

    def body():
        chunks = blank(cut(1, 0, 0)) | {"w.master": Chunk(1009, 9, torch.zeros(1000))}
        with pytest.raises(CheckpointError, match=r"'w.master': nobody has elements \[0, 9\) of 1009"):
            checkpointer(good.parent).load(good, chunks)

    fork_ranks(1, body, timeout_s=60)


def test_optional_tensors_may_be_missing_or_left(good):
    """RNG states when the world changes its size."""
    wanted = {n: t for n, t in TENSORS.items() if n != "rng.0"} | {"rng.1": torch.ones(3)}
    assert [said for said, _ in try_load(good, wanted=wanted, optional=lambda n: n.startswith("rng."))] == [EXTRA, EXTRA]
    refused(good, "does not hold 'rng.1'", wanted=wanted)


@pytest.mark.parametrize(
    "mine, message",
    [
        (lambda rank: Chunk(10, 0, torch.ones(5)), r"'w': elements \[0, 5\) of 10 overlap others"),  # DCP alone drops one silently
        (lambda rank: Chunk(10, 4 * rank, torch.ones(6)), r"'w': elements \[4, 10\) of 10 overlap others"),
        (lambda rank: Chunk(10, 6 * rank, torch.ones(4)), r"'w': nobody has elements \[4, 6\) of 10"),
        (lambda rank: Chunk(10, 5 * rank, torch.ones(4)), r"'w': nobody has elements \[4, 5\) of 10"),
        (lambda rank: Chunk(10, 5 * rank, torch.ones(6)), r"overlap others, or the end"),
        (lambda rank: Chunk(10 + rank, 5 * rank, torch.ones(5)), "ranks disagree about the size or dtype of 'w'"),
        (lambda rank: Chunk(10, 5 * rank, torch.ones(5, 1)), "chunk 'w' must be 1-D"),
    ],
)
def test_only_one_owner_of_everything_is_saved(tmp_path, mine, message):
    def body():
        c = checkpointer(tmp_path)
        with pytest.raises(CheckpointError, match=message):
            c.save(1, {"w": mine(dist.get_rank())}, {})
        return c.latest()

    assert fork_ranks(2, body, timeout_s=60) == [None, None]


def test_one_rank_must_own_it_all(tmp_path):
    def body():
        with pytest.raises(CheckpointError, match="nobody has elements"):
            checkpointer(tmp_path).save(1, {"w": Chunk(10, 0, torch.ones(9))}, {})

    fork_ranks(1, body, timeout_s=60)


# ---------------------------------------------------------------- the folder


def present(folder):
    return sorted(p.name for p in folder.iterdir())


def test_keep_last_and_pointer(tmp_path):
    save_all(tmp_path, 2, steps=(1, 2, 3, 10, 11), keep_last=2)
    assert present(tmp_path) == ["latest", "step_00000010", "step_00000011"]
    assert (tmp_path / "latest").read_text() == "step_00000011\n"


def test_torn_saves_are_ignored_and_cleared(tmp_path):
    path = save_all(tmp_path, 2, steps=(1, 2))
    shutil.copytree(path, tmp_path / ".step_00000005.partial")  # all files there, but never renamed
    shutil.copytree(path, tmp_path / ".step_00000006.removed", ignore=shutil.ignore_patterns("manifest.json"))
    assert find_latest(tmp_path) == path
    (tmp_path / "latest").unlink()
    assert find_latest(tmp_path) == path
    save_all(tmp_path, 2, steps=(3,))
    assert present(tmp_path) == ["latest", "step_00000002", "step_00000003"]


def test_a_save_that_dies_leaves_the_last_checkpoint(tmp_path, monkeypatch):
    """Killed after everything but the rename: the step is not there, the older one is."""
    path = save_all(tmp_path, 2, steps=(1,))
    monkeypatch.setattr(folder_module, "commit", lambda *args: 1 / 0)

    def body():
        c = checkpointer(tmp_path)
        with pytest.raises(CheckpointError, match="ZeroDivisionError"):
            c.save(2, cut(2, dist.get_rank(), 0), {})
        return c.latest()

    assert fork_ranks(2, body, timeout_s=60) == [path, path]
    monkeypatch.undo()
    assert find_latest(save_all(tmp_path, 2, steps=(2,)).parent) == tmp_path / "step_00000002"


def test_pointer_to_nothing_falls_back_and_says_so(tmp_path, caplog):
    path = save_all(tmp_path, 1, steps=(1, 2))
    assert find_latest(tmp_path / "nowhere") is None and not caplog.records
    (tmp_path / "latest").write_text("step_00000009\n")
    assert find_latest(tmp_path) == path and "step_00000009" in caplog.text
    (tmp_path / "latest").unlink()
    assert find_latest(tmp_path) == path and "is missing" in caplog.text
    (tmp_path / "latest").write_text("../../etc\n")
    assert find_latest(tmp_path) == path


def test_going_back_to_an_older_checkpoint(tmp_path):
    """A run resumed at 10 although 20 and 30 exist: the pointer follows it, it replaces 20 when it comes there, and never removes 30."""
    save_all(tmp_path, 1, steps=(10, 20, 30), keep_last=3)
    before = read_full(tmp_path / "step_00000020", "counts")
    save_all(tmp_path, 2, steps=(15,), keep_last=3)
    assert find_latest(tmp_path).name == "step_00000015"
    path = save_all(tmp_path, 2, steps=(20,), keep_last=2, values=TENSORS | {"counts": -TENSORS["counts"]})
    assert torch.equal(read_full(path, "counts"), -before)
    assert present(tmp_path) == ["latest", "step_00000015", "step_00000020", "step_00000030"]
    assert find_latest(tmp_path) == path


def test_all_ranks_hear_the_first_ranks_answer(tmp_path):
    """A folder that only rank 0 can see as it is."""
    path = save_all(tmp_path, 1)

    def body():
        seen = tmp_path if dist.get_rank() == 0 else tmp_path / "stale"
        return checkpointer(seen).latest()

    assert fork_ranks(2, body, timeout_s=60) == [path, path]


def test_manifest_lists_every_file(good):
    manifest = json.loads((good / "manifest.json").read_text())
    assert sorted(manifest["sha256"]) == sorted(p.name for p in good.iterdir() if p.name != "manifest.json")


# ---------------------------------------------------------------- optimizers, layouts, engines

SHAPES = {"embed": (101, 36), "norm": (36,), "0.experts": (8, 20, 36), "1.experts": (8, 36, 10)}
OPTIM = OptimConfig(lr=0.0, moments="fp32")


def noise(text, shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(text.encode())))


def build(layout, engine, dtype, optim=OPTIM, muon=False):
    pp, edp, ep = layout
    rank, dp = dist.get_rank(), edp * ep
    dense = [dist.new_group(range(p * dp, (p + 1) * dp)) for p in range(pp)][rank // dp]
    groups = [[dist.new_group([p * dp + i * ep + e for i in range(edp)]) for e in range(ep)] for p in range(pp)]
    specs = []
    for name, shape in SHAPES.items():
        stage = int(name.startswith("1")) * (pp - 1)
        if stage == rank // dp:
            full, expert = noise(name, shape), "experts" in name
            local = full.chunk(ep)[rank % ep] if expert else full
            specs.append(
                Spec(
                    name=name,
                    param=nn.Parameter(local.to(dtype)),
                    group=groups[stage][rank % ep] if expert else dense,
                    numel=full.numel(),
                    offset=local.numel() * (rank % ep) if expert else 0,
                    decay=name != "norm",
                    matrices=(shape[1:],) if muon and expert else (),
                )
            )
    return make_optimizer(replace(optim, engine=engine), specs)


def train(optimizer, steps):
    norms = []
    for _ in range(steps):
        for s in optimizer.specs.values():
            if dist.get_rank(s.group) == 0:  # so that the sum is the same on any layout
                full = noise(f"{s.name} {optimizer.steps}", SHAPES[s.name]).view(-1)
                s.param.main_grad += full[s.offset : s.offset + s.param.numel()].view(s.param.shape) + 0.1 * s.param.detach().float()
        optimizer.reduce()
        norm = optimizer.norm(0.5)
        optimizer.step(norm, lr=1e-2)
        norms.append(norm.item())
    return norms


def job(folder, layout, engine, dtype, *, load=None, plan=(), **options):
    """Load the checkpoint numbered `load`; then for each (steps, number) train and save. The norms, and each rank's weights."""

    def body():
        optimizer, norms = build(layout, engine, dtype, **options), []
        c = checkpointer(folder, keep_last=99)
        if load is not None:
            optimizer.load_state(c.load(folder / f"step_{load:08d}", optimizer.state(), optional=may_lack)["steps"])
        for steps, number in plan:
            norms += train(optimizer, steps)
            c.save(number, optimizer.state(), {"steps": optimizer.steps})
        return norms, {s.name: (s.offset, s.param.detach().clone()) for s in optimizer.specs.values()}

    answers = fork_ranks(math.prod(layout), body, timeout_s=60)
    assert all(norms == answers[0][0] for norms, _ in answers)
    return answers[0][0], [weights for _, weights in answers]


@pytest.fixture(scope="module", autouse=True)
def deepspeed_in_parent():
    deepspeed_zero.preload()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_resharding_chain_is_bit_equal(tmp_path, dtype):
    job(tmp_path, (1, 2, 2), "deepspeed", dtype, plan=[(3, 0)])
    first = Archive(tmp_path / "step_00000000")
    chain = [("whole", (1, 1, 4)), ("whole", (1, 1, 1)), ("deepspeed", (1, 2, 1)), ("deepspeed", (2, 1, 2)), ("whole", (2, 2, 1)),
             ("deepspeed", (1, 1, 1)), ("whole", (1, 2, 2))]  # fmt: skip
    for i, (engine, layout) in enumerate(chain):
        _, weights = job(tmp_path, layout, engine, dtype, load=i, plan=[(0, i + 1)])
        again = Archive(tmp_path / f"step_{i + 1:08d}")
        assert again.names() == first.names() and again.extra == first.extra == {"steps": 3}
        assert all(torch.equal(again.read(n), first.read(n)) for n in first.names()), (engine, layout)
        for name, (offset, weight) in (item for rank in weights for item in rank.items()):
            master = first.read(f"{name}.master")[offset : offset + weight.numel()]
            assert torch.equal(weight.view(-1), master.to(dtype)), (engine, layout, name)


@pytest.mark.parametrize("layout, dtype", [((1, 2, 2), torch.float32), ((2, 1, 2), torch.bfloat16), ((1, 1, 1), torch.bfloat16)])
@pytest.mark.parametrize("engine", ["whole", "deepspeed"])
def test_resumed_is_uninterrupted(tmp_path, engine, layout, dtype):
    straight, weights = job(tmp_path, layout, engine, dtype, plan=[(3, 1), (3, 2)])
    resumed, weights_again = job(tmp_path, layout, engine, dtype, load=1, plan=[(3, 3)])
    assert resumed == straight[3:]
    one, other = Archive(tmp_path / "step_00000002"), Archive(tmp_path / "step_00000003")
    assert all(torch.equal(one.read(n), other.read(n)) for n in one.names()) and one.extra == other.extra == {"steps": 6}
    for mine, theirs in zip(weights, weights_again):
        assert all(torch.equal(w, theirs[n][1]) for n, (_, w) in mine.items())


def test_training_goes_on_the_same_on_another_layout(tmp_path):
    straight, _ = job(tmp_path, (1, 2, 2), "whole", torch.float32, plan=[(3, 1), (3, 2)])
    for engine, layout in (("deepspeed", (2, 1, 2)), ("whole", (1, 1, 1))):
        resumed, _ = job(tmp_path, layout, engine, torch.float32, load=1, plan=[(3, 3)])
        assert resumed == pytest.approx(straight[3:], rel=1e-6)


# ---------------------------------------------------------------- other algorithms, moments and averages


def same(folder, one, other, names=None):
    one, other = Archive(folder / f"step_{one:08d}"), Archive(folder / f"step_{other:08d}")
    assert names or one.names() == other.names()
    return [n for n in names or one.names() if not torch.equal(one.read(n), other.read(n))] == []


EVERYTHING = dict(optim=replace(OPTIM, moments="auto", ema_decay=0.9), muon=True)


@pytest.mark.parametrize("offload", [False, True])
def test_everything_resumes_and_reshards(tmp_path, offload):
    """Muon, BF16 moments and an average: a killed run ends where an unbroken one does; other layouts load what was saved."""
    options = EVERYTHING | {"optim": replace(EVERYTHING["optim"], offload=offload)}
    straight, _ = job(tmp_path, (1, 2, 2), "whole", torch.bfloat16, plan=[(3, 1), (3, 2)], **options)
    resumed, _ = job(tmp_path, (1, 2, 2), "whole", torch.bfloat16, load=1, plan=[(3, 3)], **options)
    assert resumed == straight[3:] and same(tmp_path, 2, 3)
    kinds = {n.split(".", 1)[1] if n[0] not in "01" else n.split(".")[2] for n in names(tmp_path / "step_00000002")}
    assert kinds == {"master", "exp_avg", "exp_avg_sq", "ema"}
    for number, layout in enumerate([(1, 1, 4), (2, 2, 1), (1, 1, 1), (1, 2, 2)], 4):
        job(tmp_path, layout, "whole", torch.bfloat16, load=number - 1, plan=[(0, number)], **options)
        assert same(tmp_path, 3, number), layout


def test_deepspeed_averages_and_offloads_too(tmp_path):
    options = dict(optim=replace(OPTIM, ema_decay=0.9, offload=True))
    job(tmp_path, (1, 2, 2), "deepspeed", torch.bfloat16, plan=[(3, 1), (3, 2)], **options)
    job(tmp_path, (1, 2, 2), "deepspeed", torch.bfloat16, load=1, plan=[(3, 3)], **options)
    assert same(tmp_path, 2, 3)
    job(tmp_path, (2, 2, 1), "whole", torch.bfloat16, load=3, plan=[(0, 4)], **options)
    assert same(tmp_path, 3, 4)


def test_moments_are_rounded_once_between_engines(tmp_path):
    """FP32 moments of `deepspeed` become BF16 ones of `whole`, to the nearest; back again nothing is lost."""
    job(tmp_path, (1, 2, 1), "deepspeed", torch.bfloat16, plan=[(3, 1)])
    job(tmp_path, (1, 1, 2), "whole", torch.bfloat16, load=1, plan=[(0, 2)], optim=replace(OPTIM, moments="auto"))
    job(tmp_path, (1, 2, 1), "deepspeed", torch.bfloat16, load=2, plan=[(0, 3)])
    fp32, bf16, again = (Archive(tmp_path / f"step_{n:08d}") for n in (1, 2, 3))
    for name in fp32.names():
        want = fp32.read(name) if name.endswith(".master") else fp32.read(name).bfloat16()
        assert torch.equal(bf16.read(name), want) and torch.equal(again.read(name), want.float()), name


def test_an_average_begins_where_it_is_first_wanted(tmp_path):
    """At the masters as loaded; then it is decay * average + (1 - decay) * master of each step. Who wants none may leave it behind."""
    averaged = dict(optim=replace(OPTIM, ema_decay=0.75))
    job(tmp_path, (1, 2, 1), "whole", torch.bfloat16, plan=[(2, 0)])
    job(tmp_path, (1, 1, 2), "whole", torch.bfloat16, load=0, plan=[(0, 1), (1, 2), (1, 3)], **averaged)
    at = [Archive(tmp_path / f"step_{n:08d}") for n in range(4)]
    for name in SHAPES:
        average = at[0].read(f"{name}.master")
        assert torch.equal(at[1].read(f"{name}.ema"), average)
        for archive in at[2:]:
            average = 0.75 * average + 0.25 * archive.read(f"{name}.master")
            assert torch.allclose(archive.read(f"{name}.ema"), average, rtol=1e-6, atol=1e-8)
    job(tmp_path, (1, 1, 1), "whole", torch.bfloat16, load=3, plan=[(0, 4)])
    assert same(tmp_path, 3, 4, at[0].names())


def test_a_run_that_changes_algorithm(tmp_path):
    """AdamW -> Muon -> AdamW. Muon goes on with the first moment; AdamW, which has no second, begins with neither."""
    rate, first = 1e-2, replace(OPTIM, weight_decay=0.0, clip=1e9)
    job(tmp_path, (1, 2, 1), "whole", torch.float32, plan=[(3, 0)], optim=first)
    job(tmp_path, (1, 2, 1), "whole", torch.float32, load=0, plan=[(0, 1), (3, 2)], optim=first, muon=True)
    job(tmp_path, (1, 2, 1), "whole", torch.float32, load=2, plan=[(0, 3), (1, 4)], optim=first)
    at = [Archive(tmp_path / f"step_{n:08d}") for n in range(5)]
    assert torch.equal(at[0].read("0.experts.exp_avg"), at[1].read("0.experts.exp_avg"))
    assert "0.experts.exp_avg_sq" not in at[1].names() and "embed.exp_avg_sq" in at[1].names()
    assert torch.equal(at[2].read("embed.exp_avg"), at[3].read("embed.exp_avg"))
    for key in ("exp_avg", "exp_avg_sq"):
        assert not at[3].read(f"0.experts.{key}").any()
    assert at[2].read("0.experts.exp_avg").any()
    longest = (at[4].read("0.experts.master") - at[3].read("0.experts.master")).abs().max()
    assert 0 < longest <= 1.2 * rate
