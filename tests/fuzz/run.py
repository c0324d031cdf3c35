"""Fuzzing of one target: mutate, read, judge; inputs that reach new lines of ours are kept to go on from.

Each target runs in a process of its own, with as much memory as is bearable, from which nothing may run, connect or write elsewhere.
"""

import contextlib
import hashlib
import logging
import multiprocessing as mp
import os
import random
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from shoestring.launch import exit_codes

from .mutate import mutated
from .targets import Target
from .watch import Escaped, Slow, limit_memory, watched

OURS = str(Path(__file__).resolve().parents[2]) + os.sep
_TESTS = str(Path(__file__).resolve().parents[1]) + os.sep
_SENTENCE = 2100  # characters of one that a person reads
_MINIMISE = 60  # tries to make an input that fails smaller
MOST_FINDINGS = 8  # of a target, each of another kind


@dataclass(frozen=True, kw_only=True)
class Finding:
    """`kind`: what sets it apart from others, such as an error's class and the line that raised it."""

    target: str
    kind: str
    what: str
    data: bytes


@dataclass(frozen=True, kw_only=True)
class Fuzzed:
    target: str
    runs: int
    refused: int  # of those, in one sentence
    kept: int
    lines: int  # of ours that were reached; 0 where that was not followed
    findings: tuple[Finding, ...]


def fuzz(target: Target, seconds: float, seed: int) -> Fuzzed:
    """For so long, in a process of its own, which is ended if it does not come back."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
        found = _apart(lambda: _fuzz(target, seconds, seed, Path(folder)), seconds + 60)
        if isinstance(found, Fuzzed):
            return found
        data = (Path(folder) / target.file).read_bytes() if (Path(folder) / target.file).is_file() else b""
        died = Finding(target=target.name, kind=f"ended: {found}", what=f"the process has ended: {found}", data=data)
        return Fuzzed(target=target.name, runs=0, refused=0, kept=0, lines=0, findings=(died,))


def judge_all(cases: Iterable[tuple[Target, bytes]]) -> list[Finding]:
    """What is wrong with reading each of these, in one process apart."""

    def judged() -> list[Finding]:
        with tempfile.TemporaryDirectory(prefix="fuzz-") as folder:
            return [found for target, data in cases if isinstance(found := judge(target, data, Path(folder)), Finding)]

    found = _apart(judged, 600)
    assert isinstance(found, list), f"the process has ended: {found}"
    return found


def _apart(work: Callable[[], object], seconds: float) -> object:
    """What `work` gives, in a fork with limits; else how that ended."""
    context = mp.get_context("fork")
    receive, send = context.Pipe(duplex=False)

    def child() -> None:
        logging.disable(logging.CRITICAL)
        warnings.simplefilter("ignore")
        limit_memory()
        send.send(work())

    process = context.Process(target=child)
    process.start()
    send.close()
    try:
        return receive.recv() if receive.poll(seconds) else "it did not come back"
    except EOFError:
        process.join(10)
        return f"exit code {process.exitcode}"
    finally:
        process.kill()
        process.join()


# ---------------------------------------------------------------- in the process apart


def _fuzz(target: Target, seconds: float, seed: int, folder: Path) -> Fuzzed:
    draw = random.Random(f"{target.name} {seed}")
    corpus = list(target.seeds())
    seen: set[tuple[str, int]] = set()
    runs = refused = 0
    findings: dict[str, Finding] = {}
    until = time.monotonic() + seconds
    first = list(corpus)
    while (first or time.monotonic() < until) and len(findings) < MOST_FINDINGS:
        data = first.pop() if first else mutated(draw.choice(corpus), corpus, draw)
        lines: set[tuple[str, int]] = set()
        with _following(lines) if target.guided else contextlib.nullcontext():
            found = judge(target, data, folder)
        runs += 1
        refused += found == "refused"
        if isinstance(found, Finding):
            if found.kind not in findings:
                findings[found.kind] = _smaller(target, found, folder, draw)
        elif lines - seen:
            seen |= lines
            corpus.append(data)
    return Fuzzed(target=target.name, runs=runs, refused=refused, kept=len(corpus), lines=len(seen), findings=tuple(findings.values()))


def judge(target: Target, data: bytes, folder: Path) -> "Finding | str":
    """What is wrong with how this input was read; else "refused", or "read"."""
    _lay_out(target, data, folder)
    finding = lambda kind, what: Finding(target=target.name, kind=kind, what=what, data=data)
    answer = "read"
    try:
        with watched(folder):
            target.read(folder)
    except (Escaped, Slow) as error:
        return finding(f"{type(error).__name__}: {str(error)[:60]}", f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
    except Exception as error:
        answer, said = "refused", exit_codes.sentence(error)
        kind = f"{type(error).__name__} at {_place(error)}"
        if target.quiet or exit_codes.of(error) in (exit_codes.FAILED, exit_codes.LOST):
            return finding(kind, traceback.format_exc())
        if not said.isprintable() or len(said) > _SENTENCE:
            return finding(f"no sentence: {kind}", f"not a sentence: {said!r}")
        if target.named and Path(target.file).name not in said:
            return finding(f"no name: {kind}", f"does not name {Path(target.file).name}: {said}")
    if left := [str(path) for path in folder.rglob("*") if path.name.endswith((".tmp", ".partial"))]:
        return finding("left half written", f"left behind: {left}")
    return answer


def _lay_out(target: Target, data: bytes, folder: Path) -> None:
    for path in sorted(folder.rglob("*"), key=lambda p: -len(p.parts)):
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    for name, content in {**target.beside(), target.file: data}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def _place(error: BaseException) -> str:
    """The innermost line of ours that it came through."""
    ours = [f for f in traceback.extract_tb(error.__traceback__) if f.filename.startswith(OURS) and not f.filename.startswith(_TESTS)]
    return f"{ours[-1].filename.removeprefix(OURS)}:{ours[-1].name}" if ours else "elsewhere"


def _smaller(target: Target, finding: Finding, folder: Path, draw: random.Random) -> Finding:
    """The same kind, of less input."""
    for _ in range(_MINIMISE):
        data = finding.data
        if len(data) < 2:
            break
        size = max(1, len(data) // draw.choice((2, 4, 8, 16)))
        start = draw.randrange(len(data) - size + 1)
        found = judge(target, data[:start] + data[start + size :], folder)
        if isinstance(found, Finding) and found.kind == finding.kind:
            finding = found
    return finding


@contextlib.contextmanager
def _following(lines: set[tuple[str, int]]):
    """Which lines of ours are run."""

    def local(frame, event, _):
        if event == "line":
            lines.add((frame.f_code.co_filename, frame.f_lineno))
        return local

    def calls(frame, event, _):
        name = frame.f_code.co_filename
        return local if name.startswith(OURS) and not name.startswith(_TESTS) else None

    sys.settrace(calls)
    try:
        yield
    finally:
        sys.settrace(None)


# ---------------------------------------------------------------- kept cases

CASES = Path(__file__).parent / "cases"


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "_" for c in name).strip("_").replace("__", "_")


def keep(finding: Finding) -> Path:
    path = CASES / slug(finding.target) / hashlib.sha256(finding.data).hexdigest()[:12]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(finding.data)
    return path


def kept(target: Target) -> list[bytes]:
    return [path.read_bytes() for path in sorted((CASES / slug(target.name)).glob("*"))]
