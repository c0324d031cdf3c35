"""Whatever cuts a save short, and wherever, the run goes on from the newest checkpoint that is whole; and no damage is ever read."""

import errno
import os
import shutil
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from shoestring.launch.local import fork_ranks
from shoestring.train.checkpoint import storage as storage_module
from shoestring.train.checkpoint.checkpointer import Archive, NoRoomError, SaveError
from shoestring.train.checkpoint.folder import checkpoints
from shoestring.train.checkpoint.manifest import DamagedError, verify_all

from . import storage
from .checkpoints import copied, flips_of_one_bit, kills_of_one_rank, left, resumed, save
from .storage import PowerCut, chosen, fail_at, flip_bit_of, free_space, full_after, in_fork, kill_at, touches, touching


@pytest.fixture
def place():
    """A folder in memory, where there is one: disks take their time to flush, and nothing here depends on them."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A folder with steps 1 and 2, of one process."""
    folder = tmp_path_factory.mktemp("two")
    save(folder, 1), save(folder, 2)
    return folder


# ---------------------------------------------------------------- cut short


@pytest.mark.parametrize("cut", [kill_at, PowerCut])
def test_cut_short_at_every_touch_of_the_disk(two, place, cut):
    """At each write (after some of its bytes), flush, rename and removal in turn."""
    folder = copied(two, place / "count")
    found = touches(lambda: save(folder, 3))
    assert {t.kind for t in found} == {"write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir"}
    assert left(folder) == ["latest", "step_00000002", "step_00000003"]
    for number in chosen(found):
        folder = copied(two, place / "run")

        def body(folder=folder, number=number):
            with touching(cut(number, seed=number)):
                save(folder, 3)

        assert in_fork(body) == -9
        step, aside = resumed(folder)
        assert (step, aside) == (3 if (folder / "step_00000003").exists() else 2, 0), f"cut at touch {number}"
        assert all(verify_all(path) for path in checkpoints(folder)), f"a half removed one after a cut at touch {number}"
        save(folder, step + 1)
        assert resumed(folder) == (step + 1, 0)
        assert left(folder) == ["latest", f"step_{step:08d}", f"step_{step + 1:08d}"], f"left after touch {number}"


# Of a power cut between two renames, these seeds undo neither, the last, both and the first.
@pytest.mark.parametrize("cut, seeds", [(kill_at, [0]), (PowerCut, [0, 1, 4, 10])])
def test_cut_short_in_the_first_save(place, cut, seeds):
    """Then there is no checkpoint, and never was: the run begins anew. Or there is the whole of one."""
    steps = []
    for number in chosen(touches(lambda: save(place / "count", 1)), writes=4):
        for seed in seeds:
            folder = place / "run"
            shutil.rmtree(folder, ignore_errors=True)

            def body(folder=folder, number=number, seed=seed):
                with touching(cut(number, seed=seed)):
                    save(folder, 1)

            assert in_fork(body) == -9
            steps.append(resumed(folder)[0])
    assert set(steps) == {None, 1} and (cut is PowerCut or steps == sorted(steps, key=lambda step: step or 0))


def test_cut_short_where_another_branch_was(place):
    """Steps 4 and 5 are of a branch that was left at 3. Saving 4 again never leads back to it."""
    before = place / "before"
    for step in (4, 5, 3):
        save(before, step, keep_last=9)
    (before / "step_00000004" / "counts").touch()  # the old 4 can be told from the new
    folder = copied(before, place / "count")
    for number in chosen(touches(partial(save, folder, 4)), writes=3):
        folder = copied(before, place / "run")

        def body(folder=folder, number=number):
            with touching(kill_at(number, seed=number)):
                save(folder, 4)

        assert in_fork(body) == -9
        is_new = (folder / "step_00000004").exists() and not (folder / "step_00000004" / "counts").exists()
        assert resumed(folder) == (4 if is_new else 3, 0), f"cut at touch {number}"


def test_one_rank_of_two_is_killed(two, place):
    assert all(newest == went_on_from for _, newest, went_on_from in kills_of_one_rank(place, 4))


# ---------------------------------------------------------------- damaged


def test_every_flipped_bit_is_refused_before_unpickling(two, place, monkeypatch):
    """200 of them, over all files of a checkpoint. What damage is in is neither unpickled nor given to torch.load."""
    opened = []
    unpickle, load = storage_module.unpickle_metadata, torch.load
    monkeypatch.setattr(storage_module, "unpickle_metadata", lambda data: opened.append(".metadata") or unpickle(data))
    monkeypatch.setattr(torch, "load", lambda *args, **kwargs: opened.append("data") or load(*args, **kwargs))
    folder = copied(two, place / "run")
    assert resumed(folder) == (2, 0) and set(opened) == {".metadata", "data"}
    flips = flips_of_one_bit(folder / "step_00000002", 200, opened)
    assert all(refused == hit and was_opened == [".metadata"] * hit.endswith(".distcp") for hit, refused, was_opened in flips)
    assert {hit for hit, *_ in flips} == {"manifest.json", ".metadata", "__0_0.distcp"}


@pytest.mark.parametrize("kind", [kind for kind in storage.DAMAGES if kind != "files swapped"])
def test_the_newest_whole_one_is_taken(two, place, kind):
    for seed in range(8):
        folder = copied(two, place / "run")
        file = storage.DAMAGES[kind](folder / "step_00000002", seed)
        with pytest.raises(DamagedError, match=r"nearest valid one: \S*step_00000001$"):
            archive = Archive(folder / "step_00000002")
            for name in archive.names():
                archive.read(name)
        assert resumed(folder) == (1, 1)
        assert left(folder) == ["latest", "step_00000001", "step_00000002.damaged"] and (folder / "latest").read_text() == "step_00000001\n"
        assert file in (folder / "step_00000002.damaged" / "damaged.txt").read_text()


# ---------------------------------------------------------------- full, or failing


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EACCES])
def test_failing_at_every_touch_of_the_disk(two, place, code):
    """The save fails or succeeds, and says which; nothing of it is left over; the next one succeeds."""
    folder, failed = copied(two, place / "count"), 0
    numbers = chosen(touches(lambda: save(folder, 3)), writes=4)
    for number in numbers:
        folder = copied(two, place / "run")
        try:
            with touching(fail_at(number, code)):
                save(folder, 3)
        except SaveError as error:
            failed += 1
            assert "the checkpoint of step 3 was not written" in str(error) and errno.errorcode[code] and f"[Errno {code}]" in str(error)
            assert not list(folder.glob(".*.partial"))
        step, aside = resumed(folder)
        assert aside == 0 and step == (3 if (folder / "step_00000003").exists() else 2)
        save(folder, 4)
        assert resumed(folder) == (4, 0)
    assert failed > len(numbers) / 2  # the others are of files that go, which may stay


@pytest.mark.parametrize("room", [0, 1, 5000])
def test_a_disk_that_is_full_on_one_rank(two, place, room):
    folder = copied(two, place / "run")

    def body():
        group = dist.new_group(backend="gloo")
        dist.barrier()
        with touching(full_after(room if dist.get_rank() == 1 else 1 << 30)), pytest.raises(SaveError, match=r"rank 1: .*No space left"):
            save(folder, 3, group=group)
        dist.barrier()
        assert left(folder) == left(two)
        save(folder, 3, group=group)

    fork_ranks(2, body, timeout_s=30)
    assert resumed(folder) == (3, 0)


def test_no_room_is_found_before_anything_is_written(two, place):
    folder = copied(two, place / "run")
    touched = []
    with free_space(1 << 20), touching(touched.append), pytest.raises(NoRoomError, match=r"needs 0\.017 GB, has 0\.001 GB at \S*run"):
        save(folder, 3)
    assert [t for t in touched if t.kind in ("write", "mkdir")] == [] and left(folder) == left(two)


def test_a_disk_that_gives_back_other_bytes(two, place):
    """Found as soon as it is written; older ones are kept, and the save is no checkpoint."""

    def lie(touch):
        if touch.kind == "fsync" and touch.path.endswith(".distcp"):
            flip_bit_of(Path(touch.path), 0)

    folder = copied(two, place / "run")
    with touching(lie), pytest.raises(SaveError, match=r"__0_0\.distcp reads back other than it was written"):
        save(folder, 3)
    assert left(folder) == left(two)
