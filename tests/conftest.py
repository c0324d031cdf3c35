"""Settings of every test: one thread per process, nothing asks a network, no deadline on shared cores."""

import os

from hypothesis import settings
from shoestring.launch import environment

environment.prepare(threads=1)
environment.tell_deepspeed("cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

settings.register_profile("shoestring", deadline=None, derandomize=os.environ.get("CI") == "true", print_blob=True)
settings.load_profile("shoestring")
