"""A folder of checkpoints: what is in it, which one a run goes on from, and how one comes, goes, or is set aside. For one process.

latest                      name of the one to go on from, moved by os.replace after everything in it is on the disk
step_00000100/              has got this name after its manifest was flushed and read back
    manifest.json  .metadata  __<rank>_0.distcp
step_00000050.damaged/      was found to be; nothing of ours reads or removes it again. `damaged.txt` in it says why
.step_00000200.partial/     a save that is under way, or was cut short
.step_00000100.replaced/    one that a newer one of the same step is about to take the place of
.step_00000001.removed/     one that is about to be removed
.latest                     what `latest` is about to be
"""

import contextlib
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

from ...conf import files
from .files import flush_folder, write_durably
from .manifest import CheckpointError, DamagedError, read_manifest, verify_all

log = logging.getLogger(__name__)

LATEST, NEXT = "latest", ".latest"
PARTIAL, REPLACED, REMOVED, DAMAGED = ".partial", ".replaced", ".removed", ".damaged"
WHY = "damaged.txt"
NAME = re.compile(r"step_([0-9]{8,15})")


def name_of(step: int) -> str:
    return f"step_{step:08d}"


def step_of(checkpoint: Path) -> int:
    return int(NAME.fullmatch(checkpoint.name)[1])


# ---------------------------------------------------------------- what is there


def checkpoints(folder: Path) -> list[Path]:
    """Those that were complete once, lowest step first; whether they still are is for `manifest.py` to say."""
    found = [p for p in folder.iterdir() if NAME.fullmatch(p.name) and not p.is_symlink()] if folder.is_dir() else []
    return sorted(found, key=step_of)


def candidates(folder: Path) -> list[Path]:
    """Checkpoints in the order in which a run would go on from them: the one that `latest` names, then those before it, newest first;
    last those of higher steps, which belong to a branch that the run has left."""
    found = checkpoints(folder)[::-1]
    pointed = _pointed(folder)
    if pointed is None:
        return found
    return sorted(found, key=lambda p: (step_of(p) > step_of(pointed), -step_of(p)))


def _pointed(folder: Path) -> Path | None:
    """What `latest` says, whether that is there or not; or what it was about to say: a commit that was cut short is done but for it."""
    for pointer in (folder / NEXT, folder / LATEST):
        name = _said(pointer)
        if NAME.fullmatch(name) and (pointer.name == LATEST or (folder / name).is_dir()):
            return folder / name
    return None


def _said(pointer: Path) -> str:
    """What a pointer says; "" where there is none, or a link or a pipe in its place."""
    try:
        return files.read(pointer, 64).decode(errors="replace").strip()
    except (FileNotFoundError, files.UnsafeFile):
        return ""


def refuse_link(path: Path) -> None:
    """CheckpointError where a checkpoint, or a run's folder of them, is a link: what it leads to is somebody else's, and may change."""
    if path.is_symlink():
        rule = "is a symbolic link: put the checkpoint itself there, or remove the link" if NAME.fullmatch(path.name) else (
            "is a symbolic link: let the run directory itself be the link, or set run_dir")  # fmt: skip
        raise CheckpointError(f"{path} {rule}")


def refuse_links(folder: Path) -> None:
    """Likewise, of all in a folder of checkpoints."""
    for entry in sorted(folder.iterdir()) if folder.is_dir() else ():
        if NAME.fullmatch(entry.name):
            refuse_link(entry)


def find_latest(folder: Path) -> Path | None:
    """The first of `candidates`; told where it is not the one that `latest` names. CheckpointError for one that is a link."""
    refuse_links(folder)
    pointed, found = _pointed(folder), next(iter(candidates(folder)), None)
    if found is not None and found != pointed:
        said = "is missing, or names no checkpoint" if pointed is None else f"names {pointed.name}, which is not there"
        log.warning("%s %s: taking %s", folder / LATEST, said, found.name)
    return found


def newest_valid(folder: Path, *, but: Path | None = None) -> Path | None:
    """The first candidate of which every file is as it was written. Reads them all."""
    for path in candidates(folder):
        try:
            if path != but and verify_all(path):
                return path
        except CheckpointError:
            continue
    return None


def check_lost(folder: Path) -> None:
    """For a run that finds no checkpoint: CheckpointError unless there has never been one."""
    damaged = [p.name for p in folder.glob(f"*{DAMAGED}*")] if folder.is_dir() else []
    if not damaged and not (folder / LATEST).exists():
        return
    had = f"only {', '.join(sorted(damaged))}" if damaged else f"nothing but {LATEST}, of a checkpoint that is gone"
    raise CheckpointError(
        f"{folder} holds {had}: no checkpoint is left to go on from, and a run that has had some is not begun anew unasked. Put an intact "
        "copy of one there (under its own name, such as step_00000100); or begin anew, with another `name`, or after removing the folder"
    )


def torn(folder: Path) -> list[Path]:
    """Saves that were cut short."""
    return sorted(folder.glob(f".*{PARTIAL}")) if folder.is_dir() else []


# ---------------------------------------------------------------- coming and going


def prepare(unfinished: Path) -> None:
    """An empty folder to write into; leftovers of saves that were cut short go."""
    refuse_link(unfinished.parent)
    unfinished.parent.mkdir(parents=True, exist_ok=True)
    for left in torn(unfinished.parent):
        files.remove_tree(left)
    unfinished.mkdir()


def commit(unfinished: Path, final: Path, keep_last: int) -> None:
    """Give a flushed checkpoint its name, point `latest` at it, then remove what is too old.

    Cut short anywhere, it leaves the old ones, or the new one as the one to go on from.
    """
    folder = final.parent
    if final.exists():  # a run that went back to an older checkpoint has come to this step again
        os.rename(final, folder / f".{final.name}{REPLACED}")
    write_durably(folder / NEXT, final.name + "\n")
    os.rename(unfinished, final)
    flush_folder(folder)
    os.replace(folder / NEXT, folder / LATEST)
    flush_folder(folder)
    for gone in (*folder.glob(f".*{REPLACED}"), *folder.glob(f".*{REMOVED}")):
        with contextlib.suppress(OSError):
            files.remove_tree(gone)
    # Higher steps belong to a branch that this run has left: they are not its history, and not for it to remove.
    for old in [found for found in checkpoints(folder) if step_of(found) <= step_of(final)][:-keep_last]:
        remove(old)


def mend(folder: Path) -> None:
    """What a commit that was cut short has left half done: finished where it could be, else undone."""
    refuse_link(folder)
    if os.path.lexists(folder / NEXT):
        pointed = _pointed(folder)
        if pointed and pointed.is_dir() and _said(folder / NEXT) == pointed.name:
            os.replace(folder / NEXT, folder / LATEST)
        else:
            (folder / NEXT).unlink()
        flush_folder(folder)
    for replaced in folder.glob(f".*{REPLACED}"):
        final = folder / replaced.name[1 : -len(REPLACED)]
        if not final.exists():
            os.rename(replaced, final)


def abandon(unfinished: Path) -> None:
    """A save has failed: its files go, and the folder is as it was. Failing to remove them must not fail the run."""
    try:
        if unfinished.exists():
            files.remove_tree(unfinished)
        mend(unfinished.parent)
    except OSError as error:
        log.warning("%s could not be removed (%s): remove it yourself", unfinished, error)


def remove(checkpoint: Path) -> None:
    """It loses its name first: a removal that is cut short leaves no checkpoint. Failing to remove must not fail the run."""
    try:
        going = checkpoint.with_name(f".{checkpoint.name}{REMOVED}")
        os.rename(checkpoint, going)
        flush_folder(checkpoint.parent)
        files.remove_tree(going)
    except OSError as error:
        log.warning("%s could not be removed (%s): remove it yourself", checkpoint, error)


def quarantine(damage: DamagedError) -> Path:
    """Give a damaged checkpoint a name that says so, with the reason in it, and point `latest` at the next candidate. Raises OSError."""
    folder, name = damage.checkpoint.parent, damage.checkpoint.name + DAMAGED
    aside = next(p for p in _numbered(folder / name) if not p.exists())
    write_durably(damage.checkpoint / WHY, f"{damage}\n")
    os.rename(damage.checkpoint, aside)
    flush_folder(folder)
    if left := candidates(folder):
        write_durably(folder / NEXT, left[0].name + "\n")
        os.replace(folder / NEXT, folder / LATEST)
        flush_folder(folder)
    return aside


def _numbered(path: Path) -> Iterator[Path]:
    yield path
    number = 2
    while True:
        yield path.with_name(f"{path.name}-{number}")
        number += 1


def complete(folder: Path) -> list[Path]:
    """Checkpoints with a whole manifest, in the order of `candidates`: what can be told without reading everything."""
    return [path for path in candidates(folder) if _has_manifest(path)]


def _has_manifest(path: Path) -> bool:
    try:
        return bool(read_manifest(path))
    except CheckpointError:
        return False
