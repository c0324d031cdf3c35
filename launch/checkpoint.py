"""`shoestring checkpoint list|verify|sign|prune`: what a run has saved, whether it is as it was written, who vouches for it, and what of it
may go."""

import time
from collections.abc import Sequence
from pathlib import Path

from ..conf import files
from ..conf.errors import ConfigError
from ..train.checkpoint import folder as folders
from ..train.checkpoint import signature
from ..train.checkpoint.manifest import MANIFEST, CheckpointError, DamagedError, read_manifest, verify_all
from ..train.checkpoint.signature import signer
from . import exit_codes
from .overview.table import printable


def show(source: Path) -> None:
    """A line for each: of complete ones what their manifests say, and whether all files are there and of the right size."""
    folder, chosen = _find(source)
    pointed = next(iter(folders.candidates(folder)), None)
    rows = [("step", "saved", "size", "layout", "precision", "state")]
    for path in chosen:
        rows.append((str(folders.step_of(path)), *_about(path, path == pointed)))
    for path in (*sorted(folder.glob(f"*{folders.DAMAGED}*")), *folders.torn(folder)):
        state = "set aside: damaged" if folders.DAMAGED in path.name else "cut short, or being written"
        rows.append((path.name, _when(path), _size(path), "", "", state))
    rows = [tuple(map(printable, row)) for row in rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.rjust(w) if i == 2 else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip())
    if len(rows) == 1:
        print(f"{folder}: none yet")


def verify(source: Path, *, every: bool = False, quarantine: bool = False, signers: str = "") -> int:
    """Read and hash every file of the checkpoint to go on from, or of all; a line for each; the exit code. With `signers`, each must be
    signed by one of them."""
    folder, chosen = _find(source)
    if not every and len(chosen) > 1:
        chosen = folders.candidates(folder)[:1]
    if not chosen:
        raise CheckpointError(f"{folder}: holds no checkpoint")
    code = exit_codes.OK
    for path in chosen:
        began = time.monotonic()
        try:
            manifest = verify_all(path)
            by = f", signed by {printable(signer(path, signers, files.read(path / MANIFEST)))}" if signers else ""
            print(f"{path.name}  whole: {len(manifest.sha256)} files, {_size(path)}, {time.monotonic() - began:.1f} s{by}", flush=True)
        except CheckpointError as error:
            code = exit_codes.STORAGE
            print(f"{path.name}  DAMAGED: {error}" if isinstance(error, DamagedError) else f"{path.name}  not read: {error}", flush=True)
            if quarantine and isinstance(error, DamagedError):
                print(f"  it is now {folders.quarantine(error).name}", flush=True)
    return code


def sign(source: Path, *, key: str) -> None:
    """The checkpoint to go on from, once every file is found to be as it was written; the file that it is in."""
    folder, chosen = _find(source)
    chosen = chosen if len(chosen) < 2 else folders.candidates(folder)[:1]
    if not chosen:
        raise CheckpointError(f"{folder}: holds no checkpoint")
    print(signature.sign(chosen[0], key))


def prune(source: Path, words: Sequence[str], *, dry_run: bool = False) -> None:
    """Remove all but the `keep=N` that a run would go on from first, and the first of them that is whole, which is read for that."""
    keep = _keep(words)
    folder, _ = _find(source)
    found = folders.candidates(folder)
    valid = folders.newest_valid(folder)
    if valid is None:
        raise CheckpointError(f"{folder}: no checkpoint there is whole, so none is removed")
    going = [path for i, path in enumerate(found) if i >= keep and path != valid]
    for path in going:
        size = _size(path)
        if not dry_run:
            folders.remove(path)
        print(f"{'would remove' if dry_run else 'removed'} {path.name}, {size}")
    print(f"{len(found) - len(going)} kept; the newest that is whole: {valid.name}")


def _find(source: Path) -> tuple[Path, list[Path]]:
    """The folder of checkpoints of a run directory, that folder itself, or that of one checkpoint; and those that are meant."""
    if folders.NAME.fullmatch(source.name):
        folders.refuse_link(source)
        if source.is_dir():
            return source.parent, [source]
    elif source.is_dir():
        folder = source / "checkpoints" if (source / "checkpoints").is_dir() else source
        folders.refuse_link(folder) if folder != source else None
        folders.refuse_links(folder)
        return folder, folders.checkpoints(folder)
    raise ConfigError("RUN_OR_FOLDER", str(source), "must be a run directory, its folder checkpoints/, or one checkpoint in that")


def _keep(words: Sequence[str]) -> int:
    key, _, value = words[0].partition("=") if len(words) == 1 else ("", "", "")
    if key != "keep" or not value.isdecimal() or int(value) < 1:
        raise ConfigError("prune", " ".join(words), "wants keep=N, of at least 1", "keep=2")
    return int(value)


def _about(path: Path, pointed: bool) -> tuple[str, ...]:
    extra: dict = {}
    try:
        extra = read_manifest(path).extra
        verify_all(path, hashed=False)
        state = "complete"
    except CheckpointError as error:
        state = f"damaged: {error}" if isinstance(error, DamagedError) else f"not read: {error}"
    layout, precision = (printable(str(extra.get(name, "?")))[:60] for name in ("layout", "precision"))
    return _when(path), _size(path), layout, precision, state + (", latest" if pointed else "")


def _when(path: Path) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(path.stat().st_mtime))


def _size(path: Path) -> str:
    size = float(sum(p.stat().st_size for p in path.iterdir()))
    for unit in ("B", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
