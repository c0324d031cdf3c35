"""What a command's exit code says: one table, which scripts and job schedulers may rely on."""

import errno
import re

from . import secrets

OK, FAILED, CONFIG, DATA, STORAGE, LOST, DIVERGED, BUDGET, PREEMPTED, OTHER_SIZE, INTERRUPTED = 0, 1, 2, 3, 4, 5, 6, 7, 75, 76, 130

MEANING = {
    OK: "done",
    FAILED: "an error that no other code names; a traceback says where",
    CONFIG: "the command line or the configuration is wrong; nothing was started",
    DATA: "the data cannot be read, or too much of it is bad",
    STORAGE: "a checkpoint or a file cannot be written, read or verified",
    LOST: "hardware: a rank died, was killed, did not answer in time or computes wrongly",
    DIVERGED: "the loss or a gradient is no longer a number; the last checkpoint is from before",
    BUDGET: "the budget (dollars, GPU-hours, tokens or the deadline) is spent: saved, and stopped",
    PREEMPTED: "stopped by SIGTERM or SIGINT and saved; the same command goes on from there",
    OTHER_SIZE: "saved; the next phase runs on another number of processes: start that many with the same command",
    INTERRUPTED: "stopped at once by a second signal; the last checkpoint is intact",
}

AGREED = (OK, BUDGET, PREEMPTED, OTHER_SIZE)  # ends that all ranks come to together, with everything saved
PASSING = (FAILED, LOST, OTHER_SIZE)  # what may be over when the ranks are started again; after any other code it would come again

# By name, and not by class: whoever only wants an exit code need not import torch for it.
_BY_NAME = {
    "ConfigError": CONFIG, "DataError": DATA, "CheckpointError": STORAGE, "HFError": STORAGE, "SafetensorError": STORAGE,
    "UnsafeFile": STORAGE,
    "FloatingPointError": DIVERGED, "RankFailed": LOST, "CollectiveLost": LOST, "WrongGradients": LOST,
    "DistBackendError": LOST, "DistNetworkError": LOST, "DistStoreError": LOST, "KeyboardInterrupt": INTERRUPTED,
}  # fmt: skip
_FULL_OR_BROKEN = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)
_FILE_ERRORS = (FileNotFoundError, FileExistsError, PermissionError, NotADirectoryError, IsADirectoryError)
_LONGEST = 2000  # characters of a sentence
_PEER_GONE = re.compile(r"closed by peer|reset by peer|gloo|NCCL|[Tt]imed out waiting|Broken pipe")


def of(error: BaseException) -> int:
    """The exit code that an exception ends a command with."""
    for kind in type(error).__mro__:
        if kind.__name__ in _BY_NAME:
            return _BY_NAME[kind.__name__]
    if isinstance(error, _FILE_ERRORS) or (isinstance(error, OSError) and error.errno in _FULL_OR_BROKEN):
        return STORAGE
    if isinstance(error, (RuntimeError, ConnectionError)) and _PEER_GONE.search(str(error)):
        return LOST
    return FAILED


def meaning(code: int) -> str:
    """Of any process's exit code, ours or not."""
    return MEANING.get(code) or (f"killed by signal {code - 128}" if 128 < code < 160 else "of no meaning to us")


def sentence(error: BaseException) -> str:
    """What to tell a person about an exception: one line without secrets, that a terminal takes as text whatever an error quotes."""
    text = secrets.hide(" ".join(str(error).split()))
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    if len(text) > _LONGEST:
        text = f"{text[: _LONGEST - 400]} [...] {text[-400:]}"
    code = of(error)
    return text if text and code not in (FAILED, LOST) else f"{type(error).__name__}: {text}" if text else type(error).__name__
