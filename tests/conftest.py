"""Settings of every test: one thread per process, nothing asks a network, no deadline on shared cores."""

import functools
import os

from hypothesis import settings
from shoestring.conf import compose
from shoestring.launch import environment

environment.prepare(threads=1)
environment.tell_deepspeed("cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

settings.register_profile("shoestring", deadline=None, derandomize=os.environ.get("CI") == "true", print_blob=True)
settings.load_profile("shoestring")


def _kept(load):
    """A configuration is a function of its words, and composing one takes 0.2 s: of each rank of each test, where their parent has not
    done it before it forked."""
    known = {}

    @functools.wraps(load)
    def kept(overrides=(), config_dir=None):
        words = tuple(overrides)
        if config_dir is not None:
            return load(words, config_dir)
        if words not in known:
            known[words] = load(words)
        return known[words]

    return kept


compose.load = _kept(compose.load)
