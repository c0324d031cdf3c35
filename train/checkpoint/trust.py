"""Whose a checkpoint is: ours, or somebody else's, which is taken only where the user has said so of these very bytes.

Ours is what belongs to the user who runs, or to root, folder and files, and can be written by nobody else; a group that only this user is
in may write it. (Git's `safe.directory` goes by the owner likewise.) Anything else must be signed by one of `signers`, or named in `words`:
by the first digits of a SHA-256, not by its path, so that another one in the same place is refused again. With `signers`, what comes from
elsewhere must be signed whoever has it: a copy of somebody's checkpoint belongs to who has copied it.

What is trusted are numbers and settings. Nothing in a checkpoint is ever run, whoever made it.
"""

import grp
import hashlib
import os
import pwd
import re
import shlex
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ...conf import files
from . import signature
from .files import digest
from .manifest import MANIFEST, CheckpointError

DIGITS = 16
_TAKEN = "its weights, settings and tokenizer would be taken as data; nothing in it is ever run"


@dataclass(frozen=True, kw_only=True)
class Trust:
    """What the user has said. `words`: of checkpoints, such as a refusal names them; `signers`: a file, "" for none; `how`: the setting or
    option by which a word is given, with a place for it."""

    words: tuple[str, ...] = ()
    signers: str = ""
    how: str = "--trust {}"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """`ours`, or why it is trusted all the same, as a sentence for the log."""

    ours: bool
    told: str = ""


OURS = Verdict(ours=True)


def of_checkpoint(checkpoint: Path, trust: Trust, *beside: Path) -> Verdict:
    """Of a checkpoint that is not the run's own, and of files `beside` it that are taken along. Raises CheckpointError where it may not be
    taken: it says whose it is, what trusting it would mean, and how to."""
    checkpoint = checkpoint.resolve()
    _check_regular([checkpoint / MANIFEST, *beside])
    try:
        manifest = files.read(checkpoint / MANIFEST)
    except OSError:
        return OURS  # nothing to be taken: who reads it says what is missing
    if trust.signers:
        name = signature.signer(checkpoint, trust.signers, manifest)
        return Verdict(ours=False, told=f"{checkpoint} is signed by {name}, as {trust.signers} allows")
    if not (whose := foreign([checkpoint, *_inside(checkpoint), *beside])):
        return OURS
    return _by_word(checkpoint, whose, hashlib.sha256(manifest).hexdigest(), trust)


def of_folder(folder: Path, trust: Trust, taken: Iterable[str]) -> Verdict:
    """Of a Hugging Face folder, of which the files that match the patterns `taken` are read. There is no manifest: of one that is not ours
    every byte is hashed. Files may be links, as in the Hub's own cache; then they are whose their target is."""
    found = sorted({path for pattern in taken for path in folder.glob(pattern)})
    _check_regular(found, follow=True)
    if not (whose := foreign([folder, *found], follow=True)):
        return OURS
    listed = "".join(f"{path.name}\0{digest(path.resolve())}\n" for path in found)
    return _by_word(folder, whose, hashlib.sha256(listed.encode()).hexdigest(), trust)


def foreign(paths: Iterable[Path], *, follow: bool = False) -> str:
    """The first of the paths that is not ours, as "PATH belongs to ..."; "" where all are."""
    me = os.geteuid()
    for path in paths:
        try:
            found = status(path, follow)
        except FileNotFoundError:
            continue
        if found.st_uid not in (me, 0):  # root can do whatever this user can
            return f"{path} belongs to {_user(found.st_uid)}, and {_user(me)} runs this"
        if stat.S_ISLNK(found.st_mode):
            continue
        if found.st_mode & stat.S_IWOTH:
            return f"{path} may be written by everybody"
        if found.st_mode & stat.S_IWGRP and not _private(found.st_gid, me):
            return f"{path} may be written by the group {_group(found.st_gid)}"
    return ""


def status(path: Path, follow: bool) -> os.stat_result:
    return os.stat(path) if follow else os.lstat(path)


def check_tokenizer(checkpoint: Path, said: str | None, found: str, verdict: Verdict) -> None:
    """CheckpointError where a checkpoint that is trusted by its bytes has another tokenizer beside it than its manifest names (`said`: its
    fingerprint)."""
    if not verdict.ours and said != found:
        raise CheckpointError(f"{checkpoint} is trusted by its manifest, and tokenizer.json beside it is not the one that this names")


def _by_word(path: Path, whose: str, sha256: str, trust: Trust) -> Verdict:
    if any(len(word) >= DIGITS and sha256.startswith(word.lower()) for word in trust.words):
        return Verdict(ours=False, told=f"{path} is trusted, as {trust.how.format(sha256[:DIGITS])} says: its weights, settings and "
                       "tokenizer are taken as data")  # fmt: skip
    said = trust.how.format(_word(sha256[:DIGITS]) if "=" in trust.how else sha256[:DIGITS])
    said = shlex.quote(said) if '"' in said else said
    raise CheckpointError(f"{path} is not yours ({whose}): {_TAKEN}; if you trust who made it, say {said}")


def _word(digits: str) -> str:
    """As Hydra takes it for text: some hexadecimal digits are a number to it."""
    return f'"{digits}"' if re.fullmatch(r"\d+(e\d+)?", digits) else digits


def _inside(checkpoint: Path) -> list[Path]:
    try:
        return sorted(checkpoint.iterdir())
    except OSError:
        return []


def _check_regular(paths: Iterable[Path], *, follow: bool = False) -> None:
    for path in paths:
        try:
            files.refuse_special(path, follow=follow)
        except files.UnsafeFile as error:
            raise CheckpointError(f"{error}: nothing is read from it") from None


def _private(gid: int, uid: int) -> bool:
    """Whether the group is this user's own: of the same name, with nobody else in it. So files are under umask 002 on most systems."""
    try:
        user, group = pwd.getpwuid(uid), grp.getgrgid(gid)
    except KeyError:
        return False
    return group.gr_gid == user.pw_gid and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}


def _user(uid: int) -> str:
    try:
        return f"{pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:
        return f"uid {uid}"


def _group(gid: int) -> str:
    try:
        return grp.getgrgid(gid).gr_name
    except KeyError:
        return f"{gid}"
