"""Which environment variables a cluster file may give to ranks (`cluster.env`): none that whoever starts a rank sets, and no secrets."""

import re

from . import secrets

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_STARTERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE", "PYTHONSAFEPATH")
_STARTERS_OWN = ("MASTER_", "TORCHELASTIC_", "ROLE_")
_DEVICES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
_TOO_LATE = ("LD_", "PYTHON", "MALLOC_", "GLIBC_")


def wrong(name: str, text: str) -> str:
    """What is wrong with a variable, as a sentence that does not quote its value; "" for nothing."""
    if not _NAME.fullmatch(name):
        return f"{name!r} is no name of a variable: letters, digits and _"
    if name == "OMP_NUM_THREADS":
        return "OMP_NUM_THREADS is cluster.threads"
    if name in _STARTERS or name.startswith(_STARTERS_OWN):
        return f"{name} is set by whoever starts the ranks"
    if name in _DEVICES:
        return f"{name} is the job's: a rank takes the GPU of its local rank"
    if name.startswith(_TOO_LATE):
        return f"{name} is read before a rank could set it: set it where the job is started"
    if secrets.names_one(name):
        return f"{name} looks like a secret, and every run keeps a copy of its settings: set it where the job is started"
    return "" if text.isprintable() else f"{name} must be one line of text"
