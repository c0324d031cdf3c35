"""Settings of every test: one thread per process, nothing asks a network, no deadline on shared cores."""

import fcntl
import functools
import hashlib
import os
import pickle
import tempfile
from pathlib import Path

from hypothesis import settings
from shoestring.conf import compose
from shoestring.launch import environment

environment.prepare(threads=1)
environment.tell_deepspeed("cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

settings.register_profile("shoestring", deadline=None, derandomize=os.environ.get("CI") == "true", print_blob=True)
settings.load_profile("shoestring")


def _kept(load):
    """A configuration is a function of its words, and composing one takes 0.2 s: of each rank of each test. So it is kept in a file for
    the ranks that are forked later, and one of several ranks that want it at once composes it."""
    known, folder = {}, tempfile.TemporaryDirectory(prefix="shoestring-tests-")

    @functools.wraps(load)
    def kept(overrides=(), config_dir=None):
        words = tuple(overrides)
        if config_dir is not None:
            return load(words, config_dir)
        if words not in known:
            name = hashlib.sha256(repr(words).encode()).hexdigest()
            with open(Path(folder.name) / name, "a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.seek(0)
                if not (pickled := file.read()):
                    file.write(pickled := pickle.dumps(load(words)))
            known[words] = pickle.loads(pickled)
        return known[words]

    return kept


compose.load = _kept(compose.load)
