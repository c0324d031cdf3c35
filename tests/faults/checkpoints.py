"""Trials of small checkpoints under faults, as many as asked for: kills in the middle of a save, bits that flip.

Prints them all: `python -m shoestring.tests.faults.checkpoints` (a minute).
"""

import random
import shutil
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from shoestring.launch.local import RankFailed, fork_ranks
from shoestring.parallel.optimizer.zero import Chunk
from shoestring.train.checkpoint.checkpointer import Checkpointer
from shoestring.train.checkpoint.folder import check_lost, find_latest, mend
from shoestring.train.checkpoint.manifest import DamagedError

from . import storage
from .storage import kill_at, touches, touching

SIZES = {"w.master": 3001, "counts": 7}


def values(step):
    """What the checkpoint of a step holds."""
    generator = torch.Generator().manual_seed(step)
    return {name: torch.randn(size, generator=generator) for name, size in SIZES.items()}


def save(folder, step, keep_last=2, group=None):
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    chunks = {}
    for name, tensor in values(step).items():
        low, high = (len(tensor) * r // world for r in (rank, rank + 1))
        chunks[name] = Chunk(len(tensor), low, tensor[low:high].clone())
    Checkpointer(folder, keep_last=keep_last, async_save=False, group=group).save(step, chunks, {"step": step})


def resumed(folder):
    """The step that a session would go on from, and how many checkpoints it has set aside; as `train/trainer.py` does it."""
    checkpointer, aside = Checkpointer(folder, keep_last=2, async_save=False), 0
    mend(folder)
    while (start := find_latest(folder)) is not None:
        chunks = {name: Chunk(size, 0, torch.zeros(size)) for name, size in SIZES.items()}
        try:
            step = checkpointer.load(start, chunks)["step"]
        except DamagedError as damage:
            assert not any(c.data.any() for c in chunks.values()), "a damaged checkpoint was copied from"
            checkpointer.set_aside(damage)
            aside += 1
            continue
        assert all(torch.equal(chunks[name].data, tensor) for name, tensor in values(step).items()), f"step {step} is not what was saved"
        return step, aside
    check_lost(folder)
    return None, aside


def copied(folder, to):
    shutil.rmtree(to, ignore_errors=True)
    return Path(shutil.copytree(folder, to))


def left(folder):
    return sorted(p.name for p in folder.iterdir())


def kills_of_one_rank(place: Path, count: int, seed: int = 0) -> list[tuple[str, int, int]]:
    """One of two ranks is killed at a random touch of the disk, of its own, while steps 1 and 2 are there and 3 is saved, `count` times:
    (where, the newest step that is whole, the step that a run goes on from)."""
    before = place / "before"
    _on_two_ranks(lambda group: [save(before, step, group=group) for step in (1, 2)])
    folder = copied(before, place / "run")
    counted = _on_two_ranks(lambda group: len(touches(lambda: save(folder, 3, group=group))))
    rng, trials = random.Random(seed), []
    for trial in range(count):
        folder, victim = copied(before, place / "run"), rng.randrange(2)
        number = rng.randrange(counted[victim])

        def body(group, folder=folder, victim=victim, number=number, trial=trial):
            with touching(kill_at(number, trial) if dist.get_rank() == victim else lambda touch: None):
                save(folder, 3, group=group)

        try:
            _on_two_ranks(body)
            raise AssertionError(f"rank {victim} outlived touch {number}")
        except RankFailed:
            newest = 3 if (folder / "step_00000003").exists() else 2
            trials.append((f"rank {victim}, touch {number} of {counted[victim]}", newest, resumed(folder)[0]))
    return trials


def _on_two_ranks(body) -> list:
    return fork_ranks(2, lambda: body(dist.new_group(backend="gloo")), timeout_s=60)


def flips_of_one_bit(checkpoint: Path, count: int, opened: list | None = None) -> list[tuple[str, str, list]]:
    """`count` times: (the file that was hit, the one that the refusal names, what `opened` had grown by until then)."""
    flips, opened = [], [] if opened is None else opened
    whole = {path: path.read_bytes() for path in checkpoint.iterdir()}
    for seed in range(count):
        opened.clear()
        hit, refused = storage.flip_bit(checkpoint, seed), ""
        chunks = {name: Chunk(size, 0, torch.zeros(size)) for name, size in SIZES.items()}
        try:
            Checkpointer(checkpoint.parent, keep_last=2, async_save=False).load(checkpoint, chunks)
        except DamagedError as error:
            refused = error.file
        assert not any(chunk.data.any() for chunk in chunks.values()), "something was copied"
        flips.append((hit, refused, list(opened)))
        for path, data in whole.items():
            path.write_bytes(data)
    return flips


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        kills = kills_of_one_rank(Path(folder), 50)
        for where, newest, step in kills:
            print(f"killed {where}: newest whole {newest}, went on from {step}")
        flips = flips_of_one_bit(Path(folder) / "before" / "step_00000002", 200)
    right = sum(newest == step for _, newest, step in kills)
    print(f"{right} of {len(kills)} kills: gone on from the newest whole checkpoint")
    print(f"{sum(hit == refused for hit, refused, _ in flips)} of {len(flips)} flipped bits: refused, by the name of the file")


if __name__ == "__main__":
    main()
